"""A Merkle hash over an ONNX graph, to check a certificate against a file.

Like `graph_hash`, one level down: nodes count by operator, attributes and ordered operands, initializers by
type, shape and content, inputs by position, type and shape. Value names and metadata do not count.
"""

import hashlib
from pathlib import Path

import onnx
from onnx import numpy_helper

from sopdeploy.errors import CertificateError


def file_root(path: Path) -> str:
    """Compute the Merkle root of the graph in the ONNX file at *path*."""
    return onnx_root(onnx.load(path))


def onnx_root(model: onnx.ModelProto) -> str:
    """Compute the Merkle root of the graph of *model* as a hexadecimal sha256.

    Raises `CertificateError` if a node holds a subgraph (control flow).
    """
    hashes = {}  # of each value, by name
    for position, value in enumerate(model.graph.input):
        hashes[value.name] = _hash(f"input {position}", value.type.SerializeToString(deterministic=True))
    for tensor in model.graph.initializer:
        hashes[tensor.name] = _initializer_hash(tensor)
    for node in model.graph.node:  # in topological order
        parts: list[str | bytes] = [node.domain, node.op_type]
        for attribute in sorted(node.attribute, key=lambda a: a.name):
            if attribute.type in {onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS}:
                raise CertificateError(f"{node.op_type} contains a subgraph; control flow is not allowed")
            parts += [attribute.name, _attribute_bytes(attribute)]
        parts += [hashes[name] if name else "absent" for name in node.input]
        node_hash = _hash(*parts)
        for position, name in enumerate(node.output):
            hashes[name] = _hash(node_hash, str(position))
    opsets = sorted(f"{opset.domain} {opset.version}" for opset in model.opset_import)
    return _hash(*opsets, *(hashes[value.name] for value in model.graph.output))


def _initializer_hash(tensor: onnx.TensorProto) -> str:
    content = numpy_helper.to_array(tensor).tobytes()
    return _hash(f"constant {tensor.data_type} {tuple(tensor.dims)}", content)


def _attribute_bytes(attribute: onnx.AttributeProto) -> bytes:
    if attribute.type == onnx.AttributeProto.TENSOR:
        return _initializer_hash(attribute.t).encode()
    plain = onnx.AttributeProto()
    plain.CopyFrom(attribute)
    plain.doc_string = ""
    raw: bytes = plain.SerializeToString(deterministic=True)
    return raw


def _hash(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:  # each with its length, so that no two lists of parts have the same bytes
        raw = part.encode() if isinstance(part, str) else part
        digest.update(f"{len(raw)}:".encode())
        digest.update(raw)
    return digest.hexdigest()
