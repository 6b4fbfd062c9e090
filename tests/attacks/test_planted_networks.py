"""Planted networks: each is refused by name, or its file is the network as it was given.

Whatever a row expects, an export that passes is compared with the network, which is built again,
on images that no export has seen, one by one and in batches.
"""

import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sopdeploy import Preprocess, export_network
from sopdeploy.errors import SopdeployError
from sopdeploy_export.options import ExportOptions
from tests.attacks.planted.network import LIMIT, SIDE, Planted, Row, rare, trained
from tests.attacks.planted.table import NOT_SEEN, PLAIN, TABLE
from tests.docs.reading import ROOT
from tests.support import quick_torch
from tests.support.slow import mostly_slow

PAGE = ROOT / "docs" / "proof.md"
PREPROCESS = Preprocess(resize=SIDE, crop=SIDE)
TOLERANCE = 1e-4  # of the largest logit


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with quick_torch.one_thread():
        yield
    torch.set_default_dtype(torch.float32)


def unseen_images() -> NDArray[np.uint8]:
    """Make 25 images, uint8 (N, 12, 12, 3); images of different kinds are neighbors."""
    random = np.random.default_rng(1)
    shape = (SIDE, SIDE, 3)
    row, column = np.indices((SIDE, SIDE))[..., None]

    colors = [np.full(shape, color) for color in itertools.product((0, 255), repeat=3)]
    boards = [np.broadcast_to((row + column + i) % 2 * 255, shape) for i in range(2)]
    stripes = [np.broadcast_to(each % 2 * 255, shape) for each in (row, column)]
    binary = [255 * random.integers(0, 2, shape) for _ in range(5)]
    noise = [random.integers(0, 256, shape) for _ in range(4)]
    smooth = [
        row * random.integers(0, 12, 3) + column * random.integers(0, 11, 3) for _ in range(4)
    ]

    kinds = (colors, binary, boards + stripes, noise, smooth)
    mixed = [
        image for some in itertools.zip_longest(*kinds) for image in some if image is not None
    ]
    return np.stack(mixed).astype(np.uint8)


IMAGES = unseen_images()


def normalized(images: NDArray[np.uint8]) -> Tensor:
    """Normalize *images*, uint8 (B, H, W, 3), to float32 (B, 3, H, W), as ImageNet's are."""
    mean = torch.tensor([0.485, 0.456, 0.406])
    deviation = torch.tensor([0.229, 0.224, 0.225])
    return (
        ((torch.from_numpy(images) / 255 - mean) / deviation).permute(0, 3, 1, 2).contiguous()
    )


def build(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return trained(make())


@torch.no_grad()
def largest_difference(network: nn.Module, file: Path, batch: int) -> float:
    """Compare *file* with *network* in batches of 1 to *batch* images, relative to the largest logit."""
    session = ort.InferenceSession(str(file))
    differences = []
    largest = 0.0

    for size in range(1, min(batch, 5) + 1):
        for start in range(0, len(IMAGES) - size + 1, size):
            images = IMAGES[start : start + size]
            output = network(normalized(images))
            expected = (output if isinstance(output, Tensor) else output[0]).numpy()
            logits = session.run(["logits"], {"images": images})[0]
            differences.append(np.abs(logits - expected).max())
            largest = max(largest, float(np.abs(expected).max()))

    return float(np.max(differences)) / largest


def largest_batch(row: Row) -> int:
    return row.batch or (1 if row.refused else 5)


def export(row: Row, destination: Path) -> Path:
    """Export the network of *row* and return its ONNX file."""
    options: dict[str, Any] = {"plain": row.plain, "rebuild": row.rebuild}
    if row.parts:
        options["training_only"] = row.parts
    given = build(row.build)

    with row.during():
        exported = export_network(
            given,
            labels=list("abcd"),
            preprocess=PREPROCESS,
            destination=destination,
            name="planted",
            logits_key=0,
            options=ExportOptions(max_batch=largest_batch(row)),
            **options,
        )

    return exported.path / "model.onnx"


def test_25_unseen_images_reach_what_is_planted() -> None:
    images = normalized(IMAGES)
    assert len(images) == 25
    assert (build(Planted)(images).amax(1) > LIMIT).sum() > 2
    assert (rare(images) > 0).sum() > 2
    assert (rare(images) == 0).sum() > 2


class Result(NamedTuple):
    """What an export ended in: the refusal, or how far its file differs from the network."""

    refusal: str = ""
    difference: float = 0.0


def try_to_export(row: Row, destination: Path) -> Result:
    try:
        file = export(row, destination)
    except SopdeployError as error:
        return Result(refusal=str(error))
    return Result(difference=largest_difference(build(row.build), file, largest_batch(row)))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", mostly_slow(TABLE, *PLAIN))
def test_a_planted_network_is_refused_or_its_file_is_the_network(
    name: str, tmp_path: Path
) -> None:
    row = TABLE[name]
    result = try_to_export(row, tmp_path)
    if result.refusal:
        assert name not in NOT_SEEN, f"seen now: {result.refusal}"
        assert row.refused, f"refused: {result.refusal}"
        assert re.search(row.refused, result.refusal), f"refused otherwise: {result.refusal}"
        assert "\n" not in result.refusal
        assert not list(tmp_path.iterdir())
        return

    if name in NOT_SEEN:
        assert result.difference > TOLERANCE, "passes, and its file is the network"
        assert NOT_SEEN[name] in " ".join(PAGE.read_text().split())
        return
    assert result.difference < TOLERANCE, f"PASSES WITH ANOTHER ANSWER: {result.difference:.2g}"
    assert not row.refused, "passes, and its file is the network"
