"""Fine-tuning of `benchmarks/gain/photos.py` on a few small photographs and random weights."""

import pytest
import second_order_gain
import timm
import torch
from gain import photos
from gain.photos import RULES, PhotosConfig, write_maps
from gain.run import Run, build, exported_network, open_task
from gain.studies import FINE_TUNED, photographs
from PIL import Image

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


@pytest.mark.slow
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


def test_real_needs_photographs_weights_and_a_cache(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        second_order_gain.main(["--real"])
    assert "--real needs --photos, --weights and --cache" in capsys.readouterr().err
