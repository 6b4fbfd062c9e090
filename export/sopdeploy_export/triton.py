"""A Triton model repository from a bundle: the graph, its labels, a warm-up and a `config.pbtxt`.

    REPO/<model>-<id>/config.pbtxt, labels.txt, 1/model.onnx, warmup/image

Triton gathers requests into batches of the sizes that the bundle was verified for, refuses what waited too
long instead of answering too late, and is not ready before real batches went through the network.
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
from sopdeploy.config import Count, StrictModel
from sopdeploy.errors import BundleError
from sopdeploy.files import sha256

TYPES = {"uint8": "TYPE_UINT8", "float32": "TYPE_FP32", "int64": "TYPE_INT64"}
WARMUP = "image"
LABELS = "labels.txt"

Microseconds = Annotated[int, pydantic.Field(ge=0)]


class TritonOptions(StrictModel):
    """How Triton batches and queues."""

    max_queue_delay: Microseconds = 1000
    timeout: Microseconds = 1_000_000  # a request that waited longer is refused
    max_queue_size: Count = 256
    instances: Count = 1


class TritonModel(StrictModel):
    """What was written."""

    path: Path
    name: str
    max_batch: int
    files: tuple[str, ...]


class Word(str):
    """A value of a text-format message that stands without quotes: a number's or an enumeration's name."""


Value = str | int | bool | Mapping[str, "Value"] | Sequence["Value"]


def write_triton(bundle: Bundle, repository: Path, options: TritonOptions | None = None) -> TritonModel:
    """Write the model of *bundle* into the folder *repository*, whole or not at all.

    A folder of the same content that is already there stays. Raises `BundleError` where another content is
    there, or the bundle was not verified for single images.
    """
    manifest = bundle.manifest
    if manifest.batch.minimum > 1:
        raise BundleError(
            f"{bundle.path}: was verified for batches of {manifest.batch.minimum} or more; "
            "Triton sends single images, too"
        )
    refuse_unwritable_labels(bundle)
    target = repository / bundle.name
    with staging(repository) as folder:
        (folder / "1").mkdir()
        (folder / "warmup").mkdir()
        shutil.copyfile(bundle.onnx, folder / "1" / "model.onnx")
        (folder / LABELS).write_text("".join(f"{label}\n" for label in bundle.labels), encoding="utf-8")
        (folder / "warmup" / WARMUP).write_bytes(read_probes(bundle.probes).images[0].tobytes())
        (folder / "config.pbtxt").write_text(
            config_text(bundle, options or TritonOptions()), encoding="utf-8"
        )
        files = content(folder)
        folder.chmod(0o755)
        if not target.exists():
            folder.rename(target)
        elif content(target) != files:
            raise BundleError(f"{target}: exists with another content; remove it or choose another folder")
    return TritonModel(
        path=target, name=bundle.name, max_batch=manifest.batch.maximum, files=tuple(sorted(files))
    )


def refuse_unwritable_labels(bundle: Bundle) -> None:
    """Refuse class names that a file of one name per line cannot hold."""
    broken = [label for label in bundle.labels if label.splitlines() not in ([label], [])]
    if broken:
        raise BundleError(f"{bundle.path}: the class name {broken[0]!r} does not fit on a line of {LABELS}")


def content(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file below *folder* by its relative name."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256(path) for path in paths}


def config_text(bundle: Bundle, options: TritonOptions) -> str:
    """Return `config.pbtxt` of *bundle*."""
    manifest = bundle.manifest
    batch = manifest.batch
    config: dict[str, Value] = {
        "name": bundle.name,
        "backend": "onnxruntime",
        "max_batch_size": batch.maximum,
        "input": [tensor(record) for record in manifest.inputs],
        "output": [
            {**tensor(record), **({"label_filename": LABELS} if index == 0 else {})}
            for index, record in enumerate(manifest.outputs)
        ],
        "instance_group": [{"count": options.instances, "kind": Word("KIND_AUTO")}],
        "model_warmup": [warmup(bundle, size) for size in sorted({1, batch.optimum, batch.maximum})],
        "parameters": [
            {"key": key, "value": {"string_value": value}}
            for key, value in {
                "sopdeploy_bundle": bundle.name,
                "sopdeploy_precision": manifest.precision,
                "sopdeploy_onnx_sha256": manifest.files[bundle.onnx.name].sha256,
            }.items()
        ],
    }
    if batch.maximum > 1:
        config["dynamic_batching"] = batching(bundle, options)
    return text_format(config)


def batching(bundle: Bundle, options: TritonOptions) -> dict[str, Value]:
    """Return how requests are gathered, and what happens to one that waits too long."""
    batch = bundle.manifest.batch
    return {
        "preferred_batch_size": sorted({size for size in (batch.optimum, batch.maximum) if size > 1}),
        "max_queue_delay_microseconds": options.max_queue_delay,
        "default_queue_policy": {
            "timeout_action": Word("REJECT"),
            "default_timeout_microseconds": options.timeout,
            "allow_timeout_override": True,
            "max_queue_size": options.max_queue_size,
        },
    }


def tensor(record: TensorRecord) -> dict[str, Value]:
    """Return a tensor without its batch, as Triton wants it."""
    return {
        "name": record.name,
        "data_type": Word(TYPES[record.dtype]),
        "dims": [int(size or -1) for size in record.shape[1:]],
    }


def warmup(bundle: Bundle, size: int) -> dict[str, Value]:
    """Return a warm-up request: one probe image, which Triton repeats to a batch of *size*."""
    record = tensor(bundle.manifest.inputs[0])
    value = {"data_type": record["data_type"], "dims": record["dims"], "input_data_file": WARMUP}
    return {
        "name": f"batch of {size}",
        "batch_size": size,
        "inputs": {"key": record["name"], "value": value},
    }


def text_format(message: Mapping[str, Value], indent: str = "") -> str:
    """Return *message* in protobuf's text format."""
    lines = []
    for name, value in message.items():
        several = isinstance(value, Sequence) and not isinstance(value, str)
        for item in value if several else [value]:  # type: ignore[union-attr]
            if isinstance(item, Mapping):
                lines.append(f"{indent}{name} {{\n{text_format(item, indent + '  ')}{indent}}}\n")
            else:
                lines.append(f"{indent}{name}: {scalar(item)}\n")
    return "".join(lines)


def scalar(value: Value) -> str:
    """Return one value as the text format writes it; JSON's strings are a subset of its own."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if isinstance(value, Word | int) else json.dumps(value)
