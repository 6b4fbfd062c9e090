"""Files of torch and safetensors: reading them without running code, and the tables of tensors in them.

They are dicts of tensors, numbers, strings, lists and dicts, so `torch.load(weights_only=True)`
reads them. No other module loads `.pt` files.
"""

import hashlib
import io
import pickle  # for the exception type of torch.load
import zipfile
from collections import defaultdict
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any, assert_never

import torch
from torch import Tensor

from sopdeploy.base.environment import import_optional
from sopdeploy.base.files import advise_on, read_file
from sopdeploy.errors import CheckpointError, WeightsError
from sopdeploy.paths import MAX_WEIGHTS_BYTES, weight_format
from sopdeploy.weights.files import WeightPath
from sopdeploy.weights.pickled import PLAIN_TYPES, StoredArray, check_pickles, distinct_values

WEIGHTS_ADVICE = "save the network's state_dict() alone with torch.save, or as safetensors"
_MAX_BYTES = 4 << 30  # of all tensors of such a file; the largest published one has 0.7 GB
MAX_TENSORS = 1_000_000
# Of a batch norm; old files lack it, and inference does not use it
COUNTER = "num_batches_tracked"
# Of batch norms, `AveragedModel` and packages that count operations; no output depends on them.
COUNTERS = (COUNTER, "n_averaged", "total_ops", "total_params")
MAX_TABLE_LEVELS = 3  # of dicts, as in {"checkpoint": {"model": {"conv.weight": ..}}}


def load_plain(
    path: Path, raw: bytes, advice: str = "only open checkpoints that sopdeploy wrote"
) -> Any:
    """Load *raw*, the content of *path*, by `torch.load(weights_only=True)`, which never runs code from it.

    Raises `CheckpointError` if it is a TorchScript archive, is damaged, takes much more memory
    than its size explains, or would run code; the message of the last ends in *advice*.
    """
    if _is_torchscript(raw):
        raise CheckpointError(
            f"{path}: a TorchScript archive, which contains code; {WEIGHTS_ADVICE}"
        )

    try:
        _check_reading_cost(raw)
        content = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
        distinct_values(content)  # raises if it has too many values or levels
        return content
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: refused, because it contains objects other than "
            f"tensors, and reading it could run code; {advice}"
        ) from error
    except Exception as error:  # torch raises many types for damaged files
        raise CheckpointError(
            f"{path}: damaged or not a checkpoint; copy it again, or train again"
        ) from error


def _is_torchscript(raw: bytes) -> bool:
    """Return whether *raw* is an archive of `torch.jit.save`, which stores constants beside the code."""
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            names = {name.partition("/")[2] for name in archive.namelist()}
    except Exception:  # no zip archive, or a damaged one, which a later check reports
        return False
    return "constants.pkl" in names and "data.pkl" in names


def _check_reading_cost(raw: bytes) -> None:
    """Raise `ValueError` if reading *raw* may take more memory or time than its size explains."""
    if not raw.startswith(b"PK"):
        check_pickles(io.BytesIO(raw))
        return

    # The reader that `torch.load` uses. Another reader of zip files may find other entries: names
    # that differ in case only, or a second list of entries.
    reader = torch._C.PyTorchFileReader(io.BytesIO(raw))
    if hasattr(reader, "get_record_size"):
        size = sum(map(reader.get_record_size, reader.get_all_records()))
    else:  # torch 2.11
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            size = sum(file.file_size for file in archive.infolist())

    if size > len(raw):
        raise ValueError("compressed or overlapping entries")
    check_pickles(io.BytesIO(reader.get_record("data.pkl")))


def is_dense(tensor: Tensor) -> bool:
    """Tell whether *tensor* has values that are stored one by one: not sparse, quantized or on `meta`."""
    return tensor.layout is torch.strided and not tensor.is_quantized and not tensor.is_meta


def stores_all_numbers(tensor: Tensor) -> bool:
    """Check whether the dense *tensor* has memory for all its numbers: with strides of 0 it may have less."""
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def is_state_dict(weights: Any) -> bool:
    """Check whether *weights* is a non-empty dict of names and tensors."""
    if not isinstance(weights, dict) or not weights:
        return False
    return all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in weights.items()
    )


def read_pytorch(file: WeightPath) -> tuple[Any, str]:
    """Read a file of torch or safetensors; returns content and sha256, raises `WeightsError`.

    In a file of torch, arrays of numpy in the outer dicts become tensors.
    """
    path = file.path
    try:
        raw = read_file(path, MAX_WEIGHTS_BYTES)
    except OSError as error:
        raise WeightsError(f"{path}: {advise_on(error, WEIGHTS_ADVICE)}") from error
    digest = hashlib.sha256(raw).hexdigest()

    # safetensors has tensors alone, a file of torch may hold them in tables.
    file_format = weight_format(raw[:16])
    if file_format == "safetensors":
        safetensors = import_optional(
            "safetensors.torch", "safetensors", ".[train]", WeightsError, str(path)
        )
        try:
            return safetensors.load(raw), digest
        except Exception as error:  # `SafetensorError`, of a package that is imported above
            raise WeightsError(
                f"{path}: damaged safetensors file ({error}); copy it again"
            ) from error

    # A file of neither format goes on, too: `load_plain` says what is wrong with it.
    if file_format != "torch" and file_format is not None:
        assert_never(file_format)

    try:
        with torch.serialization.safe_globals(list(PLAIN_TYPES)):
            return _arrays_to_tensors(load_plain(path, raw, WEIGHTS_ADVICE)), digest
    except CheckpointError as error:
        raise WeightsError(str(error)) from error


def _arrays_to_tensors(content: Any, levels: int = MAX_TABLE_LEVELS) -> Any:
    """Replace the arrays of numpy in the outer *levels* of dicts by tensors, if they hold numbers."""
    if isinstance(content, StoredArray) and content.values is not None:
        return torch.from_numpy(content.values)
    if isinstance(content, dict) and levels:
        return {key: _arrays_to_tensors(value, levels - 1) for key, value in content.items()}
    return content


def find_tables(content: Any, levels: int = MAX_TABLE_LEVELS) -> dict[str, Mapping[str, Any]]:
    """Find the tables of tensors in the outer *levels* of *content*, by their path of keys, "" for itself.

    A table is a dict that holds a tensor; it can hold other values, too, such as the extra
    state of a layer or the number of epochs.
    """
    if not isinstance(content, dict):
        return {}

    tables: dict[str, Mapping[str, Any]] = {}
    own = {name: value for name, value in content.items() if isinstance(name, str)}
    if any(isinstance(value, Tensor) for value in own.values()):
        tables[""] = own

    if levels > 1:
        for key, value in content.items():
            for path, table in find_tables(value, levels - 1).items():
                tables[f"{key}.{path}".strip(".")] = table
    return tables


def find_wrappers(*tables: Iterable[str]) -> frozenset[str]:
    """Return the parts of the names in *tables* that wrappers of modules add, such as `_orig_mod`.

    DataParallel calls what it wraps `module`; torch.compile, FSDP, checkpoints of activations
    and others use a name that begins with an underscore. A part is that of a wrapper only if it
    stands alone wherever it occurs: no other part follows the same prefix, but for counters.
    """
    siblings = defaultdict[tuple[int, str], set[str]](set)

    # By table and prefix, the parts that follow this prefix in the names of the table.
    for number, names in enumerate(tables):
        for name in names:
            if name.endswith(COUNTERS):
                continue
            parts = name.split(".")
            for depth, part in enumerate(parts):
                siblings[number, ".".join(parts[:depth])].add(part)

    alone = {part for parts in siblings.values() if len(parts) == 1 for part in parts}
    shared = {part for parts in siblings.values() if len(parts) > 1 for part in parts}
    return frozenset(
        part for part in alone - shared if part == "module" or part.startswith("_")
    )


def without_wrappers(name: str, wrappers: Container[str]) -> str:
    """Leave *wrappers* out of *name*, as in module.conv1.weight or features.module.0.weight."""
    return ".".join(part for part in name.split(".") if part not in wrappers)


def check_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Check that the *tensors* of a weight file are dense, real and not too large in total; raises `WeightsError`.

    Returns a copy of the mapping. With strides of 0, a few bytes can declare a tensor of any
    shape.
    """
    total = 0

    for name, tensor in tensors.items():
        if not is_dense(tensor) or tensor.is_complex():
            raise WeightsError(
                f"{path}: {name} is not a dense tensor of real numbers; save it as float32"
            )
        total += tensor.numel() * tensor.element_size()
        if total > _MAX_BYTES:
            raise WeightsError(
                f"{path}: its tensors have more than {_MAX_BYTES >> 30} GiB, which is the limit"
            )
    return dict(tensors)


def describe_type(tensor: Tensor) -> str:
    """Describe dtype, layout and device, such as "float32 strided on cpu"."""
    return f"{tensor.dtype} {tensor.layout} on {tensor.device}".replace("torch.", "")
