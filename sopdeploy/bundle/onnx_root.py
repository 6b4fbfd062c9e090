"""Merkle root of an ONNX graph, read from the bytes of the file without the onnx package.

The export records the root of `model.onnx`, and `sopdeploy verify` recomputes it on machines that have only
a runtime. The hash of a node covers its operator, its attributes and the hashes of its operands in order. The
hash of a constant covers dtype, shape and content, the hash of an input its position and type. Names,
documentation and unused nodes have no effect. Field numbers are those of onnx.proto; the file is read in the
deterministic serialization that the export writes. Where a runtime could read another value than this reader
does (names defined twice, sparse weights, attributes with two values, field numbers that overflow), the file
has no root.
"""

import hashlib
import json
from typing import Any

import numpy as np

from sopdeploy.bundle.folder import Bundle
from sopdeploy.errors import BundleError, CertificateError

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types of Protocol Buffers
GRAPH, OPSET, FUNCTION = 7, 8, 25  # fields of ModelProto
NODE, INITIALIZER, INPUT, OUTPUT, SPARSE = 1, 5, 11, 12, 15  # fields of GraphProto
OPERAND, RESULT, OPERATOR, ATTRIBUTE, DOMAIN = 1, 2, 4, 5, 7  # fields of NodeProto
LABEL, TENSOR, SUBGRAPH, SUBGRAPHS, DOCUMENTATION, TYPE = 1, 5, 6, 11, 13, 20  # fields of AttributeProto
TENSOR_TYPE = 4  # the TYPE of an attribute that holds a TENSOR
DIMS, DTYPE, FLOATS, INT32S, INT64S, NAME, RAW, DOUBLES, UINT64S = 1, 2, 4, 5, 7, 8, 9, 10, 11
LOCATION = 14  # like the line above, fields of TensorProto
NO_DOCUMENTATION = b"\x6a\x00"  # an empty `doc_string`
# Bytes per number of the dtypes that TensorProto stores as varints.
ITEM_BYTES = {2: 1, 3: 1, 4: 2, 5: 2, 6: 4, 7: 8, 9: 1, 10: 2, 12: 4, 13: 8, 16: 2}


def hash_parts(*parts: str | bytes | memoryview) -> str:
    """Compute the sha256 of *parts*, each preceded by its length, so that different lists never collide."""
    digest = hashlib.sha256()
    for part in parts:
        content = part.encode() if isinstance(part, str) else part
        digest.update(f"{len(content)}:".encode())
        digest.update(content)
    return digest.hexdigest()


def onnx_file_root(content: bytes | memoryview) -> str:
    """Compute the root of the ONNX model in *content*, as a hexadecimal sha256.

    Raises `CertificateError` if *content* is not an ONNX model, keeps weights outside the file, holds a
    subgraph (control flow), or can be read in two ways.
    """
    try:
        model = _Message(memoryview(content))
        (graph,) = model.messages(GRAPH)
        if FUNCTION in model.values:
            raise CertificateError("the model defines its own operators; only those of ONNX are allowed")
        opsets = [f"{opset.text(1)} {opset.number(2)}" for opset in model.messages(OPSET)]
        return hash_parts(*sorted(opsets), *_output_hashes(graph))
    except (ValueError, IndexError, KeyError, TypeError) as error:
        raise CertificateError("not a complete ONNX model; its root cannot be computed") from error


class _Message:
    """A message of Protocol Buffers: the values and the raw bytes of each field, by number.

    Raises `ValueError` or `IndexError` if *content* is cut off.
    """

    def __init__(self, content: memoryview) -> None:
        self.values: dict[int, list[int | memoryview]] = {}
        self.raw: list[tuple[int, memoryview]] = []
        position = 0
        while position < len(content):
            start = position
            key, position = _varint(content, position)
            if key >= 2**32:
                raise ValueError("a field number overflows")  # runtimes drop the upper bits
            number, wire = key >> 3, key & 7
            if wire == VARINT:
                value: int | memoryview
                value, position = _varint(content, position)
            else:
                length = {FIXED64: 8, FIXED32: 4}.get(wire)
                if wire == BYTES:
                    length, position = _varint(content, position)
                if length is None or position + length > len(content):
                    raise ValueError("a field is cut off")
                value = content[position : position + length]
                position += length
            self.values.setdefault(number, []).append(value)
            self.raw.append((number, content[start:position]))

    def blobs(self, *numbers: int) -> list[memoryview]:
        """List the values of the fields *numbers* as bytes."""
        found = [value for number in numbers for value in self.values.get(number, [])]
        return [value if isinstance(value, memoryview) else memoryview(b"") for value in found]

    def messages(self, number: int) -> list["_Message"]:
        """Parse the values of field *number* as messages."""
        return [_Message(blob) for blob in self.blobs(number)]

    def text(self, number: int) -> str:
        """Decode the value of field *number*; empty if it is not set, `ValueError` if it is set twice."""
        (blob,) = self.blobs(number) or [memoryview(b"")]
        return bytes(blob).decode()

    def integers(self, *numbers: int) -> list[int]:
        """List the signed 64-bit integers of the fields *numbers*, in packed or repeated encoding."""
        found: list[int] = []
        for value in (value for number in numbers for value in self.values.get(number, [])):
            position = 0
            if isinstance(value, int):
                found.append(value)
                continue
            while position < len(value):
                integer, position = _varint(value, position)
                found.append(integer)
        return [value - 2**64 if value >= 2**63 else value for value in found]

    def number(self, number: int) -> int:
        """Read the integer of field *number*; 0 if it is not set, `ValueError` if it is set twice."""
        (integer,) = self.integers(number) or [0]
        return integer


def _varint(content: memoryview, position: int) -> tuple[int, int]:
    """Read the varint at *position*; return its value and the position after it."""
    value = shift = 0
    while shift < 70:  # ten bytes hold 64 bits
        byte = content[position]
        value |= (byte & 127) << shift
        position, shift = position + 1, shift + 7
        if byte < 128:
            return value, position
    raise ValueError("a number is longer than 64 bits")


def _output_hashes(graph: _Message) -> list[str]:
    """Hash every value of *graph* in topological order; return the hashes of its outputs."""
    hashes: dict[str, str] = {}

    def define(name: str, value_hash: str) -> None:
        if name in hashes:  # runtimes differ in which definition they use
            raise CertificateError(f"{name!r} is defined twice")
        hashes[name] = value_hash

    if SPARSE in graph.values:
        raise CertificateError("the graph has sparse weights, which may replace others")
    for position, value in enumerate(graph.messages(INPUT)):
        define(value.text(1), hash_parts(f"input {position}", b"".join(value.blobs(2))))
    for tensor in graph.messages(INITIALIZER):
        define(tensor.text(NAME), _tensor_hash(tensor))
    for node in graph.messages(NODE):
        operator = node.text(OPERATOR)
        parts: list[str | bytes] = [node.text(DOMAIN), operator]
        for attribute in sorted(node.messages(ATTRIBUTE), key=lambda attribute: attribute.text(1)):
            parts += [attribute.text(1), _attribute_content(attribute, operator)]
        operands = [bytes(name).decode() for name in node.blobs(OPERAND)]
        parts += [hashes[name] if name else "absent" for name in operands]
        node_hash = hash_parts(*parts)
        for position, name in enumerate(node.blobs(RESULT)):
            if name:  # an optional result that is absent has no name
                define(bytes(name).decode(), hash_parts(node_hash, str(position)))
    return [hashes[value.text(1)] for value in graph.messages(OUTPUT)]


def _attribute_content(attribute: _Message, operator: str) -> str | bytes:
    """Return the bytes of *attribute* without its documentation, or the hash of its tensor."""
    if attribute.values.keys() & {SUBGRAPH, SUBGRAPHS}:
        raise CertificateError(f"{operator} contains a subgraph; control flow is not allowed")
    if TENSOR in attribute.values:
        (tensor,) = attribute.messages(TENSOR)
        others = attribute.values.keys() - {LABEL, TENSOR, TYPE, DOCUMENTATION}
        if others or attribute.number(TYPE) != TENSOR_TYPE:
            raise CertificateError(f"an attribute of {operator} has a tensor and another value")
        return _tensor_hash(tensor)
    before = b"".join(raw for number, raw in attribute.raw if number < DOCUMENTATION)
    after = b"".join(raw for number, raw in attribute.raw if number > DOCUMENTATION)
    return before + NO_DOCUMENTATION + after


def _tensor_hash(tensor: _Message) -> str:
    """Hash dtype, shape and little-endian content of a tensor, independent of the field that stores it."""
    shape, dtype = tuple(tensor.integers(DIMS)), tensor.number(DTYPE)
    if tensor.number(LOCATION):
        raise CertificateError(f"the weight {tensor.text(NAME)} is stored in another file")
    if RAW in tensor.values:
        (content,) = tensor.blobs(RAW)
        return hash_parts(f"constant {dtype} {shape}", content)
    numbers = tensor.integers(INT32S, INT64S, UINT64S)
    if numbers:
        unsigned = np.array([number % 2**64 for number in numbers], np.uint64)
        content = memoryview(unsigned.astype(f"<u{ITEM_BYTES[dtype]}").tobytes())
    else:
        content = memoryview(b"".join(tensor.blobs(FLOATS, DOUBLES)))
    if not content and 0 not in shape:
        raise CertificateError(f"the weight {tensor.text(NAME)} has no values")
    return hash_parts(f"constant {dtype} {shape}", content)


def check_roots(bundle: Bundle) -> str:
    """Recompute the root of `model.onnx`, compare it with the manifest and the certificate, and return it.

    The certificate holds the root of the graph before rewrite rules and casts. So it is compared with the
    file only if `lowering.json` lists no rule and the precision is float32; otherwise the roots of the
    captured program link the three files. Raises `BundleError` that names the file with another root.
    """
    path, manifest = bundle.path, bundle.manifest
    lineage, advice = manifest.lineage, "export the bundle again"
    try:
        root = onnx_file_root(bundle.onnx.read_bytes())
    except CertificateError as error:
        raise BundleError(f"{bundle.onnx}: {error}; {advice}") from error
    if root != lineage.onnx_root:
        raise BundleError(
            f"{bundle.onnx}: its graph has the root {root[:16]}, the manifest says {lineage.onnx_root[:16]}; "
            f"the graph was replaced after the export: {advice}"
        )
    names = [name for name in ("certificate.json", "lowering.json") if name in manifest.files]
    roots: dict[str, dict[str, Any]] = {}
    for name in names:
        try:
            content = json.loads((path / name).read_bytes())
            roots[name] = content["roots"] if name == "certificate.json" else content
            program = roots[name]["any_batch" if name == "certificate.json" else "certified_root"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise BundleError(f"{path / name}: contains no graph roots; {advice}") from error
        if program != lineage.program_root:
            raise BundleError(f"{path / name}: belongs to another network than the manifest; {advice}")
    lowering = roots.get("lowering.json", {})
    rewritten = bool(lowering.get("rules")) or lowering.get("lowered_root") != lowering.get("certified_root")
    if manifest.precision == "fp32" and not rewritten and roots["certificate.json"].get("onnx") != root:
        raise BundleError(f"{path / 'certificate.json'}: certifies another graph than model.onnx; {advice}")
    return root
