"""Branches that run in eval mode are removed with proof, or refused because the output depends on them."""

import itertools
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from sopdeploy.errors import SopdeployError
from sopdeploy.layers.normalize import Normalize
from sopdeploy_export.options import ExportOptions
from tests.attacks import branches as b
from tests.attacks.user_networks import trained
from tests.export.user_network.networks import PREPROCESS, SIDE, export_small
from tests.support import quick_torch

GROUPS = {
    "VALUES": b.VALUES,
    "ALIASES": b.ALIASES,
    "EFFECTS": b.EFFECTS,
    "PYTHON": b.PYTHON,
    "CANNOT": b.CANNOT,
}
REFUSED = [
    pytest.param(case, id=f"{group}-{name}")
    for group in GROUPS
    for name, case in GROUPS[group].items()
]
QUICK = ExportOptions(max_batch=1)
BY_SIZE = ("a pair", "two views", "nested results")  # also exported for batches


@pytest.fixture(autouse=True)
def _one_thread():  # type: ignore[no-untyped-def]
    with quick_torch.one_thread():
        yield


def test_there_are_at_least_thirty() -> None:
    assert len(REFUSED) + len(b.RIGHT) >= 30


@pytest.mark.parametrize("case", REFUSED)
def test_a_branch_that_the_output_needs_is_refused_in_one_line(
    case: b.Case, tmp_path: Path
) -> None:
    network = trained(case.network())
    with pytest.raises(SopdeployError, match=case.message) as error:
        export_small(network, tmp_path, training_only=case.parts, logits_key=0, options=QUICK)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def unseen_images() -> NDArray[np.uint8]:
    random = np.random.default_rng(1)
    colors = [
        np.full((SIDE, SIDE, 3), color, np.uint8)
        for color in itertools.product((0, 255), repeat=3)
    ]
    return np.concatenate([colors, random.integers(0, 256, (8, SIDE, SIDE, 3), dtype=np.uint8)])


@pytest.mark.parametrize("name", b.RIGHT)
def test_a_branch_that_nothing_needs_is_removed_and_the_file_computes_the_same(
    name: str, tmp_path: Path
) -> None:
    case = b.RIGHT[name]
    network = trained(case.network())
    options = ExportOptions(max_batch=8) if name in BY_SIZE else QUICK
    before = {key: value.clone() for key, value in network.state_dict().items()}
    exported = export_small(
        network, tmp_path, training_only=case.parts, logits_key=0, options=options
    )
    certificate = exported.certificate
    assert (certificate.proof, certificate.detached) == ("trained-detached", case.parts)
    assert {entry.name.split(".")[0] for entry in certificate.removed} == set(case.parts)
    assert {entry.name.split(".")[0] for entry in certificate.kept} == {"conv", "fc"}
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    images = unseen_images()
    session = ort.InferenceSession(str(exported.path / "model.onnx"))
    for size in (1, 3) if name in BY_SIZE else (1,):
        for start in range(0, len(images) - size + 1, size):
            batch = images[start : start + size]
            expected = logits_of(network, batch)
            found = session.run(None, {"images": batch})[0]
            assert np.abs(found - expected).max() <= 1e-4 * max(1.0, np.abs(expected).max())


@torch.no_grad()
def logits_of(network: nn.Module, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    output = network(
        Normalize(PREPROCESS, torch.contiguous_format)(torch.from_numpy(images)).contiguous()
    )
    logits: NDArray[np.float32] = (
        output if isinstance(output, torch.Tensor) else output[0]
    ).numpy()
    return logits
