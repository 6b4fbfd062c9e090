"""Atomic file writes, opening of regular files, file hashes, and lists of class names."""

import errno
import hashlib
import logging
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO
from zlib import crc32

from sopdeploy.base.file_systems import Lock, flush, lock_file, lock_if_abandoned, rename_file
from sopdeploy.errors import StorageError

PARTIAL = ".partial"
MAX_PARTIAL_BYTES = 230  # of the name of a file, as a part of the name of its temporary file
LOCK = ".lock"  # in a folder to which one process writes
MANIFEST = "manifest.json"  # of a bundle
GRAPH = "model.onnx"  # of a bundle
GRAPH_DATA = f"{GRAPH}.data"  # of a bundle: the weights of a graph that one file cannot hold
BEST = "best.pt"  # of a run: the checkpoint to export
LAST = "last.pt"  # of a run: the checkpoint to resume from
HISTORY = "history.csv"  # of a run: its epochs
RECIPE = "recipe.toml"  # of a run: all its settings, which `--recipe` reads
SUMMARY = "run.json"  # of a run: what lists of runs show
LATEST = "latest"  # the link to the newest run or bundle of a folder
BLOCK_BYTES = 1 << 20
MAX_TEXT_BYTES = 1_000_000  # of a file that people write: a recipe, settings, keys, rules
MAX_NAMES_BYTES = 100_000_000  # of a file that programs write: class names, tables, results
MAX_IMAGE_BYTES = 256_000_000  # of a photograph that is not decoded here
# With what a pointer of Git LFS begins
POINTER = b"version https://git-lfs.github.com/spec/"
POINTER_ADVICE = (
    "a pointer of Git LFS, not the file itself; run in its repository: git lfs pull"
)
# Operating system errors that the user can fix: permissions, disk space, file names.
STORAGE_ERRNOS = {
    errno.EACCES, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EISDIR, errno.ENAMETOOLONG, errno.ENOSPC,
    errno.ENOTDIR, errno.EPERM, errno.EROFS,
}  # fmt: skip

FULL_ERRNOS = {errno.EDQUOT, errno.ENOSPC}
_LEFT_FILE = re.compile(rf".*\.[0-9a-f]{{8}}{re.escape(PARTIAL)}")
_LEFT_FOLDER = re.compile(rf"\.(?:new|bundle)-\w{{8}}{re.escape(PARTIAL)}")
_CHECKSUM_BYTES = 4
_CLEANED: set[str] = set()  # folders without files of processes killed before

log = logging.getLogger("sopdeploy.base.files")


@contextmanager
def atomic_write(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Yield the path of an empty temporary file; rename it to *path* on success, delete it on error.

    A *durable* file has its content on the disk before it has its name, so that a loss of power
    leaves no empty one; a write takes some milliseconds more. What killed processes left in the
    folder is removed once per process. Raises `OSError`, also for a folder.
    """
    if path.is_dir():  # also `.` and `/`, which have no name to extend
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))

    folder = os.path.abspath(path.parent)  # noqa: PTH100 - `resolve` follows links
    if folder not in _CLEANED:
        _CLEANED.add(folder)
        remove_leftovers(path.parent)

    name = os.fsencode(path.name)[:MAX_PARTIAL_BYTES].decode("utf-8", "ignore")
    partial = path.with_name(f"{name}.{secrets.token_hex(4)}{PARTIAL}")

    # The lock tells other processes that the temporary file is in use.
    lock = lock_file(partial)
    try:
        yield partial
        if durable:
            flush(lock.file)
        rename_file(lock.file, partial, path)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        os.close(lock.file)


@contextmanager
def new_folder(path: Path, mode: int = 0o777) -> Iterator[None]:
    """Create *path* and the missing folders above it; at the end, remove the created ones that are empty."""
    # The innermost folder comes first, as `rmdir` needs it.
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(mode, parents=True, exist_ok=True)
        yield
    finally:
        for folder in missing:
            # The folder stays if it holds a file, was not created, or is used by another
            # process.
            with suppress(OSError):
                folder.rmdir()


@contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """Yield an empty folder that a hidden folder in *parent* holds; delete both at the end.

    The caller keeps it by renaming it. What killed processes left in *parent* is removed first.
    Raises `OSError`.
    """
    remove_leftovers(parent)
    outer, lock = _create_locked_folder(parent)
    try:
        (outer / "content").mkdir()  # the caller may rename it without the lock file beside it
        yield outer / "content"
    finally:
        shutil.rmtree(outer, ignore_errors=True)
        os.close(lock.file)


def _create_locked_folder(parent: Path) -> tuple[Path, Lock]:
    """Create a hidden folder in *parent* that contains a lock file, and lock this file."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=".new-", suffix=PARTIAL, dir=parent))
        try:
            return folder, lock_file(folder / LOCK)
        except FileNotFoundError:  # another process removed it before it was locked
            continue
        except BaseException:  # an interrupt must not leave the folder
            shutil.rmtree(folder, ignore_errors=True)
            raise


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files and folders in *folder* whose processes have ended.

    On a file system without locks, the files stay, because another process may write them.
    """
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in list(entries):
            path = Path(entry.path)
            if _LEFT_FILE.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                with lock_if_abandoned(path) as is_abandoned:
                    if is_abandoned:
                        path.unlink(missing_ok=True)
            elif _LEFT_FOLDER.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                with lock_if_abandoned(path / LOCK) as is_abandoned:
                    # Without a lock file, its process has ended or will create another folder.
                    if is_abandoned or not os.path.lexists(path / LOCK):
                        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Convert an `OSError` of a block that writes to *path* to `StorageError`, whatever the file is."""
    try:
        yield
    except (FileExistsError, NotADirectoryError) as problem:
        reason = "a file has this name, or the name of a folder above it"
        raise StorageError(f"{path}: cannot be written ({reason}); choose another") from problem
    except OSError as problem:
        raise StorageError(
            f"{path}: cannot be written ({os_reason(problem)}); check "
            "permissions and free space"
        ) from problem


def os_reason(error: OSError) -> str:
    """Return the reason of the operating system, without the text that libraries such as PyArrow add."""
    if error.errno:
        return os.strerror(error.errno)
    return str(error).partition("\n")[0] or type(error).__name__


def open_regular(path: str | Path, buffering: int = -1) -> IO[bytes]:
    """Open a regular file for reading in binary mode.

    Raises `OSError`, also for a FIFO, socket or device, because opening or reading it may wait
    forever.
    """
    mode = os.stat(path).st_mode  # noqa: PTH116 - `path` may be text
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # `open` rejects a folder
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return open(path, "rb", buffering)  # noqa: PTH123


def read_file(path: str | Path, limit: int) -> bytes:
    """Read the regular file at *path*, of at most *limit* bytes; raises `OSError`, also for a larger one.

    All readers of files that users name call it, or `open_regular` and `read_at_most`.
    """
    with open_regular(path, buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        content = b"" if size > limit else read_at_most(file, limit + 1)
    if size > limit or len(content) > limit:
        raise OSError(errno.EFBIG, f"larger than {limit:,} bytes, the limit", str(path))
    if content.startswith(POINTER):
        raise PointerError(errno.EINVAL, POINTER_ADVICE, str(path))
    return content


class PointerError(OSError):
    """A file of a repository that Git LFS has not fetched."""


def is_pointer(path: Path) -> bool:
    """Tell whether the file at *path* is a pointer of Git LFS; a file that cannot be read is none."""
    with suppress(OSError), open_regular(path) as file:
        return file.read(len(POINTER)) == POINTER
    return False


def advise_on(error: OSError, otherwise: str) -> str:
    """Say why a file cannot be read, and what to do: fetch it, check its permissions, or *otherwise*."""
    if isinstance(error, PointerError):
        return POINTER_ADVICE
    advice = "check its permissions" if isinstance(error, PermissionError) else otherwise
    return f"cannot be read ({error.strerror or error}); {advice}"


def read_checked(path: Path, limit: int) -> bytes | None:
    """Read what `write_checked` wrote, of at most *limit* bytes; None if it is missing or damaged."""
    try:
        content = read_file(path, limit)
    except OSError:
        return None
    is_whole = int.from_bytes(content[:_CHECKSUM_BYTES]) == crc32(content[_CHECKSUM_BYTES:])
    return content[_CHECKSUM_BYTES:] if is_whole else None


def write_checked(path: Path, content: bytes) -> None:
    """Write a checksum and *content* to *path*, in a folder of this user alone; raises `OSError`."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with atomic_write(path) as partial:
        partial.write_bytes(crc32(content).to_bytes(_CHECKSUM_BYTES) + content)


def read_text(path: str | Path, limit: int = MAX_TEXT_BYTES) -> str:
    """Read a file of at most *limit* bytes in UTF-8, without a byte order mark; raises `OSError`, `ValueError`."""
    return read_file(path, limit).decode("utf-8-sig").replace("\r\n", "\n")


def read_at_most(file: IO[bytes], limit: int) -> bytes:
    """Read the rest of *file*, at most *limit* bytes; the memory depends on the content, not on *limit*."""
    content = bytearray()
    # A piece is empty at the end of the file, and at *limit*.
    while piece := file.read(min(limit - len(content), BLOCK_BYTES)):
        content += piece
    return bytes(content)


def expand_user(path: Path | str) -> Path:
    """Replace `~` or `~user` at the beginning of *path*; the path of an unknown user stays as it is."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 - pathlib raises RuntimeError for an unknown user


def features_folder() -> Path:
    """Return the folder of cached features, `sopdeploy/features` below XDG_CACHE_HOME or `~/.cache`."""
    root = expand_user(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return root / "sopdeploy" / "features"


def link_latest(target: Path) -> None:
    """Make `latest` beside *target* a link to it, in one step; a file or folder of that name stays."""
    link = target.with_name(LATEST)
    is_no_link = link.exists() and not link.is_symlink()
    if target.name == LATEST or is_no_link:
        return

    try:
        move_link(link, target_of(link, target))
    except OSError as error:
        log.warning("%s: this link cannot be made (%s); use %s", link, os_reason(error), target)


def move_link(link: Path, target: str) -> None:
    """Make *link* a link to *target*, in one step; raises `OSError`."""
    with temporary_folder(link.parent) as folder:
        (folder / link.name).symlink_to(target)
        (folder / link.name).replace(link)


def target_of(link: Path, path: Path) -> str:
    """Return where *link* must lead to reach *path*: through no other link, so never to itself."""
    return os.path.relpath(os.path.realpath(path), os.path.realpath(link.parent))


def sha256(path: Path) -> str:
    """Compute the sha256 of the file at *path* as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def has_manifest(path: Path) -> bool:
    """Check whether *path* is the folder of a bundle, complete or not; reads no file."""
    return holds_file(path, MANIFEST)


def holds_file(folder: Path, name: str) -> bool:
    """Check whether *folder* has a file *name*; false if the path is too long."""
    return os.path.isfile(folder / name)  # noqa: PTH113 - `Path.is_file` raises `OSError`


def holds_output(path: Path) -> bool:
    """Check whether the folder *path* is a bundle or a run, or holds some and so has the link `latest`."""
    return any(
        all(holds_file(folder, name) for name in names)
        for folder in (path, path / LATEST)
        for names in ((MANIFEST, GRAPH), (BEST,), (LAST,))
    )
