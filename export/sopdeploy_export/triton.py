"""Write a Triton model repository from a bundle.

    REPO/<model>-<id>/config.pbtxt, labels.txt, 1/model.onnx, warmup/image

A graph with weights in a file of their own has this file beside it, `1/model.onnx.data`.

Triton batches requests in the sizes that the bundle was verified for, rejects requests that
waited too long, and is ready only after warm-up batches have run.
"""

import json
from pathlib import Path

from sopdeploy.base.files import GRAPH, sha256
from sopdeploy.bundle.folder import Bundle
from sopdeploy.bundle.manifest import BatchRange, TensorRecord
from sopdeploy.bundle.probes import read_probes
from sopdeploy.bundle.publication import staging
from sopdeploy.errors import BundleError

TYPES = {"uint8": "TYPE_UINT8", "float32": "TYPE_FP32", "int64": "TYPE_INT64"}
WARMUP = "image"
_LABELS = "labels.txt"


def write_triton(bundle: Bundle, repository: Path) -> Path:
    """Write *bundle* as a model folder in *repository*, atomically, and return this folder.

    An existing folder with the same content is kept. Raises `BundleError` if it has other
    content, if the bundle was not verified for single images, or if a class name has line
    breaks.
    """
    manifest = bundle.manifest
    if manifest.batch.minimum > 1:
        raise BundleError(
            f"{bundle.path}: was verified for batches of {manifest.batch.minimum} "
            "or more, but Triton also sends single images; export it with a "
            "minimum batch of 1"
        )

    # Each name is a line. The `.` shows a line break at the end of a name, too.
    broken = [label for label in bundle.labels if len(f"{label}.".splitlines()) > 1]
    if broken:
        raise BundleError(
            f"{bundle.path}: the class name {broken[0]!r} does not fit on a line of "
            f"{_LABELS}; rename it"
        )

    # Write a folder, and give it its name when it is complete.
    target = repository / bundle.name
    with staging(repository) as folder:
        (folder / "1").mkdir()
        (folder / "warmup").mkdir()
        for name in manifest.graph_files:
            with (folder / "1" / name).open("wb") as file:
                file.writelines(bundle.blocks(name))
        (folder / _LABELS).write_text(
            "".join(f"{label}\n" for label in bundle.labels), encoding="utf-8"
        )
        (folder / "warmup" / WARMUP).write_bytes(read_probes(bundle).images[0].tobytes())
        (folder / "config.pbtxt").write_text(_model_config(bundle), encoding="utf-8")
        folder.chmod(0o755)  # `staging` lets the owner only read it

        if not target.exists():
            folder.rename(target)
        elif _file_hashes(target) != _file_hashes(folder):
            raise BundleError(
                f"{target}: exists with other content; remove it or choose another folder"
            )
    return target


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


def _model_config(bundle: Bundle) -> str:
    """Write Triton's ModelConfig message for *bundle* in the protobuf text format."""
    manifest = bundle.manifest
    image = bundle.manifest.inputs[0]
    batch = manifest.batch

    # The names of the classes belong to the first output.
    tensors = [_tensor_config("input", record, batch) for record in manifest.inputs]
    tensors += [
        _tensor_config(
            "output", record, batch, f' label_filename: "{_LABELS}"' if position == 0 else ""
        )
        for position, record in enumerate(manifest.outputs)
    ]

    text = CONFIG.format(
        name=json.dumps(bundle.name),  # JSON strings are valid in the text format
        max_batch=batch.maximum if batch.maximum > 1 else 0,  # see `_dims`
        tensors="\n".join(tensors),
        precision=manifest.precision,
        onnx_sha256=manifest.files[GRAPH].sha256,
    )

    if manifest.rules.divides_logits:
        text += TEMPERATURE.format(temperature=manifest.rules.temperature)

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
