"""Files that users bring: weight files of PyTorch, and lists of class names. No code of a file is run."""

import argparse
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sopdeploy.checkpoint import load_plain
from sopdeploy.environment import import_optional
from sopdeploy.errors import CheckpointError, ConfigError, WeightsError
from sopdeploy.files import check_is_weights

ADVICE = "save the network's state_dict() alone with torch.save, or as safetensors"
_MAX_BYTES = 4 << 30  # of all tensors of a file; the largest published file has 0.7 GB


def read_pytorch(path: Path) -> tuple[Any, str]:
    """Read a `.pth`, `.pth.tar`, `.th`, `.pt` or `.safetensors` file once; returns content and sha256.

    A safetensors file is one table of tensors. Raises `WeightsError`.
    """
    check_is_weights(path)
    raw = path.read_bytes()
    digest = hashlib.sha256(raw).hexdigest()
    if raw[8:9] == b"{":  # safetensors: 8 bytes of length, then JSON
        safetensors = import_optional(
            "safetensors.torch", "safetensors", "sopdeploy[train]", WeightsError, str(path)
        )
        try:
            return safetensors.load(raw), digest
        except Exception as error:  # SafetensorError
            raise WeightsError(f"{path}: damaged safetensors file ({error}); copy it again") from error
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # plain data, in many checkpoints
            return load_plain(path, raw, ADVICE), digest
    except CheckpointError as error:
        raise WeightsError(str(error)) from error


def check_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Check that *tensors* are dense, real and not too large in total; raises `WeightsError`.

    Returns a copy of the mapping. With strides of 0, a few bytes can declare a tensor of any shape.
    """
    total = 0
    for name, tensor in tensors.items():
        is_dense = tensor.layout is torch.strided and not tensor.is_quantized and not tensor.is_meta
        if not is_dense or tensor.is_complex():
            raise WeightsError(f"{path}: {name} is not a dense tensor of real numbers; save it as float32")
        total += tensor.numel() * tensor.element_size()
        if total > _MAX_BYTES:
            raise WeightsError(
                f"{path}: its tensors have more than {_MAX_BYTES >> 30} GiB, which is the limit"
            )
    return dict(tensors)


def read_class_names(file: Path) -> tuple[str, ...]:
    """Read class names from *file*, one per line or as a JSON list; raises `ConfigError`."""
    try:
        content = file.read_text(encoding="utf-8-sig")  # some editors write a byte order mark
        names = json.loads(content) if file.suffix == ".json" else content.split("\n")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError('no list of names such as ["cat", "dog"]')
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{file} cannot be read ({error}); give one name per line", setting="labels"
        ) from error
    return tuple(name.strip() for name in names if name.strip())
