"""What is at a path that a user gave: the one place that decides it, and says what to do instead."""

import os
import re
import zipfile
from contextlib import suppress
from itertools import chain
from pathlib import Path
from shlex import quote
from typing import Literal

from sopdeploy.base.files import (
    BEST,
    GRAPH,
    LAST,
    LATEST,
    MANIFEST,
    POINTER_ADVICE,
    has_manifest,
    holds_file,
    holds_output,
    is_pointer,
    open_regular,
)
from sopdeploy.base.nearest import did_you_mean
from sopdeploy.images.signatures import has_image_suffix

_ADDRESS = re.compile(r"(?:https?|s3|gs):/")  # as `Path` writes it
WeightFormat = Literal["torch", "safetensors"]
TORCH_MAGIC = b"PK", b"\x80"  # of zip archives, and of the pickles before torch 1.6
MAX_WEIGHTS_BYTES = 16 << 30  # of a checkpoint, with the state of an optimizer, or an engine
COMPRESSED = (".gz", ".bz2", ".xz")  # one file; with `.tar` before it, several
ARCHIVES = (".zip", ".tar", ".tgz", ".7z", ".rar", *(f".tar{suffix}" for suffix in COMPRESSED))
CHECKPOINT_FORMAT = "sopdeploy-checkpoint"
READ_OF_CHECKPOINT = 256  # bytes of its pickle, which begins with the format
_CODE = "code, not weights; give the weight file, and name the network as module:callable"
_NAMES_CODE = "names code, not a file; give the weight file, and name the network as an option"
_WEIGHTS = (
    "a weight file, no checkpoint of `sopdeploy train`; for weights of your own network, also name the "
    "network"
)
# What files of other programs are, by suffix, and what to give instead
_OF_OTHERS = {
    (".h5", ".hdf5", ".keras", ".pb", ".tflite"): (
        "a network of Keras or TensorFlow, which cannot be read; copy its "
        "weights into a PyTorch network"
    ),
    (".onnx", ".engine", ".plan"): (
        "a finished graph without the network to compare it with; give its checkpoint"
    ),
    (".py",): _CODE,
    (".pth", ".ckpt", ".bin", ".safetensors"): _WEIGHTS,
}
# Of these, what an export reads beside the code of their network
_NEED_NETWORK = (_CODE, _NAMES_CODE, _WEIGHTS)
# What a command takes
Wanted = Literal["bundle", "checkpoint", "run", "weights", "photographs"]
# What is at a path: a file, then a folder, each in the order of the checks
PathKind = Literal[
    "nothing",
    "code",
    "pointer",
    "bundle_file",
    "checkpoint",
    "weights",
    "archive",
    "foreign",
    "photograph",
    "file",
    "bundle",
    "run",
    "photographs",
    "bundles",
    "runs",
    "folder",
]
_WORDS: dict[PathKind, str] = {
    "bundle_file": "a file of a bundle",
    "checkpoint": "a checkpoint",
    "weights": "weights",
    "archive": "an archive",
    "photograph": "a photo",
    "bundle": "a bundle",
    "run": "a run",
    "photographs": "photos",
    "bundles": "a folder of bundles",
    "runs": "a folder of runs",
}
_EXPORT = "run: sopdeploy export {best} --detach"
_CHOOSE = "choose one, such as {meant}"
_TRAIN = "run: sopdeploy train --data {path}"
_EXPORTED = "to serve it, run: sopdeploy serve {path}"
_UNPACK = "unpack it, and {otherwise}"
# What to do with each kind of path where something else is wanted.
_NEXT: dict[Wanted, dict[PathKind, str]] = {
    "bundle": {
        "bundle_file": "give its folder, {folder}",
        "checkpoint": "run: sopdeploy export {path} --detach",
        "weights": "run: sopdeploy export {path} --network MODULE:CALLABLE",
        "run": _EXPORT,
        "runs": _EXPORT,
        "bundles": _CHOOSE,
        "photographs": _TRAIN,
    },
    "checkpoint": {
        "run": "use {best}",
        "runs": "use {best}",
        "bundle": _EXPORTED,
        "bundles": _EXPORTED,
        "photographs": _TRAIN,
    },
    "run": {
        "checkpoint": "give the folder of its run",
        "bundle": "give the run that it was exported from; runs/index.html lists both",
        "bundles": "give a run; runs/index.html lists both",
        "runs": _CHOOSE,
        "photographs": _TRAIN,
    },
    "weights": {"run": "use {best}", "runs": "use {best}"},
    "photographs": {"archive": _UNPACK},
}
_WANTED: dict[Wanted, str] = {
    "bundle": "a bundle",
    "checkpoint": "a checkpoint",
    "run": "a run",
    "weights": "weights",
    "photographs": "a folder of photos",
}
_OUTPUTS: frozenset[PathKind] = frozenset({"bundle", "bundles", "run", "runs"})
_NOT_WRITTEN = "was this folder written by `sopdeploy export`?"
_OTHERWISE: dict[Wanted, str] = {
    "bundle": f"a bundle is a folder with a {MANIFEST}, as `sopdeploy export` writes it",
    "checkpoint": "use the best.pt of a training run",
    "run": "give a run of `sopdeploy train`",
    "weights": "give a weight file",
    "photographs": "give a folder with photos",
}
_MISSING: dict[Wanted, str] = {
    "bundle": "no such folder",
    "checkpoint": "no such file",
    "run": "no such folder",
    "weights": "no such file",
    "photographs": "no such folder",
}


def what_is(path: Path) -> PathKind:
    """Tell what is at *path*, by its content where that decides; imports no torch."""
    if path.is_dir():
        return _what_is_folder(path)
    if not path.exists():
        return "code" if names_code(path) else "nothing"

    # A pipe or a device has no end.
    if not path.is_file():
        return "file"
    if is_pointer(path):
        return "pointer"
    if has_manifest(path.parent):
        return "bundle_file"
    if is_own_checkpoint(path):
        return "checkpoint"
    if holds_weights(path):
        return "weights"
    if is_tar(path) or path.name.lower().endswith((*ARCHIVES, *COMPRESSED)):
        return "archive"
    if describe_foreign(path):
        return "foreign"
    return "photograph" if has_image_suffix(path.name) else "file"


def is_output(path: Path) -> bool:
    """Tell whether *path* is a bundle or a run, or a folder of some and of no photographs.

    Folders of photographs, which may be large, are listed only beside a bundle or a run.
    """
    folders = [path, *path.glob("[!.]*/")] if path.is_dir() else []
    return any(map(_is_or_holds_output, folders)) and what_is(path) in _OUTPUTS


def _is_or_holds_output(folder: Path) -> bool:
    return has_manifest(folder) or holds_output(folder)


def _what_is_folder(path: Path) -> PathKind:
    """Tell what the folder *path* is; photographs are not searched in bundles and runs in it."""
    if has_manifest(path):
        return "bundle"
    if holds_file(path, BEST) or holds_file(path, LAST):
        return "run"
    # A bundle without its manifest has images, too.
    if holds_file(path, GRAPH):
        return "folder"

    folders = list(path.glob("[!.]*/"))
    inner = [folder for folder in folders if not _is_or_holds_output(folder)]
    files = chain(path.glob("*"), *(folder.glob("*") for folder in inner))
    if any(has_image_suffix(file.name) for file in files):
        return "photographs"
    if any(map(has_manifest, folders)):
        return "bundles"
    return "runs" if any(holds_file(folder, BEST) for folder in folders) else "folder"


def describe_wrong(path: Path, wanted: Wanted, otherwise: str = "") -> str:
    """Say what is at *path*, which is not what is *wanted*, and what to do.

    Where no other step is known, that is *otherwise* or, without it, the usual one of `_OTHERWISE`.
    """
    kind = what_is(path)
    if kind == wanted:  # a damaged one
        kind = "folder" if path.is_dir() else "file"
    otherwise = otherwise or _OTHERWISE[wanted]
    if kind == "pointer":
        return POINTER_ADVICE

    # Files of other programs say themselves what to give.
    if kind in {"code", "foreign"} and wanted == "bundle":
        return f"{describe_foreign(path)}, and export it"
    if kind in {"code", "foreign", "weights"} and wanted == "checkpoint":
        return describe_foreign(path)

    # What sopdeploy or its user made: its name, and the step that leads from it to what is wanted.
    if kind in _WORDS:
        meant = _meant(path)
        best = meant / BEST
        places = {
            "path": path,
            "folder": path.parent,
            "meant": meant,
            "best": best if best.is_file() else meant / LAST,
        }
        quoted = {name: quote(str(place)) for name, place in places.items()}
        step = _NEXT[wanted].get(kind, "{otherwise}").format(**quoted, otherwise=otherwise)
        return f"{_WORDS[kind]}, not {_WANTED[wanted]}; {step}"

    # Nothing, or a file or folder that is none of these.
    if kind == "file" and wanted == "checkpoint":
        return "damaged or not a checkpoint; copy it again, or train again"
    if wanted == "bundle" and kind == "folder":
        return f"no {MANIFEST}; {_NOT_WRITTEN}"
    if kind in {"nothing", "code"}:
        return f"{_MISSING[wanted]}; {describe_near(path) or otherwise}"
    return f"{'a folder' if kind == 'folder' else 'not a folder'}; {otherwise}"


def describe_near(path: Path) -> str:
    """Say what the missing *path* may mean: the target of a link that is gone, or a path that is like it; or ""."""
    if _ADDRESS.match(str(path)):
        return "an address is not read; download the files, and give their folder"

    # The first part that is missing, such as the folder of a deleted run, and what lies beside it.
    missing = path
    while not os.path.lexists(missing.parent):
        missing = missing.parent
    link = missing if missing.is_symlink() else missing.parent
    if link.is_symlink() and not link.exists():
        return f"{link} leads to {link.parent / link.readlink()}, which is gone; name another"
    rest = path.relative_to(missing)
    beside = sorted(missing.parent.iterdir()) if os.access(missing.parent, os.R_OK) else []
    others = {one.name: str(one / rest) for one in beside if (one / rest).exists()}
    return did_you_mean(missing.name, others)


def _meant(path: Path) -> Path:
    """Return the run or bundle that the folder *path* probably stands for: itself, its latest, or its first."""
    if holds_output(path) and not (path / LATEST).exists():
        return path
    folders = {file.parent for name in (MANIFEST, BEST) for file in path.glob(f"[!.]*/{name}")}
    latest = path / LATEST
    return latest if latest in folders or not folders else min(folders)


def names_code(path: Path) -> bool:
    """Tell whether *path* is not a file, but a name such as `net.py:Net` or `package.module:Net`."""
    is_name = re.fullmatch(r"[\w.]+(?:\.py)?:[\w.]+", path.name) and not _ADDRESS.match(
        str(path)
    )
    return bool(is_name) and not path.exists()


def describe_foreign(path: Path) -> str:
    """Say what a file of another program, or a name of code, is, and what to do; empty for other paths."""
    if names_code(path):
        return _NAMES_CODE
    if is_pointer(path):
        return POINTER_ADVICE
    for suffixes, description in _OF_OTHERS.items():
        if path.suffix.lower() in suffixes:
            return description
    return _WEIGHTS if holds_weights(path) else ""


def needs_network(path: Path) -> bool:
    """Tell whether an export of the foreign file *path*, or of the code it names, needs an option `network`."""
    return describe_foreign(path) in _NEED_NETWORK


def is_own_checkpoint(path: Path) -> bool:
    """Tell by its first bytes whether *path* is a checkpoint of sopdeploy; does not import torch."""
    try:
        with zipfile.ZipFile(path) as archive:
            [name] = [name for name in archive.namelist() if name.endswith("data.pkl")]
            with archive.open(name) as content:
                return CHECKPOINT_FORMAT.encode() in content.read(READ_OF_CHECKPOINT)
    except Exception:  # zipfile raises many types for damaged files
        return False


def holds_weights(path: Path) -> bool:
    """Tell by its content whether *path* is a file of `torch.save` or safetensors."""
    try:
        with open_regular(path) as file:
            first = file.read(16)
        if first.startswith(b"PK"):
            with zipfile.ZipFile(path) as archive:
                return any(name.endswith("data.pkl") for name in archive.namelist())
    except Exception:  # zipfile raises many types for damaged files
        return False
    return weight_format(first) is not None


def weight_format(first: bytes) -> WeightFormat | None:
    """Tell the format of a weight file by its *first* 16 bytes; None for any other file."""
    if first[8:9] == b"{":  # 8 bytes of length, then JSON
        return "safetensors"
    return "torch" if first.startswith(TORCH_MAGIC) else None


def is_tar(path: Path) -> bool:
    """Tell by its content whether *path* is a tar archive; weights may have that suffix, too."""
    with suppress(OSError), open_regular(path) as file:
        return file.read(512)[257:262] == b"ustar"
    return False
