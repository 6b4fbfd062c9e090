"""Fine-tuning of `benchmarks/gain/photos.py` on a few small photographs and random weights."""

import pytest
import second_order_gain
import timm
import torch
from gain import photos
from gain.photos import RULES, PhotosConfig, write_maps
from gain.run import Run, build, exported_network, open_task, train, train_and_measure
from gain.studies import FINE_TUNED, FROZEN, PHOTO_EPOCHS, photographs
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sopdeploy.backbones.timm_backbone import TimmBackbone
from sopdeploy.images.pixels import preprocess_image

CLASSES = ("hat", "pants", "shoes")


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> PhotosConfig:
    folder = tmp_path_factory.mktemp("photographs")
    for label, name in enumerate(CLASSES):
        (folder / "photos" / name).mkdir(parents=True)
        for number in range(4):
            image = Image.radial_gradient("L").rotate(30 * number + 90 * label).convert("RGB")
            image.save(folder / "photos" / name / f"{number}.png")
    torch.manual_seed(0)
    torch.save(timm.create_model(photos.BACKBONE).state_dict(), folder / "weights.pth")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(photos, "VARIANTS", 1)
        write_maps(folder / "photos", folder / "weights.pth", folder / "maps.npz")
    return PhotosConfig(
        maps=folder / "maps.npz", weights=folder / "weights.pth", classes=3, per_class=3, test=3
    )


def arms(task: PhotosConfig) -> dict[str, Run]:
    study = photographs(task, 1)
    return {arm: study.run(arm, 0).model_copy(update={"epochs": 1}) for arm in study.arms}


def test_the_stored_maps_give_the_logits_of_the_whole_network(task: PhotosConfig) -> None:
    run = arms(task)[FINE_TUNED]
    network = exported_network(build(run), run)
    whole = timm.create_model(photos.BACKBONE, num_classes=3).eval()
    stored = torch.load(task.weights)  # noqa: TID251
    whole.load_state_dict({**stored, **network.state_dict()})
    found = open_task(run)
    folder = task.maps.parent / "photos"
    images = [
        preprocess_image(Image.open(path), RULES)
        for name in CLASSES
        for path in sorted((folder / name).iterdir())
    ]
    batch = torch.stack([torch.from_numpy(image.copy()).permute(2, 0, 1) / 127.5 - 1 for image in images])
    expected = whole(batch)
    for logits in network(found.test):
        assert min((logits - other).abs().max() for other in expected) < 0.01 * expected.abs().max()


def test_all_arms_start_with_the_same_weights_and_photographs(task: PhotosConfig) -> None:
    networks = {arm: build(run).state_dict() for arm, run in arms(task).items()}
    plain = networks[FINE_TUNED]
    for state in networks.values():
        assert all(torch.equal(state[name], value) for name, value in plain.items())
    tasks = [open_task(run) for run in arms(task).values()]
    assert all(torch.equal(tasks[0].train, other.train) for other in tasks)
    assert not {tuple(one.flatten().tolist()) for one in tasks[0].test} & {
        tuple(one.flatten().tolist()) for one in tasks[0].train[:, 0]
    }


def test_training_starts_from_a_classifier_of_the_frozen_network(task: PhotosConfig) -> None:
    run = arms(task)[FROZEN].model_copy(update={"epochs": 0})
    network, found = build(run), open_task(run)
    assert isinstance(network, TimmBackbone)
    photos.start_from_probe(network, found)
    features = network.features(found.train[:, 0])[0].mean(dim=(2, 3)).detach().numpy()
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=photos.PROBE_C, max_iter=5000))
    expected = probe.fit(features, found.labels).predict_proba(features)
    logits = network(found.train[:, 0])
    assert torch.allclose(logits.softmax(dim=1), torch.from_numpy(expected).float(), atol=1e-3)
    before = network.state_dict()["bn2.running_mean"].clone()
    train(network, found, run.model_copy(update={"epochs": 1}))
    assert torch.equal(network.state_dict()["bn2.running_mean"], before)


def test_a_run_with_branches_is_measured_without_them(task: PhotosConfig) -> None:
    run = next(run for arm, run in arms(task).items() if arm.endswith("DSoP, detached"))
    assert 0 <= train_and_measure(run).accuracy <= 100
    assert not [name for name in exported_network(build(run), run).state_dict() if "branches" in name]


def test_the_equal_time_control_trains_longer(task: PhotosConfig) -> None:
    study = photographs(task, 10)
    assert len(study.seeds) == 10
    assert study.run(f"{FINE_TUNED}, equal time", 0).epochs > PHOTO_EPOCHS


def test_real_needs_photographs_weights_and_a_cache(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        second_order_gain.main(["--real"])
    assert "--real needs --photos, --weights and --cache" in capsys.readouterr().err
