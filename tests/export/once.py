"""Cache the graphs of small networks within a test process; tests modify copies.

An export captures two networks and converts one. Tests of later steps use this cache. Other
tests check that another capture gives the same bytes.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from torch import nn
from torch.export import ExportedProgram

from sopdeploy.bundle.manifest import BatchRange
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.models.base import is_in
from sopdeploy_export.capture.deployed import Deployed, output_names
from sopdeploy_export.capture.program import capture_any_batch
from sopdeploy_export.lower.precision import Lowered
from sopdeploy_export.lower.to_onnx import lower
from sopdeploy_export.network import tensors
from sopdeploy_export.pack import graph_file
from sopdeploy_export.program_hashes import program_root, tensor_hash
from sopdeploy_export.prove.networks import Compared
from tests.support import quick_torch

CAPTURED: dict[str, Compared] = {}
of = Compared.of
GRAPHS: dict[str, Lowered] = {}
LOWERED: dict[tuple[str, tuple[str, ...]], onnx.ModelProto] = {}
# One range for all, because each range needs a capture
BATCH = BatchRange(optimum=4, maximum=9)
ALONE = BatchRange(optimum=1, maximum=1)  # captured once instead of twice


def graph_of(name: str, preprocess: Preprocess, **config: Any) -> Lowered:
    """Capture the network that `conftest.trained` builds for `BATCH` and convert it."""
    from tests.export.conftest import trained

    key = repr((name, preprocess, sorted(config.items())))
    if key not in GRAPHS:
        network = trained(name, **config)
        found = capture_any_batch(network, preprocess, BATCH)
        GRAPHS[key] = Lowered(network, found, lower(found, network.outputs))
    return GRAPHS[key]._replace(model=_copy(GRAPHS[key].model))


def _copy(model: onnx.ModelProto) -> onnx.ModelProto:
    other = onnx.ModelProto()
    other.CopyFrom(model)
    return other


@contextmanager
def proving_once(*, alone: bool = False) -> Iterator[None]:
    """Capture networks with equal tensors once, and convert equal graphs once, while the block runs.

    The plain network then gets the program of the trained one. Every export
    compares its file with its own network, so a program of another network would be found. A
    network outside of the catalog is proved *alone*, because another one can have equal
    tensors.
    """
    quick_torch.keep()
    with pytest.MonkeyPatch.context() as patch:
        if alone:
            patch.setitem(globals(), "CAPTURED", {})
        patch.setattr(Compared, "of", _compare_once)
        patch.setattr(graph_file, "lower", _lower_once)
        yield


def _compare_once(
    role: str,
    network: nn.Module,
    preprocess: Preprocess,
    batch: BatchRange,
    _other: Compared | None = None,
) -> Compared:
    text = repr((preprocess, batch, output_names(network)))
    key = digest(text, network, getattr(network, "training_only", ()))
    if key not in CAPTURED:
        CAPTURED[key] = of(role, network, preprocess, batch)
    named = tensors(network)
    return replace(
        CAPTURED[key],
        role=role,
        network=network,
        deployed=Deployed(network, preprocess).eval(),
        tensors=named,
        hashes={name: tensor_hash(tensor) for name, tensor in named.items()},
    )


def _lower_once(
    program: ExportedProgram, outputs: tuple[str, ...], _folder: Path
) -> onnx.ModelProto:
    key = program_root(program).sha256, outputs
    if key not in LOWERED:
        LOWERED[key] = lower(program, outputs)
    return _copy(LOWERED[key])


def digest(text: str, network: nn.Module, without: tuple[str, ...] = ()) -> str:
    """Hash *text* and the tensors of *network* that are not in its parts *without*."""
    key = hashlib.sha256(text.encode())
    for name, tensor in network.state_dict().items():
        if not is_in(name, *without):
            key.update(name.encode() + tensor.detach().numpy().tobytes())
    return key.hexdigest()
