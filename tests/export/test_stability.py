"""The threshold of stable answers: by hand, with a planted variant, and from the images of a run."""

import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from sopdeploy.bundle.folder import open_bundle
from sopdeploy.bundle.manifest import Manifest
from sopdeploy.checkpoint import Checkpoint, write_checkpoint
from sopdeploy.data.datasets.folder import FolderConfig
from sopdeploy.data.datasets.layouts import open_any_images
from sopdeploy.data.image_files import hash_images
from sopdeploy.data.sources import open_data
from sopdeploy.decision import Decision, lead
from sopdeploy.images.pixels import preprocess_image
from sopdeploy.images.preprocess import Preprocess
from sopdeploy_export import stability
from sopdeploy_export.options import ExportOptions
from sopdeploy_export.parity.onnx_file import file_outputs, open_session
from sopdeploy_export.pipeline import export_checkpoint
from sopdeploy_export.stability import (
    Photographs,
    find_photographs,
    fit_stability,
    image_variants,
    measure_stability,
    other_decoders,
    quantile,
)
from tests.export.conftest import LABELS, PREPROCESS, trained
from tests.export.once import proving_once

PHOTOGRAPHS = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write 20 different photographs of each of ten classes, as JPEGs of 40 x 32 pixels."""
    root, random = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for label in LABELS:
        (root / label).mkdir()
        for number in range(PHOTOGRAPHS):
            coarse = Image.fromarray(random.integers(0, 256, (4, 5, 3), dtype=np.uint8))
            picture = coarse.resize((40, 32), Image.Resampling.BICUBIC)
            picture.save(root / label / f"{number:02}.jpg", quality=90)
    return root


def checkpoint_of(folder: Path, *, fitted: str = "train", decision: Decision | None = None) -> Checkpoint:
    """Build the checkpoint of a run on *folder*; *fitted* names the images that it was trained on."""
    config = FolderConfig(kind="folder", path=folder)
    split = open_data(config)
    images = [split.train, split.held_out][: 1 + (fitted == "all")]
    hashes = np.concatenate([hash_images(part) for part in images])
    network = trained("resnet8")
    return Checkpoint(
        model="resnet8",
        config=network.config.model_dump(mode="json"),
        weights=network.state_dict(),
        labels=LABELS,
        preprocess=PREPROCESS,
        training={"recipe": {"data": config.model_dump(mode="json")}},
        image_hashes=torch.from_numpy(np.unique(hashes)),
        decision=decision,
    )


def export(checkpoint: Checkpoint, folder: Path, **options: object) -> tuple[Path, Manifest]:
    path = folder / "best.pt"
    write_checkpoint(path, checkpoint)
    with proving_once():
        bundle = export_checkpoint(path, folder / "bundles", ExportOptions.model_validate(options)).path
    return bundle, open_bundle(bundle).manifest


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        (range(1, 19), math.inf),  # 0.95 * 19 = 18.05: rank 19 of 18
        (range(1, 20), 19.0),  # 0.95 * 20 = 19
        (range(1, 40), 38.0),  # 0.95 * 40 = 38
        ([5.0] * 19 + [1.0], 5.0),
        ([], math.inf),
    ],
)
def test_the_threshold_is_an_order_statistic_of_the_losses(losses: list[float], expected: float) -> None:
    assert quantile(np.array(losses, np.float64)[::-1]) == expected


def test_the_loss_of_a_photograph_is_that_of_its_worst_variant() -> None:
    margins = np.arange(39.0)
    leads = np.stack([margins, margins - 0.25, margins + 1 - 2 * np.arange(39) / 38], axis=1)
    found = fit_stability(("shift", "tilt"), leads, fitted=True)
    worst = np.sort(np.maximum(0.25, 2 * np.arange(39) / 38 - 1))
    assert found.threshold == pytest.approx(1.15 * worst[37], abs=1e-3)
    assert found.threshold >= 1.15 * worst[37]
    assert [(one.name, one.num_flips, one.largest) for one in found.variants] == [
        ("shift", 1, 0.25),
        ("tilt", 0, 1),
    ]
    assert (found.num_images, found.photographs) == (39, "training")
    # The margins 0 and 1 are not above 1.15 times the largest loss, 1.
    assert (found.num_stable, found.num_flips) == (37, 0)


def test_too_few_photographs_make_no_answer_stable() -> None:
    found = fit_stability(("shift",), np.array([[9.0, 9.0]] * 18), fitted=False)
    assert (found.threshold, found.num_stable) == (None, 0)
    assert not found.is_stable(np.array([100.0, 0.0]))
    assert "18 photographs are too few" in found.describe()


def test_losses_below_zero_give_the_threshold_zero() -> None:
    assert fit_stability(("shift",), np.array([[1.0, 2.0]] * 19), fitted=False).threshold == 0


def test_answers_that_a_variant_changes_are_not_stable(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plant a runtime that takes the margin of a third of the images from the best class of every image."""
    pixels = np.stack(
        [preprocess_image(Image.open(path), PREPROCESS) for path in sorted(folder.rglob("*.jpg"))]
    )
    without, _ = export(checkpoint_of(folder), tmp_path / "without")
    exact = file_outputs(open_session(without / "model.onnx"), pixels, 1)["logits"]
    margins = lead(exact, exact.argmax(axis=1))
    shift = float(np.quantile(margins, 0.35))

    def open_planted(file: Path) -> dict[str, stability.ComputeLogits]:
        session = open_session(file)

        def run(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
            logits: NDArray[np.float32] = file_outputs(session, pixels, 1)["logits"]
            logits[:, logits.argmax(axis=1)] -= shift
            return logits

        return {"planted": run}

    monkeypatch.setattr(stability, "other_runtimes", open_planted)
    found = export(checkpoint_of(folder), tmp_path / "with")[1].stability
    assert found is not None
    (planted,) = [one for one in found.variants if one.name == "planted"]
    assert planted.num_flips == pytest.approx(20, abs=10)
    flipped = margins < shift
    assert not any(found.is_stable(row) for row in exact[flipped])
    assert np.mean([found.is_stable(row) for row in exact[~flipped]]) > 0.5


def test_every_variant_gives_other_pixels_of_the_same_photograph(folder: Path, tmp_path: Path) -> None:
    rules = Preprocess(resize=16, crop=16)
    picture = Image.open(folder / "a" / "00.jpg").resize((128, 96), Image.Resampling.NEAREST)
    picture.save(tmp_path / "large.jpg", quality=90)  # large enough for scaled decoding
    file = (tmp_path / "large.jpg").read_bytes()
    exact = preprocess_image(stability.open_image(file), rules).astype(int)
    found = image_variants(file, rules, other_decoders())
    assert (found.pop("exact") == exact).all()
    for name, made in found.items():
        assert 0 < np.abs(made - exact).mean() < 16, name


def test_an_export_measures_the_held_out_images_of_its_run(folder: Path, tmp_path: Path) -> None:
    found = export(checkpoint_of(folder), tmp_path)[1].stability
    assert found is not None
    assert (found.num_images, found.photographs) == (40, "held-out")
    assert found.threshold is not None
    assert {"scaled decoding", "box resampling", "resampling of OpenCV"} <= {
        one.name for one in found.variants
    }


def test_copies_of_a_photograph_count_once(folder: Path, tmp_path: Path) -> None:
    copies = tmp_path / "photographs"
    shutil.copytree(folder / "a", copies / "a")
    for path in sorted((folder / "b").glob("0*.jpg")):
        shutil.copy(path, copies / "a" / f"b{path.name}")
        shutil.copy(path, copies / "a" / f"copy-of-b{path.name}")
    bundle, manifest = export(replace(checkpoint_of(folder), training={}), tmp_path)
    photographs = Photographs(open_any_images(copies), fitted=False)
    left: list[float] = []
    found = measure_stability(bundle / "model.onnx", None, photographs, manifest.preprocess, 8, left.append)
    assert (len(photographs.images), found.num_images) == (40, 30)
    (seconds,) = left  # after ten of thirty: the others need about twice the time
    assert seconds > 0


def test_opening_other_decoders_prints_nothing() -> None:
    code = "import os, sopdeploy_export.stability as it; it.other_decoders(); os.write(2, b'end')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert (done.stdout, done.stderr) == (b"", b"end")


def test_training_images_are_measured_if_none_are_held_out(folder: Path) -> None:
    found = find_photographs(checkpoint_of(folder, fitted="all"))
    assert found is not None
    assert (found.fitted, len(found.images)) == (True, 160)


@pytest.mark.parametrize("change", ["moved", "other images", "no run"])
def test_nothing_is_measured_without_the_images_of_the_run(change: str, folder: Path, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(folder)
    if change == "moved":
        checkpoint.training["recipe"]["data"]["path"] = str(tmp_path / "gone")
    elif change == "other images":
        checkpoint.image_hashes.add_(1)
    else:
        checkpoint.training.clear()
    assert find_photographs(checkpoint) is None
