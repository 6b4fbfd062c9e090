"""Store the graph before the rewrite rules in a bundle, and replay the rules in `sopdeploy verify`.

`source.onnx.gz` is that graph. A weight that `model.onnx` also contains, with the same type, shape and bytes,
is stored without its bytes and with the name that it has there, so the file is small: it holds the operators
and the weights that a rule folded. A replay needs the packages onnx, onnx_ir and onnxscript, but no torch.

The chain that a replay closes: the root of the certificate is that of the source; the applications in
`lowering.json` turn the source into a graph whose root is that of `model.onnx`. For fp16 and bf16, the source
is the network after its conversion, and only parity links it to the certificate. For int8, the rules made the
graph that was quantized, and nothing is replayed.
"""

import gzip
import json
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from sopdeploy.bundle.folder import Bundle
from sopdeploy.bundle.onnx_root import onnx_root
from sopdeploy.errors import BundleError, CertificateError, LoweringError
from sopdeploy_export.rewrites.apply import LoweringReport, reapply

SOURCE = "source.onnx.gz"
MORE_BYTES = 2**24  # of a source than twice model.onnx: its operators, and weights that a rule folded
MOST_RULES = 10_000


def write_source(folder: Path, source: onnx.ModelProto, exported: onnx.ModelProto) -> None:
    """Write *source* into *folder*, without the weights that *exported* contains.

    The `doc_string` of such a weight is its name in *exported*, where `_read` finds it.
    """
    exported_names = {_key(tensor): tensor.name for tensor in exported.graph.initializer}
    stored = onnx.ModelProto()
    stored.CopyFrom(source)
    for tensor in stored.graph.initializer:
        name = exported_names.get(_key(tensor))
        if name is not None and tensor.raw_data:
            tensor.ClearField("raw_data")
            tensor.doc_string = name
    content = stored.SerializeToString(deterministic=True)
    (folder / SOURCE).write_bytes(gzip.compress(content, mtime=0))


def _key(tensor: onnx.TensorProto) -> tuple[int, tuple[int, ...], bytes]:
    return tensor.data_type, tuple(tensor.dims), tensor.raw_data


def check_lowering(bundle: Bundle) -> str | None:
    """Replay the rewrite rules of *bundle*; return the result as a sentence, None without a source graph.

    Raises `BundleError` if the source is not the certified graph, if a rule does not match, or if the result
    is not `model.onnx`.
    """
    path, advice = bundle.path / SOURCE, "export the bundle again"
    if SOURCE not in bundle.manifest.files:
        return None
    try:
        report = LoweringReport.model_validate_json((bundle.path / "lowering.json").read_bytes())
        certified_root = json.loads((bundle.path / "certificate.json").read_bytes())["roots"]["onnx"]
        source = _read(path, bundle.onnx.read_bytes())
        if len(report.rules) > min(MOST_RULES, len(source.graph.node)):
            raise LoweringError(f"{len(report.rules)} rewrites are more than its operators")
        source_root = onnx_root(source)
        lowered_root = onnx_root(reapply(source, report.rules))
    except (KeyError, TypeError, ValueError, OSError, EOFError, DecodeError) as error:
        raise BundleError(f"{path}: cannot be read, or belongs to another bundle; {advice}") from error
    except (CertificateError, LoweringError) as error:
        raise BundleError(f"{path}: {error}; {advice}") from error
    is_converted = bundle.manifest.precision != "fp32"  # the certified graph is in float32
    if source_root != report.source_onnx_root or (not is_converted and source_root != certified_root):
        raise BundleError(f"{path}: is not the certified graph; {advice}")
    if lowered_root != bundle.manifest.lineage.onnx_root:
        raise BundleError(f"{path}: {len(report.rules)} rewrite rules do not give model.onnx; {advice}")
    source_graph = f"the {bundle.manifest.precision} graph" if is_converted else "the certified graph"
    return f"{len(report.rules)} rewrite rules, replayed on {source_graph}, give model.onnx"


def _read(path: Path, exported: bytes) -> onnx.ModelProto:
    """Read the source graph at *path*, with weights from *exported*, the content of model.onnx.

    A tensor of both graphs is stored once; in the source, its `doc_string` is its name in *exported*.
    """
    limit = 2 * len(exported) + MORE_BYTES
    with gzip.open(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise LoweringError(f"expands to more than {limit:,} bytes")
    source = onnx.load_from_string(content)
    exported_weights = {tensor.name: tensor for tensor in onnx.load_from_string(exported).graph.initializer}
    for tensor in source.graph.initializer:
        if tensor.doc_string:
            weight = exported_weights[tensor.doc_string]
            if weight.data_type != tensor.data_type or weight.dims != tensor.dims:
                raise ValueError(tensor.name)
            tensor.raw_data, tensor.doc_string = weight.raw_data, ""
    return source
