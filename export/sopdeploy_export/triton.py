"""Write a Triton model repository from a bundle.

    REPO/<model>-<id>/config.pbtxt, labels.txt, 1/model.onnx, warmup/image

Triton batches requests in the sizes that the bundle was verified for, rejects requests that waited too long,
and is ready only after warm-up batches have run.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import pydantic

from sopdeploy.bundle.folder import Bundle, staging
from sopdeploy.bundle.manifest import TensorRecord
from sopdeploy.bundle.probes import read_probes
from sopdeploy.config import Count, Options, StrictModel
from sopdeploy.errors import BundleError
from sopdeploy.files import sha256

TYPES = {"uint8": "TYPE_UINT8", "float32": "TYPE_FP32", "int64": "TYPE_INT64"}
WARMUP = "image"
LABELS = "labels.txt"

TIMEOUT_MICROSECONDS = 1_000_000  # Triton rejects requests that wait longer
MAX_QUEUE_SIZE = 256
Microseconds = Annotated[int, pydantic.Field(ge=0)]


class TritonOptions(Options):
    """Options of `sopdeploy triton`."""

    instances: Count = 1
    """Model instances per device."""
    max_queue_delay: Microseconds = 1000
    """Microseconds to wait for a larger batch."""


class TritonModel(StrictModel):
    """The model that was written, with the names of its files."""

    path: Path
    name: str
    max_batch: int
    files: tuple[str, ...]


class Literal(str):
    """A value of the protobuf text format that is written without quotes, such as an enum name."""


Value = str | int | bool | Mapping[str, "Value"] | Sequence["Value"]


def write_triton(bundle: Bundle, repository: Path, options: TritonOptions | None = None) -> TritonModel:
    """Write *bundle* as a model folder in *repository*, atomically.

    An existing folder with the same content is kept. Raises `BundleError` if it has other content, if the
    bundle was not verified for single images, or if a class name has line breaks.
    """
    manifest = bundle.manifest
    if manifest.batch.minimum > 1:
        raise BundleError(
            f"{bundle.path}: was verified for batches of {manifest.batch.minimum} or more, but Triton also "
            "sends single images; export it with a minimum batch of 1"
        )
    broken = [label for label in bundle.labels if label.splitlines() not in ([label], [])]
    if broken:
        raise BundleError(
            f"{bundle.path}: the class name {broken[0]!r} does not fit on a line of {LABELS}"
            "; rename the class"
        )
    target = repository / bundle.name
    with staging(repository) as folder:
        (folder / "1").mkdir()
        (folder / "warmup").mkdir()
        shutil.copyfile(bundle.onnx, folder / "1" / "model.onnx")
        (folder / LABELS).write_text("".join(f"{label}\n" for label in bundle.labels), encoding="utf-8")
        (folder / "warmup" / WARMUP).write_bytes(read_probes(bundle.probes).images[0].tobytes())
        config = _text_format(model_config(bundle, options or TritonOptions()))
        (folder / "config.pbtxt").write_text(config, encoding="utf-8")
        files = _file_hashes(folder)
        folder.chmod(0o755)
        if not target.exists():
            folder.rename(target)
        elif _file_hashes(target) != files:
            raise BundleError(f"{target}: exists with other content; remove it or choose another folder")
    return TritonModel(
        path=target, name=bundle.name, max_batch=manifest.batch.maximum, files=tuple(sorted(files))
    )


def _file_hashes(folder: Path) -> dict[str, str]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256(path) for path in paths}


def model_config(bundle: Bundle, options: TritonOptions) -> dict[str, Value]:
    """Create Triton's ModelConfig message for *bundle*."""
    manifest = bundle.manifest
    batch = manifest.batch
    outputs = [_tensor(record) for record in manifest.outputs]
    outputs[0]["label_filename"] = LABELS
    image = _tensor(manifest.inputs[0])
    # Triton repeats one probe image to the batch size.
    warmup = {"data_type": image["data_type"], "dims": image["dims"], "input_data_file": WARMUP}
    parameters = {
        "cudnn_conv_algo_search": "1",  # by heuristic: a search takes seconds for every new batch size
        "sopdeploy_bundle": bundle.name,
        "sopdeploy_precision": manifest.precision,
        "sopdeploy_onnx_sha256": manifest.files[bundle.onnx.name].sha256,
    }
    config: dict[str, Value] = {
        "name": bundle.name,
        "backend": "onnxruntime",
        "max_batch_size": batch.maximum,
        "input": [_tensor(record) for record in manifest.inputs],
        "output": outputs,
        # On every GPU, or on the CPU; fp32 in the graph stays fp32.
        "instance_group": [{"count": options.instances, "kind": Literal("KIND_AUTO")}],
        "optimization": {
            "execution_accelerators": {
                "gpu_execution_accelerator": {
                    "name": "cuda",
                    "parameters": {"key": "use_tf32", "value": "0"},
                }
            }
        },
        "model_warmup": [
            {
                "name": f"batch of {size}",
                "batch_size": size,
                "inputs": {"key": image["name"], "value": warmup},
            }
            for size in sorted({1, batch.optimum, batch.maximum})
        ],
        "parameters": [{"key": key, "value": {"string_value": value}} for key, value in parameters.items()],
    }
    if batch.maximum > 1:
        config["dynamic_batching"] = {
            "preferred_batch_size": sorted({size for size in (batch.optimum, batch.maximum) if size > 1}),
            "max_queue_delay_microseconds": options.max_queue_delay,
            "default_queue_policy": {
                "timeout_action": Literal("REJECT"),
                "default_timeout_microseconds": TIMEOUT_MICROSECONDS,
                "allow_timeout_override": True,
                "max_queue_size": MAX_QUEUE_SIZE,
            },
        }
    return config


def _tensor(record: TensorRecord) -> dict[str, Value]:
    # Triton adds the batch axis itself.
    return {
        "name": record.name,
        "data_type": Literal(TYPES[record.dtype]),
        "dims": [int(size or -1) for size in record.shape[1:]],
    }


def _text_format(message: Mapping[str, Value], indent: str = "") -> str:
    """Format *message* in the protobuf text format."""
    lines = []
    for name, value in message.items():
        repeated = isinstance(value, Sequence) and not isinstance(value, str)
        for item in value if repeated else [value]:  # type: ignore[union-attr]
            if isinstance(item, Mapping):
                lines.append(f"{indent}{name} {{\n{_text_format(item, indent + '  ')}{indent}}}\n")
                continue
            if isinstance(item, bool):
                text = "true" if item else "false"
            elif isinstance(item, Literal | int):
                text = str(item)
            else:
                text = json.dumps(item)  # JSON strings are valid in the text format
            lines.append(f"{indent}{name}: {text}\n")
    return "".join(lines)
