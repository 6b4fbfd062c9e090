"""Merkle root of an ONNX graph, and its check in `sopdeploy verify`.

The export records the root of `model.onnx`. The hash of a node covers its operator, its
attributes and the hashes of its operands in order. The hash of a constant covers dtype, shape
and content, the hash of an input its position and type. Names, documentation and unused nodes
have no effect. A file has a root only if every reader finds the same model in it: it is the
deterministic serialization of what the `onnx` package reads, and the graph defines each name
once. `verify` recomputes the root where `onnx` is installed.

The weights of a graph above 2 GB are in a file of their own, which holds nothing else. Their
hashes are those of constants in the graph, so the root does not depend on where they are stored.
"""

import hashlib
import math
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from sopdeploy.base.config import parse_json, shown, version_advice
from sopdeploy.base.environment import import_optional
from sopdeploy.base.files import GRAPH, GRAPH_DATA
from sopdeploy.bundle.folder import Bundle
from sopdeploy.bundle.manifest import CERTIFICATE, PROOFS, TensorRecord, to_json
from sopdeploy.errors import BundleError, CertificateError, MissingPackageError

if TYPE_CHECKING:
    import onnx

_NUMBERS = {"raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data"}
# Fields of a certificate that are compared
CERTIFIED = (
    "sha256", "contents", "proof", "precision", "compared", "detached", "removed", "mixes_images", "roots",
)  # fmt: skip
# of the program, of model.onnx, of the float32 graph
CERTIFIED_ROOTS = ("any_batch", "shipped", "onnx")
ADVICE = "export the bundle again"
SUBGRAPHS = {"g", "graphs"}
TENSOR_ATTRIBUTE = 4  # AttributeProto.TENSOR
EXTERNAL = 1  # TensorProto.EXTERNAL
ALIGNMENT = 64  # bytes, of a weight in a file of weights
NO_WEIGHTS = memoryview(b"")


def hash_parts(*parts: str | bytes | memoryview) -> str:
    """Compute the sha256 of *parts*, each preceded by its length, so that different lists never collide.

    The Merkle roots of captured programs and of ONNX graphs are built from it.
    """
    digest = hashlib.sha256()
    for part in parts:
        content = part.encode() if isinstance(part, str) else part
        digest.update(f"{len(content)}:".encode())
        digest.update(content)
    return digest.hexdigest()


def read_model(
    content: bytes, weights: memoryview = NO_WEIGHTS
) -> tuple["onnx.ModelProto", str]:
    """Read the ONNX model in *content* and compute its root, a hexadecimal sha256.

    *weights* are the content of the file of its weights, if they are in one. Raises
    `CertificateError` if *content* is not an ONNX model or can be read in two ways.
    """
    import onnx  # noqa: PLC0415 # a server runs without it
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped] # noqa: PLC0415

    model = onnx.ModelProto()
    try:
        model.ParseFromString(content)
        model.DiscardUnknownFields()
        if model.SerializeToString(deterministic=True) != content:
            raise CertificateError(
                "the file has unknown or repeated fields, which a runtime may "
                "read in another way"
            )
        return model, onnx_root(model, weights)
    # A `CertificateError` is none of these, so it is not converted.
    except (DecodeError, ValueError, KeyError, TypeError) as error:
        raise CertificateError(
            "not a complete ONNX model; its graph hash cannot be computed"
        ) from error


def onnx_root(model: "onnx.ModelProto", weights: memoryview = NO_WEIGHTS) -> str:
    """Compute the root of the graph of *model*, with the file of its *weights* as in `read_model`.

    Raises `CertificateError` if the model can be read in two ways, or has operators of its own or
    control flow. An incomplete model raises other types, such as `KeyError`.
    """
    if not model.HasField("graph"):
        raise ValueError("no graph")

    if model.functions:
        raise CertificateError(
            "the model defines its own operators; only ONNX operators are allowed"
        )

    opsets = [f"{opset.domain} {opset.version}" for opset in model.opset_import]
    return hash_parts(*sorted(opsets), *_output_hashes(model.graph, weights))


def _output_hashes(graph: "onnx.GraphProto", weights: memoryview) -> list[str]:
    """Hash every value of *graph* in topological order; return the hashes of its outputs.

    Raises `CertificateError` for what can be read in two ways, such as a name that is defined
    twice, and `KeyError` for a value that nothing defines.
    """
    hashes: dict[str, str] = {}  # by the name of the value

    def define(name: str, value_hash: str) -> None:
        if name in hashes:
            raise CertificateError(f"{name!r} is defined twice")
        hashes[name] = value_hash

    # What other values are computed from: inputs by position, constants by content.
    if graph.sparse_initializer:
        raise CertificateError("the graph has sparse weights, which may replace others")
    for position, value in enumerate(graph.input):
        define(
            value.name,
            hash_parts(f"input {position}", value.type.SerializeToString(deterministic=True)),
        )
    external = read_external(graph, weights)
    for tensor in graph.initializer:
        define(tensor.name, _hash_constant(tensor, external.get(tensor.name)))

    # Nodes by their operator, attributes and operands.
    for node in graph.node:
        parts: list[str | bytes] = [node.domain, node.op_type]
        for attribute in sorted(node.attribute, key=lambda attribute: attribute.name):
            parts += [attribute.name, _hash_or_serialize(attribute, node.op_type)]
        parts += [hashes[name] if name else "absent" for name in node.input]
        node_hash = hash_parts(*parts)
        for position, name in enumerate(node.output):
            if name:  # an optional result that is absent has no name
                define(name, hash_parts(node_hash, str(position)))

    return [hashes[value.name] for value in graph.output]


def read_external(graph: "onnx.GraphProto", weights: memoryview) -> dict[str, memoryview]:
    """Map the names of the constants of a bundle's *graph* that are stored in *weights* to their content.

    Raises `CertificateError` unless they are where `next_offset` says, and *weights* hold nothing else,
    and for a constant of an unknown type.
    """
    external: dict[str, memoryview] = {}
    end = 0  # of those before

    for tensor in graph.initializer:
        if not (tensor.data_location or tensor.external_data):
            continue
        entries = [(entry.key, entry.value) for entry in tensor.external_data]
        if ("location", GRAPH_DATA) not in entries:
            raise CertificateError(f"the weight {tensor.name} is stored in another file")
        if weights is NO_WEIGHTS:
            raise CertificateError(f"the bundle has no {GRAPH_DATA}, which has {tensor.name}")

        start = next_offset(end)
        size = num_bytes_of(tensor)
        place = [("location", GRAPH_DATA), ("offset", str(start)), ("length", str(size))]
        if size < 0 or entries != place or tensor.data_location != EXTERNAL:
            raise CertificateError(
                f"the weight {tensor.name} is not at its place in {GRAPH_DATA}"
            )
        if start + size > len(weights):
            raise CertificateError(f"{GRAPH_DATA} ends before the weight {tensor.name}")
        if any(weights[end:start]):
            raise CertificateError(
                f"{GRAPH_DATA} has bytes other than 0 before the weight {tensor.name}"
            )
        external[tensor.name] = weights[start : start + size]
        end = start + size

    if end != len(weights):
        raise CertificateError(
            f"{GRAPH_DATA} has {len(weights) - end} bytes that are not weights"
        )
    return external


def weights_beside(bundle: Bundle, graph: "onnx.GraphProto") -> dict[str, memoryview]:
    """Map the names of the constants of *graph*, that of *bundle*, in the file of its weights to their content.

    Raises `BundleError` if this file does not fit the graph.
    """
    weights = NO_WEIGHTS if bundle.weights is None else bundle.weights.view()
    try:
        return read_external(graph, weights)
    except CertificateError as error:
        raise BundleError(f"{bundle.path / GRAPH}: {error}; {ADVICE}") from error


def next_offset(end: int) -> int:
    """Return where a weight begins in a bundle's file of weights if the one before it ends at *end*.

    The weights are in the order of the graph, and zeros lie between them.
    """
    return -(-end // ALIGNMENT) * ALIGNMENT


def num_bytes_of(tensor: "onnx.TensorProto") -> int:
    """Return the size in bytes of the constant *tensor* of a bundle's graph; raises `CertificateError`."""
    from onnx import helper  # noqa: PLC0415 # a server runs without it

    try:
        dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    except KeyError as error:
        raise CertificateError(f"the weight {tensor.name} has an unknown type") from error
    return math.prod(tensor.dims) * dtype.itemsize


def _hash_or_serialize(attribute: "onnx.AttributeProto", operator: str) -> str | bytes:
    """Return the hash of the tensor of *attribute*, or the serialized attribute without documentation."""
    fields = {field.name for field, _ in attribute.ListFields()}
    if fields & SUBGRAPHS:
        raise CertificateError(f"{operator} contains a subgraph; control flow is not allowed")

    if "t" in fields:
        if fields - {"name", "t", "type", "doc_string"} or attribute.type != TENSOR_ATTRIBUTE:
            raise CertificateError(f"an attribute of {operator} has a tensor and another value")
        return _hash_constant(attribute.t, None)

    undocumented = type(attribute)()
    undocumented.CopyFrom(attribute)
    undocumented.doc_string = ""
    return undocumented.SerializeToString(deterministic=True)


def _hash_constant(tensor: "onnx.TensorProto", external: memoryview | None) -> str:
    """Hash dtype, shape and little-endian content of *tensor*, independent of where it is stored.

    *external* is its content if that is in the file of the weights.
    """
    from onnx import numpy_helper  # noqa: PLC0415 # a server runs without it

    if external is None and (tensor.data_location or tensor.external_data):
        raise CertificateError(f"the weight {tensor.name} is stored in another file")
    if tensor.string_data:
        raise CertificateError(f"the constant {tensor.name} contains text instead of numbers")

    shape = tuple(tensor.dims)
    storing_fields = _NUMBERS.intersection(field.name for field, _ in tensor.ListFields())
    if len(storing_fields) + (external is not None) > 1:
        raise CertificateError(f"the weight {tensor.name} is stored twice")
    if not storing_fields and external is None and 0 not in shape:
        raise CertificateError(f"the weight {tensor.name} has no values")

    content = numpy_helper.to_array(tensor).tobytes() if external is None else external
    return hash_parts(f"constant {tensor.data_type} {shape}", content)


def check_graph_and_certificate(bundle: Bundle) -> str | None:
    """Compare the graph of *bundle*, its manifest, its certificate and its reports.

    Returns the root of `model.onnx`. If `onnx` is not installed, the result is None, and the
    first of these points is not checked. Raises `MissingPackageError` if it is installed, but
    cannot be loaded. All of this must hold:

    - `model.onnx` has the root, the opset, the inputs and the outputs in the manifest;
    - the certificate is as it was written, and names this graph, this manifest and all other files;
    - its networks, its temperature, `parity.json` and `precision.json` fit the manifest.

    Raises `BundleError` naming the file that does not fit.
    """
    root = _check_graph(bundle) if find_spec("onnx") is not None else None
    check_certificate(bundle)

    # The reports must be about the precision of the manifest.
    for name in ("parity.json", "precision.json"):
        precision = _read_fields(bundle, name).get("precision")
        if precision != bundle.manifest.precision:
            problem = f"is about the precision {precision}, but the manifest says {bundle.manifest.precision}"
            raise BundleError(f"{bundle.path / name}: {problem}; {ADVICE}")

    return root


def _check_graph(bundle: Bundle) -> str:
    """Return the root of the graph of *bundle*; raise `BundleError` unless the manifest names it."""
    import_optional("onnx", "onnx", ".[train]", MissingPackageError)
    expected_root = bundle.manifest.lineage.onnx_root
    try:
        weights = NO_WEIGHTS if bundle.weights is None else bundle.weights.view()
        model, root = read_model(bundle.onnx.read(), weights)
    except CertificateError as error:
        raise BundleError(f"{bundle.path / GRAPH}: {error}; {ADVICE}") from error
    _check_interface(bundle, model)

    if root != expected_root:
        raise BundleError(
            f"{bundle.path / GRAPH}: its graph has the hash {root[:16]}, but the "
            f"manifest says {expected_root[:16]}; the graph was replaced after the "
            f"export: {ADVICE}"
        )
    return root


def check_certificate(bundle: Bundle) -> None:
    """Raise `BundleError` unless the certificate of *bundle* is unchanged and certifies this bundle."""
    manifest = bundle.manifest
    path = bundle.path / CERTIFICATE
    certificate = _read_fields(bundle, CERTIFICATE)

    # Bundles of earlier versions prove less; their certificates have fewer fields.
    roots = certificate.get("roots")
    missing = [name for name in CERTIFIED if name not in certificate]
    if isinstance(roots, dict):
        missing += [f"roots.{name}" for name in CERTIFIED_ROOTS if name not in roots]
    if missing:
        problem = (
            f"has no {', '.join(missing)}, like bundles of earlier versions, which proved less"
        )
        raise BundleError(f"{path}: {problem}; {ADVICE} from its checkpoint")

    try:
        program_root, shipped_root, float32_root = (
            certificate["roots"][name] for name in CERTIFIED_ROOTS
        )
        compared = tuple(certificate["compared"])
        detached_parts = tuple(certificate["detached"])
        mixes_images = tuple(certificate["mixes_images"])
        is_known_proof = compared == PROOFS.get(certificate["proof"])
    except (KeyError, TypeError) as error:
        raise BundleError(f"{path}: contains no graph hashes; {ADVICE}") from error

    # It is about this network, and about this graph.
    if program_root != manifest.lineage.program_root or mixes_images != manifest.mixes_images:
        raise BundleError(f"{path}: belongs to another network than the manifest; {ADVICE}")
    is_other_float32 = certificate["precision"] == "fp32" and float32_root != shipped_root
    if shipped_root != manifest.lineage.onnx_root or is_other_float32:
        raise BundleError(f"{path}: certifies another graph than model.onnx; {ADVICE}")

    # It certifies the files of this bundle, and every field of its manifest.
    certified = certificate["precision"], detached_parts, certificate["contents"]
    if certified != (manifest.precision, manifest.detached, manifest.contents_sha256):
        problem = "certifies other files, or another precision, preprocessing or other field of the manifest"
        raise BundleError(f"{path}: {problem}; {ADVICE}")

    _check_scaling(bundle, certificate)

    # Detached parts and the proof of their detachment come together.
    if detached_parts:  # then a network without them is compared; otherwise nothing was removed
        fits_detached = "detached" in compared
    else:
        fits_detached = "detached" not in compared and not certificate["removed"]

    # Its own hash shows a change after the export. With this hash, a proof that is unknown here
    # is that of another version.
    own_sha256 = certificate.pop("sha256")  # of all other fields
    is_unchanged = own_sha256 == hashlib.sha256(to_json(certificate)).hexdigest()
    advice = version_advice(manifest.versions.get("sopdeploy"))

    if is_unchanged and advice and certificate["proof"] not in PROOFS:
        raise BundleError(
            f"{path}: proof: {shown(certificate['proof'])} is unknown here{advice}"
        )

    if not (is_known_proof and fits_detached and is_unchanged):
        raise BundleError(f"{path}: was changed after the export; {ADVICE}")


def _check_scaling(bundle: Bundle, certificate: dict[str, Any]) -> None:
    """Raise `BundleError` unless *certificate* and manifest name the same division of the classifier.

    The tensors that it made must be those that *certificate* lists as kept.
    """
    path = bundle.path / CERTIFICATE
    scaling = bundle.manifest.temperature_scaling
    recorded = None if scaling is None else scaling.model_dump(mode="json")
    if certificate.get("temperature_scaling") != recorded:
        raise BundleError(f"{path}: names another temperature than the manifest; {ADVICE}")
    if scaling is None:
        return

    try:
        hashes = {entry["name"]: entry["sha256"] for entry in certificate["kept"]}
    except (KeyError, TypeError) as error:
        raise BundleError(f"{path}: lists no kept tensors; {ADVICE}") from error
    for tensor in scaling.tensors:
        if hashes.get(tensor.name) != tensor.after:
            problem = f"{tensor.name} is not the result of the division by the temperature"
            raise BundleError(f"{path}: {problem}; {ADVICE}")


def _read_fields(bundle: Bundle, name: str) -> dict[str, Any]:
    """Read the JSON object in the file *name* of *bundle*; raise `BundleError` if it contains none."""
    try:
        fields = parse_json(bundle.contents[name])
        if isinstance(fields, dict):
            return fields
    except ValueError:
        pass
    raise BundleError(f"{bundle.path / name}: contains no JSON object; {ADVICE}")


def _check_interface(bundle: Bundle, model: "onnx.ModelProto") -> None:
    """Raise `BundleError` unless *model* has the opset, inputs and outputs in the manifest of *bundle*."""
    from onnx import helper  # noqa: PLC0415 # a server runs without it

    def fits(value: "onnx.ValueInfoProto", record: TensorRecord) -> bool:
        tensor = value.type.tensor_type

        # 0: the graph states no size. That of the batch, the first one, is not compared.
        sizes = [dimension.dim_value for dimension in tensor.shape.dim]
        return (
            value.name == record.name
            and tensor.elem_type == helper.np_dtype_to_tensor_dtype(np.dtype(record.dtype))
            and len(sizes) == len(record.shape)
            and all(
                size in {0, other}
                for size, other in zip(sizes[1:], record.shape[1:], strict=True)
            )
        )

    graph = model.graph
    manifest = bundle.manifest
    has_interface = [(opset.domain, opset.version) for opset in model.opset_import] == [
        ("", manifest.opset)
    ]

    for values, records in ((graph.input, manifest.inputs), (graph.output, manifest.outputs)):
        has_interface = (
            has_interface and len(values) == len(records) and all(map(fits, values, records))
        )

    if not has_interface:
        raise BundleError(
            f"{bundle.path / GRAPH}: has another opset, other inputs or other outputs than the manifest "
            "says; export the bundle again"
        )
