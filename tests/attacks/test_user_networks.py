"""Networks of users that compute something else than their graph are refused; others are exported unchanged.

The slow tests compare every exported file with the network in Python, on images that no export
has seen.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sopdeploy.errors import SopdeployError
from sopdeploy.layers.normalize import Normalize
from sopdeploy_commands.bundles.verify import verify
from sopdeploy_export.options import ExportOptions
from tests.attacks import user_networks as u
from tests.export.user_network.networks import PREPROCESS, SIDE, export_small
from tests.support import quick_torch

TOLERANCE = 1e-4  # of the largest logit
BATCHES = (1, 2, 3, 5)
QUICK = ExportOptions(max_batch=1)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with quick_torch.one_thread():
        yield
    torch.set_default_dtype(torch.float32)


def export(network: nn.Module, plain: Any, destination: Path, **options: Any) -> Path:
    return export_small(
        network, destination, plain=plain, training_only=["branches"], **options
    ).path


def build(make: Callable[..., nn.Module]) -> nn.Module:
    network = make()
    u.trained(getattr(network, "_orig_mod", network))
    return network


MESSAGES = {
    "STATE": r"writes to .+ while it runs|^.+ changes while the trained network runs|"
    r"cannot be (captured|copied)",
    "COPIES": r"a copy of the network .* computes something else|compiled with a backend of its own|"
    r"is not the plain one",
    "SIZES": r"larger batches is not the network for a batch of one|treats some batch sizes differently|"
    r"Python code .* reads tensors \(is_contiguous in",
    "MEMORY": r"reads memory with as_strided|out of bounds for storage|Python code .* reads tensors|bfloat16|"
    r"torch\.set_default_dtype\(torch\.float64\) is active",
    "ODD": r"forward hook on|replaced on the instance|in train mode|depends on .*branches|holds NaN|"
    r"fails for 1 images",
    "CONSTANTS": r"is no parameter or buffer, .* use ModuleList",
}
ATTACKS = [
    pytest.param(group, name, id=name) for group in MESSAGES for name in getattr(u, group)
]


@pytest.mark.parametrize(("group", "name"), ATTACKS)
def test_network_that_is_not_its_graph_is_refused_in_one_line(
    group: str, name: str, tmp_path: Path
) -> None:
    make = getattr(u, group)[name]
    network = build(make)
    plain = (
        None
        if group == "CONSTANTS" or not isinstance(make, type)
        else lambda: make(branch=False)
    )
    with pytest.raises(SopdeployError, match=MESSAGES[group]) as error:
        export(
            network,
            plain,
            tmp_path,
            **({} if group in ("SIZES", "ODD") else {"options": QUICK}),
        )
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


TABLE = torch.linspace(0, 1, 2 * u.WIDTH * u.CLASSES).reshape(2, u.WIDTH, u.CLASSES)


class ReadsTable(u.Small):
    def forward(self, images: Tensor) -> Tensor:
        features = self.features(images)
        return self.fc(features) + features @ TABLE[0]


def test_a_global_tensor_that_the_plain_network_reads_too_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        SopdeployError, match=r"is no parameter or buffer, .*; try allow_constants=True$"
    ):
        export(build(ReadsTable), lambda: ReadsTable(branch=False), tmp_path, options=QUICK)


def reads(
    table: Callable[[Any], Tensor], prepare: Callable[[Any], None] | None = None
) -> type[u.Small]:
    return u.small(lambda n, f: n.fc(f) + f @ table(n), prepare)


def holds(make: Callable[[], object]) -> Callable[[Any], None]:
    return lambda network: setattr(network, "table", make())


def seeded(network: Any) -> None:
    torch.manual_seed(0)
    network.table = [nn.Linear(u.WIDTH, u.CLASSES)]


ROWS = TABLE[0].tolist()
UNSTORED = r"is no parameter or buffer, .*; try allow_constants=True$"
BUILT: dict[str, tuple[type[u.Small], str]] = {
    "its own tensor": (reads(lambda n: n.table, holds(lambda: TABLE[0].clone())), ""),
    "a tensor that forward makes": (reads(lambda _: torch.tensor(ROWS)), ""),
    "random numbers": (
        reads(lambda n: n.table, holds(lambda: torch.rand(TABLE[0].shape))),
        UNSTORED,
    ),
    "a global tensor": (reads(lambda _: TABLE[0]), UNSTORED),
    "a global tensor that it finds by its name": (
        reads(lambda _: globals()["TABLE"][0]),
        UNSTORED,
    ),
    "a tensor that both networks hold": (
        reads(lambda n: n.table[0], holds(lambda: TABLE)),
        UNSTORED,
    ),
    "a parameter in a list": (
        reads(lambda n: n.table[0], holds(lambda: [nn.Parameter(TABLE[0].clone())])),
        UNSTORED,
    ),
    "a layer in a list": (u.small(lambda n, f: n.fc(f) + n.table[0](f), seeded), UNSTORED),
}


@pytest.mark.parametrize("name", BUILT)
def test_a_tensor_in_no_weight_file_is_exported_only_if_the_builder_makes_it_again(
    name: str, tmp_path: Path
) -> None:
    make, message = BUILT[name]
    network, options = build(make), {"rebuild": make, "options": ExportOptions(max_batch=2)}
    with nullcontext() if not message else pytest.raises(SopdeployError, match=message):
        assert export_small(network, tmp_path, **options).certificate.proof == "trained-rebuilt"


def unseen_images() -> NDArray[np.uint8]:
    """Generate saturated colors, noise and binary images: uint8 (N, 12, 12, 3)."""
    random = np.random.default_rng(1)
    colors = [
        np.full((SIDE, SIDE, 3), color, np.uint8)
        for color in itertools.product((0, 255), repeat=3)
    ]
    noise = random.integers(0, 256, (8, SIDE, SIDE, 3), dtype=np.uint8)
    binary = 255 * random.integers(0, 2, (9, SIDE, SIDE, 3), dtype=np.uint8)
    return np.concatenate([colors, noise, binary])


def largest_difference(network: nn.Module, file: Path) -> float:
    """Compare *file* with *network* in batches of 1, 2, 3 and 5, relative to the largest logit."""
    session, images, normalize = (
        ort.InferenceSession(str(file)),
        unseen_images(),
        Normalize(PREPROCESS, torch.contiguous_format),
    )
    differences, largest = [], 0.0
    for size in BATCHES:
        for start in range(0, len(images) - size + 1, size):
            batch = images[start : start + size]
            with torch.no_grad():
                expected = network(normalize(torch.from_numpy(batch)).contiguous()).numpy()
            differences.append(np.abs(session.run(None, {"images": batch})[0] - expected).max())
            largest = max(largest, float(np.abs(expected).max()))
    return float(max(differences)) / largest


def test_unseen_images_exceed_the_bound_of_the_attacks() -> None:
    network = build(u.Small)
    images = Normalize(PREPROCESS, torch.contiguous_format)(torch.from_numpy(unseen_images()))
    assert (network(images).amax(1) > u.Small.limit).sum() > 2


USUAL = ("a cache of a weight", "a lock and a logger", "a choice by value")
VALID = [
    pytest.param(name, marks=() if name in USUAL else pytest.mark.slow) for name in u.VALID
]


@pytest.mark.parametrize("name", VALID)
def test_valid_network_is_exported_and_its_file_computes_the_same(
    name: str, tmp_path: Path
) -> None:
    make = u.VALID[name]
    network = build(make)
    file = export(network, lambda: make(branch=False), tmp_path) / "model.onnx"
    assert largest_difference(network, file) < TOLERANCE


def test_constants_are_exported_if_the_user_allows_them(tmp_path: Path) -> None:
    network = build(u.CONSTANTS["layers in nested lists"])
    path = export(network, None, tmp_path, options=QUICK, allow_constants=True)
    assert verify(path).replays
