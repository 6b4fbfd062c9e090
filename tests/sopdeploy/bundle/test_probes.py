"""Probe files and replays: every deviation and every invalid file is detected."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from sopdeploy.bundle.probes import Probes, read_probes, replay, write_probes
from sopdeploy.errors import BundleError, ParityError

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), dtype=np.uint8)
LOGITS = np.zeros((5, 3), np.float32)


def network(images: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
    means = images.mean(axis=(1, 2)).astype(np.float32)
    return {"logits": means, "gate": means[:, :2]}


PROBES = Probes(images=IMAGES, expected=network(IMAGES), tolerance={"logits": 1e-3, "gate": 1e-4})


def test_probes_are_read_as_they_were_written_and_equal_probes_have_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_probes(tmp_path / name, PROBES)
    found = read_probes(tmp_path / "a")
    assert (found.images.dtype, found.tolerance) == (np.uint8, PROBES.tolerance)
    assert {values.dtype for values in found.expected.values()} == {np.dtype(np.float32)}
    np.testing.assert_equal((found.images, found.expected), (IMAGES, PROBES.expected))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 64])
def test_the_same_network_passes_at_every_batch_size(batch: int) -> None:
    sizes: list[int] = []
    found = replay(PROBES, lambda images: sizes.append(len(images)) or network(images), batch=batch)
    assert found.deviation == {"logits": 0.0, "gate": 0.0}
    assert (found.num_images, found.tolerance) == (5, PROBES.tolerance)
    assert (sum(sizes), max(sizes)) == (5, min(batch, 5))


Wrong = Callable[[NDArray[np.uint8]], dict[str, NDArray[Any]]]


def changed(change: Callable[[NDArray[np.float32]], NDArray[Any]], name: str = "logits") -> Wrong:
    return lambda images: {**network(images), name: change(network(images)[name])}


WRONG: dict[str, tuple[Wrong, str]] = {
    "slightly off": (changed(lambda v: v + 0.0011), r"'logits' deviates by 0\.0011, the bound is 0\.001"),
    "wrong second output": (changed(lambda v: v + 0.0005, "gate"), "'gate' deviates"),
    "NaN": (changed(lambda v: v * np.nan), "not finite"),
    "a missing class": (changed(lambda v: v[:, :-1]), "has another shape"),
    "no output": (lambda images: {"gate": network(images)["gate"]}, "'logits' is missing"),
}


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("case", WRONG)
def test_other_outputs_are_rejected(case: str, batch: int) -> None:
    run, message = WRONG[case]
    with pytest.raises(ParityError, match=message):
        replay(PROBES, run, batch=batch)


@pytest.mark.parametrize(
    "probes",
    [
        Probes(images=IMAGES, expected={"logits": LOGITS * np.float32("nan")}, tolerance={"logits": 1.0}),
        Probes(images=IMAGES, expected={"logits": LOGITS}, tolerance={"logits": np.nan}),
    ],
    ids=["expected", "tolerance"],
)
def test_probes_with_nan_never_pass(probes: Probes) -> None:
    with pytest.raises(ParityError):
        replay(probes, network)


def saved(**arrays: Any) -> bytes:
    file = io.BytesIO()
    np.savez(file, allow_pickle=True, **arrays)
    return file.getvalue()


UNREADABLE: dict[str, bytes | None] = {
    "missing": None,
    "half a zip": saved(images=IMAGES, output_logits=LOGITS)[:300],
    "a pickled array": saved(images=np.array([{"a": 1}, None], dtype=object)),
    "no images": saved(output_logits=LOGITS, tolerance_logits=1.0),
    "no tolerance": saved(images=IMAGES, output_logits=LOGITS),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_other_files_are_rejected(tmp_path: Path, case: str) -> None:
    path = tmp_path / "probes.npz"
    body = UNREADABLE[case]
    if body is not None:
        path.write_bytes(body)
    with pytest.raises(BundleError, match=r"probes\.npz: not a probe file") as caught:
        read_probes(path)
    assert "\n" not in str(caught.value)
