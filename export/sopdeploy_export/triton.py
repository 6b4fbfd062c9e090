"""Write a Triton model repository from a bundle, or from a `model.onnx` that has left its bundle.

    REPO/<model>-<id>/config.pbtxt, labels.txt, 1/model.onnx, warmup/image

A graph with weights in a file of their own has this file beside it, `1/model.onnx.data`.

Triton batches requests in the sizes that the bundle was verified for, rejects requests that
waited too long, and is ready only after warm-up batches have run.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sopdeploy.base.files import (
    BLOCK_BYTES,
    GRAPH,
    GRAPH_DATA,
    os_reason,
    read_file,
    sha256,
)
from sopdeploy.bundle.folder import Bundle
from sopdeploy.bundle.graph_properties import GraphProperties
from sopdeploy.bundle.manifest import BatchRange, Precision, TensorRecord
from sopdeploy.bundle.probes import read_probes
from sopdeploy.bundle.publication import staging
from sopdeploy.errors import BundleError, first_line

if TYPE_CHECKING:
    import onnx

ONNX_TYPES = {"uint8": 2, "float32": 1, "int64": 7}  # of TensorProto
_ID_DIGITS = 12  # as many as a bundle has in its name
TYPES = {"uint8": "TYPE_UINT8", "float32": "TYPE_FP32", "int64": "TYPE_INT64"}
WARMUP = "image"
MAX_FILE_BYTES = 2**31 - 1  # of a graph, the limit of protobuf
_LABELS = "labels.txt"


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """What Triton has to know of a graph; `path` is for messages.

    `files` are those of the graph in parts, by name, and `warmup` has the bytes of an image.
    `temperature` must divide the logits; 1 if nothing must.
    """

    path: Path
    name: str
    labels: tuple[str, ...]
    inputs: tuple[TensorRecord, ...]
    outputs: tuple[TensorRecord, ...]
    batch: BatchRange
    precision: Precision
    temperature: float
    onnx_sha256: str
    files: Mapping[str, Iterable[bytes]]
    warmup: bytes

    @classmethod
    def of_bundle(cls, bundle: Bundle) -> "Model":
        """Describe the graph of *bundle*."""
        manifest = bundle.manifest
        rules = manifest.rules
        return cls(
            path=bundle.path,
            name=bundle.name,
            labels=bundle.labels,
            inputs=manifest.inputs,
            outputs=manifest.outputs,
            batch=manifest.batch,
            precision=manifest.precision,
            temperature=rules.divisor,
            onnx_sha256=manifest.files[GRAPH].sha256,
            files={name: bundle.blocks(name) for name in manifest.graph_files},
            warmup=read_probes(bundle).images[0].tobytes(),
        )

    @classmethod
    def of_file(cls, path: Path) -> "Model":
        """Describe the graph in the file *path* by its `metadata_props`, with a black image.

        Weights that do not fit into it are beside it. Raises `BundleError` for a graph that the
        export did not write.
        """
        import onnx  # noqa: PLC0415 # takes a second, and a bundle does not need it
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped] # noqa: PLC0415

        try:
            content = read_file(path, MAX_FILE_BYTES)
            graph = onnx.ModelProto.FromString(content)
            texts = {item.key: item.value for item in graph.metadata_props}
            properties = GraphProperties.of_texts(texts)
            inputs, outputs = (
                tuple(map(_record_of, values))
                for values in (graph.graph.input, graph.graph.output)
            )
        except OSError as error:
            raise BundleError(f"{path}: {os_reason(error)}") from error
        except (BundleError, DecodeError, ValueError) as error:
            raise BundleError(
                f"{path}: {first_line(error)}; give a bundle, or the model.onnx of one"
            ) from error

        files: dict[str, Iterable[bytes]] = {GRAPH: [content]}
        weights = path.with_name(GRAPH_DATA)
        if any(tensor.external_data for tensor in graph.graph.initializer):
            if not weights.is_file():
                raise BundleError(
                    f"{path}: its weights are in {GRAPH_DATA}; put it beside the file"
                )
            files[GRAPH_DATA] = _blocks_of(weights)
        digest = hashlib.sha256(content).hexdigest()
        side = properties.preprocess.crop
        return cls(
            path=path,
            name=f"{properties.project}-{digest[:_ID_DIGITS]}",
            labels=properties.labels,
            inputs=inputs,
            outputs=outputs,
            batch=properties.batch,
            precision=properties.precision,
            temperature=properties.temperature,
            onnx_sha256=digest,
            files=files,
            warmup=bytes(side * side * 3),
        )


def write_triton(model: Model, repository: Path) -> Path:
    """Write *model* as a model folder in *repository*, atomically, and return this folder.

    An existing folder with the same content is kept. Raises `BundleError` if it has other
    content, if the graph was not verified for single images, or if a class name has line
    breaks.
    """
    if model.batch.minimum > 1:
        raise BundleError(
            f"{model.path}: was verified for batches of {model.batch.minimum} "
            "or more, but Triton also sends single images; export it with a "
            "minimum batch of 1"
        )

    # Each name is a line. The `.` shows a line break at the end of a name, too.
    broken = [label for label in model.labels if len(f"{label}.".splitlines()) > 1]
    if broken:
        raise BundleError(
            f"{model.path}: the class name {broken[0]!r} does not fit on a line of "
            f"{_LABELS}; rename it"
        )

    # Write a folder, and give it its name when it is complete.
    target = repository / model.name
    with staging(repository) as folder:
        (folder / "1").mkdir()
        (folder / "warmup").mkdir()
        for name, blocks in model.files.items():
            with (folder / "1" / name).open("wb") as file:
                file.writelines(blocks)
        (folder / _LABELS).write_text(
            "".join(f"{label}\n" for label in model.labels), encoding="utf-8"
        )
        (folder / "warmup" / WARMUP).write_bytes(model.warmup)
        (folder / "config.pbtxt").write_text(_model_config(model), encoding="utf-8")
        folder.chmod(0o755)  # `staging` lets the owner only read it

        if not target.exists():
            folder.rename(target)
        elif _file_hashes(target) != _file_hashes(folder):
            raise BundleError(
                f"{target}: exists with other content; remove it or choose another folder"
            )
    return target


def _record_of(value: "onnx.ValueInfoProto") -> TensorRecord:
    """Describe the input or output *value* of a graph; raises `ValueError` for a type that no bundle has."""
    tensor = value.type.tensor_type
    dtypes = {number: name for name, number in ONNX_TYPES.items()}
    return TensorRecord.model_validate(
        {
            "name": value.name,
            "dtype": dtypes.get(tensor.elem_type, "another type"),
            "shape": tuple(side.dim_value or None for side in tensor.shape.dim),
        }
    )


def _blocks_of(path: Path) -> Iterator[bytes]:
    """Read the file *path* in parts."""
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            yield block


def _file_hashes(folder: Path) -> dict[str, str]:
    """Map the path of every file in *folder* to its sha256."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256(path) for path in paths}


CONFIG = """\
name: {name}
backend: "onnxruntime"
max_batch_size: {max_batch}
{tensors}
# On every GPU, or on the CPU; fp32 in the graph stays fp32.
instance_group {{ count: 1 kind: KIND_AUTO }}
optimization {{
  execution_accelerators {{
    gpu_execution_accelerator {{ name: "cuda" parameters {{ key: "use_tf32" value: "0" }} }}
  }}
}}
# By heuristic: a search takes seconds for every new batch size.
parameters {{ key: "cudnn_conv_algo_search" value {{ string_value: "1" }} }}
parameters {{ key: "sopdeploy_bundle" value {{ string_value: {name} }} }}
parameters {{ key: "sopdeploy_precision" value {{ string_value: "{precision}" }} }}
parameters {{ key: "sopdeploy_onnx_sha256" value {{ string_value: "{onnx_sha256}" }} }}
"""
# Of `export --set trained_logits=true`: Triton's clients divide the logits by it, before the softmax.
TEMPERATURE = """\
parameters {{ key: "sopdeploy_temperature" value {{ string_value: "{temperature}" }} }}
"""
WARMUP_CONFIG = """\
model_warmup {{
  name: "batch of {size}"
  batch_size: {size}
  inputs {{ key: {name} value {{ data_type: {kind} dims: {dims} input_data_file: "{file}" }} }}
}}
"""
# Triton waits 1 ms for a larger batch, and rejects requests that wait longer than 1 s.
BATCHING = """\
# On a GPU, remove this block: ONNX Runtime plans convolutions again for a batch of another size than the last.
dynamic_batching {{
  preferred_batch_size: {preferred}
  max_queue_delay_microseconds: 1000
  default_queue_policy {{
    timeout_action: REJECT
    default_timeout_microseconds: 1000000
    allow_timeout_override: true
    max_queue_size: 256
  }}
}}
"""


def _model_config(model: Model) -> str:
    """Write Triton's ModelConfig message for *model* in the protobuf text format."""
    image = model.inputs[0]
    batch = model.batch

    # The names of the classes belong to the first output.
    tensors = [_tensor_config("input", record, batch) for record in model.inputs]
    tensors += [
        _tensor_config(
            "output", record, batch, f' label_filename: "{_LABELS}"' if position == 0 else ""
        )
        for position, record in enumerate(model.outputs)
    ]

    text = CONFIG.format(
        name=json.dumps(model.name),  # JSON strings are valid in the text format
        max_batch=batch.maximum if batch.maximum > 1 else 0,  # see `_dims`
        tensors="\n".join(tensors),
        precision=model.precision,
        onnx_sha256=model.onnx_sha256,
    )

    if model.temperature != 1:
        text += TEMPERATURE.format(temperature=model.temperature)

    # Warm-up batches, in which Triton repeats one probe image.
    for size in sorted({1, batch.optimum, batch.maximum}):
        name = json.dumps(image.name)
        kind = TYPES[image.dtype]
        text += WARMUP_CONFIG.format(
            size=size, name=name, kind=kind, dims=_dims(image, batch), file=WARMUP
        )
    if batch.maximum > 1:
        text += BATCHING.format(preferred=sorted({batch.optimum, batch.maximum} - {1}))
    return text


def _tensor_config(field: str, record: TensorRecord, batch: BatchRange, more: str = "") -> str:
    """Write the *field* `input` or `output` for the tensor of *record*, with *more* fields of its message."""
    name = json.dumps(record.name)
    kind = TYPES[record.dtype]
    return f"{field} {{ name: {name} data_type: {kind} dims: {_dims(record, batch)}{more} }}"


def _dims(record: TensorRecord, batch: BatchRange) -> list[int]:
    """List the sizes of the tensor of *record* for Triton, -1 for one that varies.

    Triton adds the batch axis itself. It does not if `max_batch_size` is 0, which stands for a
    graph for one image only, so there the list begins with 1.
    """
    batch_sizes = [1] if batch.maximum == 1 else []
    return batch_sizes + [int(size or -1) for size in record.shape[1:]]
