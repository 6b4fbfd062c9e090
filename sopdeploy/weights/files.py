"""Whether a file is a checkpoint or a weight file, before it is read; imports no torch, which takes seconds."""

import zipfile
from pathlib import Path
from typing import NamedTuple

from sopdeploy.base.files import is_pointer
from sopdeploy.base.plugins import FIRST_BYTES, IMPORTERS
from sopdeploy.errors import CheckpointError, WeightsError
from sopdeploy.paths import MAX_WEIGHTS_BYTES, describe_wrong, weight_format


def check_is_file(path: Path) -> None:
    """Raise `CheckpointError` unless *path* is a file, with what to do if it is something else."""
    if not path.is_file() or is_pointer(path):
        raise CheckpointError(f"{path}: {describe_wrong(path, 'checkpoint')}")


class WeightPath(NamedTuple):
    """The path of a file that begins as weight files do, and its `first` bytes."""

    path: Path
    first: bytes


def check_is_weights(path: Path) -> WeightPath:
    """Return *path* with its first bytes; raise `WeightsError` unless weight files begin so.

    It is also raised for a folder, a missing file, and one above `MAX_WEIGHTS_BYTES`.
    """
    if not path.is_file() or is_pointer(path):
        raise WeightsError(f"{path}: {describe_wrong(path, 'weights')}")
    if path.stat().st_size > MAX_WEIGHTS_BYTES:
        raise WeightsError(
            f"{path}: larger than {MAX_WEIGHTS_BYTES >> 30} GiB, the limit; give a weight file"
        )

    with path.open("rb") as file:
        first = file.read(16)

    if weight_format(first) is None and not first.startswith(_magic_of_importers()):
        raise WeightsError(
            f"{path}: not a weight file of PyTorch, safetensors or a plug-in; save a state_dict()"
        )
    return WeightPath(path, first)


def _magic_of_importers() -> tuple[bytes, ...]:
    """List the first bytes of the files of importers that packages have registered."""
    IMPORTERS.names()  # imports plug-ins; an importer of the wheel itself is only named
    first_bytes = []
    for importer, _ in IMPORTERS.registered.values():
        first_bytes.append(
            FIRST_BYTES.get(importer) if isinstance(importer, str) else importer.magic
        )
    return tuple(magic for magic in first_bytes if magic)


def check_is_checkpoint(path: Path) -> None:
    """Raise `CheckpointError` unless *path* looks like a checkpoint, without importing torch.

    `read_checkpoint` checks its content. Commands call this before they import torch, which
    takes seconds.
    """
    check_is_file(path)
    if path.stat().st_size > MAX_WEIGHTS_BYTES:
        raise CheckpointError(
            f"{path}: larger than {MAX_WEIGHTS_BYTES >> 30} GiB, the limit; copy it again"
        )

    try:
        with zipfile.ZipFile(path) as archive:
            is_checkpoint = any(name.endswith("/data.pkl") for name in archive.namelist())
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror}); check its permissions"
        ) from error
    except Exception:  # zipfile raises many types for damaged files
        is_checkpoint = False

    if not is_checkpoint:
        raise CheckpointError(f"{path}: {describe_wrong(path, 'checkpoint')}")
