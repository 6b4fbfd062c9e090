"""The Merkle root of an ONNX graph, so that a certificate can be checked on the file that ships.

As `program_root`, one level down: nodes by operator, attributes and ordered operands, initializers by type,
shape and content, inputs by position, type and shape. Value names and metadata do not count.
"""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import onnx
from onnx import numpy_helper

from sopdeploy.errors import CertificateError


def file_root(path: Path) -> str:
    """Return the root of the graph in the ONNX file at *path*."""
    return onnx_root(onnx.load(path))


def onnx_root(model: onnx.ModelProto) -> str:
    """Return the Merkle root of *model*'s graph, as hexadecimal sha256."""
    hashes = {}
    for position, value in enumerate(model.graph.input):
        hashes[value.name] = hash_of(f"input {position}", value.type.SerializeToString(deterministic=True))
    for tensor in model.graph.initializer:
        hashes[tensor.name] = initializer_hash(tensor)
    walk = OnnxWalk(hashes=hashes)
    for node in model.graph.node:
        walk.add(node)
    opsets = sorted(f"{opset.domain} {opset.version}" for opset in model.opset_import)
    outputs = [walk.hashes[value.name] for value in model.graph.output]
    return hash_of(*opsets, *outputs)


def initializer_hash(tensor: onnx.TensorProto) -> str:
    """Return the hash of a constant by type, shape and content."""
    content = numpy_helper.to_array(tensor)
    return hash_of(f"constant {tensor.data_type} {tuple(tensor.dims)}", content.tobytes())


def hash_of(*parts: str | bytes) -> str:
    """Return the sha256 over *parts*, each with its length."""
    digest = hashlib.sha256()
    for part in parts:
        raw = part.encode() if isinstance(part, str) else part
        digest.update(f"{len(raw)}:".encode())
        digest.update(raw)
    return digest.hexdigest()


@dataclass(kw_only=True, slots=True)
class OnnxWalk:
    """Hashes of the values of a graph whose nodes come in the order of computing."""

    hashes: dict[str, str] = field(default_factory=dict)

    def add(self, node: onnx.NodeProto) -> None:
        """Hash *node* and name the hashes of its outputs."""
        parts: list[str | bytes] = [node.domain, node.op_type]
        for attribute in sorted(node.attribute, key=lambda a: a.name):
            if attribute.type in {onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS}:
                raise CertificateError(f"{node.op_type} holds a graph of its own; no control flow may ship")
            parts += [attribute.name, attribute_bytes(attribute)]
        parts += [self.hashes[name] if name else "absent" for name in node.input]
        own = hash_of(*parts)
        for position, name in enumerate(node.output):
            self.hashes[name] = hash_of(own, str(position))


def attribute_bytes(attribute: onnx.AttributeProto) -> bytes:
    """Return the bytes of an attribute's value, a tensor by content."""
    if attribute.type == onnx.AttributeProto.TENSOR:
        return initializer_hash(attribute.t).encode()
    plain = onnx.AttributeProto()
    plain.CopyFrom(attribute)
    plain.doc_string = ""
    raw: bytes = plain.SerializeToString(deterministic=True)
    return raw
