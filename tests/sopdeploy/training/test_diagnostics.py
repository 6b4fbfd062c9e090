"""What a run sees of its network after each epoch, and that seeing changes nothing."""

import numpy as np
import pytest
import torch

from sopdeploy import create_model
from sopdeploy.checkpoint import read_checkpoint
from sopdeploy.data.base import ArrayImages, PreprocessedDataset
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.layers.covariance import centered_and_scaled, covariance
from sopdeploy.layers.normalize import Normalize
from sopdeploy.training.diagnostics import EpochRow, diagnose, history_csv, spectrum_epochs
from sopdeploy.training.loop import train
from sopdeploy.training.run import Position
from tests.sopdeploy.training.runs import short_recipe

pytestmark = pytest.mark.usefixtures("few_digits")

RULES = Preprocess(resize=16, crop=16)
LABELS = ("a", "b", "c")
NORMALISE = Normalize(RULES)


def pictures(count: int = 7) -> PreprocessedDataset:
    images = np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
    return PreprocessedDataset(ArrayImages(LABELS, images, np.arange(count) % 3), RULES)


@pytest.fixture
def branched():
    torch.manual_seed(0)
    return create_model("dsop-resnet8", num_classes=3, base_width=4)


def test_every_head_is_seen_and_the_main_one_is_the_network_itself(branched) -> None:
    held_out = pictures()
    before = {name: tensor.clone() for name, tensor in branched.state_dict().items()}
    random = torch.random.get_rng_state()
    seen = diagnose(branched, held_out, NORMALISE, 3, spectra=False)
    assert torch.equal(random, torch.random.get_rng_state())
    assert branched.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in branched.state_dict().items())
    assert set(seen.heads) == {"main", "layer1_0", "layer2_0", "layer3_0"}
    branched.eval()
    images = torch.from_numpy(np.stack([held_out[place][0] for place in range(7)]))
    labels = torch.arange(7) % 3
    logits = branched(NORMALISE(images)).detach()
    assert seen.heads["main"].top1 == pytest.approx(float((logits.argmax(1) == labels).float().mean()))
    loss = float(torch.nn.functional.cross_entropy(logits, labels))
    assert seen.heads["main"].loss == pytest.approx(loss, rel=1e-5)
    assert (seen.pictures, seen.gates, seen.spectra) == (7, {}, {})


def test_spectra_are_those_of_the_covariance_and_of_its_root(branched) -> None:
    seen = diagnose(branched, pictures(), NORMALISE, 4, spectra=True)
    assert set(seen.spectra) == {f"branches.layer{stage}_0.pooling" for stage in (1, 2, 3)}
    root = branched.eval().branches["layer1_0"].pooling
    maps: list[torch.Tensor] = []
    handle = root.register_forward_hook(lambda _module, inputs, _output: maps.append(inputs[0]))
    held_out = pictures()
    with torch.no_grad():
        branched.heads(NORMALISE(torch.from_numpy(np.stack([held_out[place][0] for place in range(7)]))))
    handle.remove()
    spectrum = seen.spectra["branches.layer1_0.pooling"]
    sigma = covariance(centered_and_scaled(maps[0].double()))
    wanted = torch.linalg.eigvalsh(sigma).flip(1).mean(0)
    assert spectrum.before == pytest.approx([float(wanted[place - 1]) for place in spectrum.places], abs=1e-9)
    roots = torch.linalg.eigvalsh(sigma).clamp_min(0).sqrt().flip(1).mean(0)
    assert spectrum.after[0] == pytest.approx(float(roots[0]), rel=0.02)  # five iterations are not exact
    assert list(spectrum.after) == sorted(spectrum.after, reverse=True)


def test_a_gate_is_seen_with_the_usage_of_its_components() -> None:
    torch.manual_seed(0)
    small = {"components": 4, "chosen": 2, "component_widths": (8,), "gate_widths": (8,)}
    model = create_model("gmsop-16-8-resnet18", num_classes=3, **small)
    seen = diagnose(model, pictures(5), NORMALISE, 4, spectra=True)
    gate = seen.gates["gate"]
    assert sum(gate.chosen) == pytest.approx(2)
    assert sum(gate.weights) == pytest.approx(1)
    load = np.asarray(gate.weights)
    assert gate.imbalance == pytest.approx(load.var(ddof=1) / load.mean() ** 2)
    assert set(seen.heads) == {"main"}
    assert set(seen.spectra) == {"gate.feature.1", "mixture.after"}


@pytest.mark.parametrize(
    ("epochs", "kept"), [(1, {1}), (2, {1, 2}), (5, {1, 2, 3, 4, 5}), (90, {1, 23, 46, 68, 90})]
)
def test_spectra_are_kept_of_the_first_the_last_and_a_few_epochs_between(epochs, kept) -> None:
    assert spectrum_epochs(epochs) == kept


def test_a_run_records_what_it_saw_and_how_fast_it_was(tmp_path) -> None:
    train(short_recipe("epochs=2"), tmp_path / "run")
    stored = read_checkpoint(tmp_path / "run" / "last.pt")
    assert stored.resume is not None
    history = Position.model_validate(stored.resume["position"]).history
    for row in history:
        assert row.sight is not None
        assert row.speed is not None
        assert row.gradient is not None
        assert row.gradient > 0
        assert row.speed.pictures_per_second > 0
        assert row.sight.pictures == 91
        assert row.sight.heads["main"].top1 == pytest.approx(row.figures.top1)
        assert row.sight.heads["main"].loss == pytest.approx(row.figures.loss, rel=1e-4)
        assert len(row.sight.spectra) == 3
    header = (tmp_path / "run" / "history.csv").read_text().splitlines()[0].split(",")
    assert {"gradient", "waiting", "pictures_per_second", "layer1_0_top1", "main_loss"} <= set(header)


def test_a_history_of_an_older_version_is_still_a_table() -> None:
    figures = {"top1": 0.5, "top5": 1.0, "count": 4, "loss": 0.7}
    row = EpochRow.model_validate(
        {"epoch": 1, "lr": 0.1, "losses": {"loss": 1.0}, "figures": figures, "seconds": 2.0}
    )
    assert history_csv([row]) == "epoch,lr,train_loss,loss,top1,top5,seconds\n1,0.1,1.0,0.7,0.5,1.0,2.0\n"
