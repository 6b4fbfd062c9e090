"""Cache graphs and proofs of small networks within a test process; tests modify copies.

A certificate captures a network six times and converts it three times. Tests of later steps use this cache.
Other tests check that another capture gives the same bytes.
"""

import copy
import functools
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import onnx
import pytest
from torch import Tensor, nn
from torch.export import ExportedProgram

from sopdeploy.backbones.base import Backbone
from sopdeploy.bundle.manifest import BatchRange
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.models.base import Classifier
from sopdeploy_export import pipeline
from sopdeploy_export.graph import capture_any_batch, lower
from sopdeploy_export.proof import certificate
from sopdeploy_export.proof.certificate import Certificate, Proof

PROOFS: dict[str, Proof] = {}
LOWERED: dict[str, tuple[onnx.ModelProto, Certificate]] = {}
BATCH = BatchRange(optimum=4, maximum=9)  # one range for all, because each range needs a capture
ALONE = BatchRange(optimum=1, maximum=1)  # captured once instead of twice


class Graph(NamedTuple):
    """A network, its program and its ONNX graph."""

    network: Classifier
    program: ExportedProgram
    model: onnx.ModelProto


def graph_of(name: str, preprocess: Preprocess, **config: Any) -> Graph:
    """Capture the network that `conftest.trained` builds for `BATCH` and convert it."""
    graph = _graph_of(name, preprocess, tuple(sorted(config.items())))
    return graph._replace(model=_copy(graph.model))


@functools.cache
def _graph_of(name: str, preprocess: Preprocess, config: tuple[Any, ...]) -> Graph:
    from tests.export.conftest import trained

    network = trained(name, **dict(config))
    program = capture_any_batch(network, preprocess, BATCH)
    return Graph(network, program, lower(program, network.outputs))


def _copy(model: onnx.ModelProto) -> onnx.ModelProto:
    other = onnx.ModelProto()
    other.CopyFrom(model)
    return other


@contextmanager
def proving_once(*, changes_program: bool = False) -> Iterator[None]:
    """Make exports reuse the proof of a network with the same weights and images.

    An export that *changes_program*, such as that of `network.pt2`, gets a copy.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "certify", partial(certify, copied=changes_program))
        patch.setattr(pipeline, "lower_with_proof", _lower_with_proof)
        yield


def certify(
    trained: Classifier,
    lean: Backbone,
    preprocess: Preprocess,
    probes: Tensor,
    *,
    copied: bool = False,
    **options: Any,
) -> Proof:
    """Prove as `certificate.certify` does, once for each set of arguments."""
    arguments = (
        trained.config,
        trained.outputs,
        preprocess,
        sorted((name, value) for name, value in options.items() if name != "detachment"),
        probes.numpy().tobytes(),
    )
    key = digest(repr(arguments), trained, lean)
    if key not in PROOFS:
        PROOFS[key] = certificate.certify(trained, lean, preprocess, probes, **options)
    return copy.deepcopy(PROOFS[key]) if copied else PROOFS[key]


def digest(text: str, *networks: nn.Module) -> str:
    """Hash *text* and all tensors of *networks*."""
    key = hashlib.sha256(text.encode())
    for network in networks:
        for name, tensor in network.state_dict().items():
            key.update(name.encode() + tensor.detach().numpy().tobytes())
    return key.hexdigest()


def _lower_with_proof(proof: Proof, outputs: tuple[str, ...]) -> tuple[onnx.ModelProto, Certificate]:
    key = proof.certificate.model_dump_json()
    if key not in LOWERED:
        LOWERED[key] = certificate.lower_with_proof(proof, outputs)
    model, certified = LOWERED[key]
    return _copy(model), certified
