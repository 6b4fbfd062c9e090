"""Graphs and proofs of small networks, made once in a process: what a test changes is a copy.

A network is captured six times and lowered three times where an export proves it. A test of what comes after
the proof takes it from here; that a proof repeated gives the same bytes is for those that repeat it.
"""

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
from sopdeploy_export.graph.onnx_export import lower
from sopdeploy_export.graph.torch_export import capture_any_batch
from sopdeploy_export.proof import certificate
from sopdeploy_export.proof.certificate import Certificate, Proof

lower_honestly = pipeline.lower_with_proof
PROOFS: dict[str, Proof] = {}
LOWERED: dict[int, tuple[onnx.ModelProto, Certificate]] = {}


class Graph(NamedTuple):
    """A network, the program that was captured of it, and its ONNX graph."""

    network: Classifier
    program: ExportedProgram
    model: onnx.ModelProto


def graph_of(name: str, preprocess: Preprocess, batch: BatchRange, **config: Any) -> Graph:
    """Return the graphs of the network that `trained` makes, for every batch of the range."""
    found = captured(name, preprocess, batch, tuple(sorted(config.items())))
    return found._replace(model=copied(found.model))


@functools.cache
def captured(name: str, preprocess: Preprocess, batch: BatchRange, config: tuple[Any, ...]) -> Graph:
    from tests.export.conftest import trained

    network = trained(name, **dict(config))
    program = capture_any_batch(network, preprocess, batch)
    return Graph(network, program, lower(program, network.outputs))


def copied(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


@contextmanager
def proving_once(apart: str = "") -> Iterator[None]:
    """Within it an export takes the proof of a network proved before with the same weights and images.

    What changes the program that was proved, as the writing of `network.pt2` does, keeps its proofs *apart*.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "certify", partial(certify, apart=apart))
        patch.setattr(pipeline, "lower_with_proof", lower_with_proof)
        yield


def certify(
    trained: Classifier,
    lean: Backbone,
    preprocess: Preprocess,
    probes: Tensor,
    *,
    apart: str = "",
    **options: Any,
) -> Proof:
    """Return the certificate's proof, kept for the bits that it is about."""
    said = (apart, trained.config, preprocess, sorted(options.items()), probes.numpy().tobytes())
    known = bits(repr(said), trained, lean)
    if known not in PROOFS:
        PROOFS[known] = certificate.certify(trained, lean, preprocess, probes, **options)
    return PROOFS[known]


def bits(said: str, *networks: nn.Module) -> str:
    """Return a hash of what is *said* of the *networks* and of all their tensors."""
    key = hashlib.sha256(said.encode())
    for network in networks:
        for name, tensor in network.state_dict().items():
            key.update(name.encode() + tensor.detach().numpy().tobytes())
    return key.hexdigest()


def lower_with_proof(proof: Proof, outputs: tuple[str, ...]) -> tuple[onnx.ModelProto, Certificate]:
    """Return a copy of the graph that was lowered of *proof*, and its certificate."""
    if id(proof) not in LOWERED:
        LOWERED[id(proof)] = lower_honestly(proof, outputs)
    model, certified = LOWERED[id(proof)]
    return copied(model), certified
