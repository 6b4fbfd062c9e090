"""Operations that some file systems lack: locks, flushes and permissions.

File systems of networks, containers and memory cards refuse them with different errors. Only a
lock that another process holds means that it works there; every other error means that this
file system has no locks.
"""

import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

# An operation that the file system does not have; other errors, such as EIO, are those of a
# disk that fails.
LACKING = {
    errno.EINVAL,
    errno.ENOSYS,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.ENOTTY,
    errno.EPERM,
}
# Errors of a flush after which the content may be lost.
LOST = {errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.ESTALE}
_MAX_TRIES = 20  # to lock a file that others delete meanwhile

log = logging.getLogger("sopdeploy.base.files")


class Lock(NamedTuple):
    """An open lock file; `failure` tells why the file system cannot lock it, empty if it is locked."""

    file: int
    failure: str

    def warn_if_unlocked(self, path: Path, advice: str) -> None:
        """Warn in one line that the file system of *path* has no locks, if so, and the *advice*."""
        if self.failure:
            log.warning(
                "%s: this file system has no locks (%s); %s", path, self.failure, advice
            )


def lock_file(
    path: Path, mode: int = 0o666, *, wait: bool = False, of_process: bool = False
) -> Lock:
    """Create the file *path* if needed, open it for reading and writing, and lock it.

    The system releases the lock when the file is closed, also when the process ends in any way.
    With *wait*, it waits for another process. With *of_process*, child processes do not inherit
    the lock. On a file system without locks, the result is open but not locked, and its
    `failure` says why. Raises `BlockingIOError` if another process holds the lock, and `OSError`
    if the file cannot be opened.
    """
    tries = 0
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, mode)
        try:
            failure = _try_lock(file, wait=wait, of_process=of_process)
        except BaseException:  # an interrupt must not leave the file open
            os.close(file)
            raise

        tries += 1
        # Its last owner has deleted it meanwhile, so a new file is locked. A file system that
        # changes inodes makes every file look deleted; the last try counts there.
        is_deleted = not _is_at(file, path)
        if failure or not is_deleted or tries == _MAX_TRIES:
            return Lock(file, failure)
        os.close(file)


@contextmanager
def locked_folder(path: Path) -> Iterator[None]:
    """Lock the folder *path* during the block, once no other process has; no effect if it cannot be locked."""
    folder = None
    with suppress(OSError):  # no such folder, or no permission to read it
        folder = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    try:
        if folder is not None:
            _try_lock(folder, wait=True)
        yield
    finally:
        if folder is not None:
            os.close(folder)


@contextmanager
def lock_if_abandoned(path: Path) -> Iterator[bool]:
    """Yield whether the process that locked *path* has certainly ended; if so, lock it during the block."""
    file = None
    is_abandoned = False
    with suppress(OSError):
        file = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        failure = _try_lock(file)  # raises if the process is alive
        is_abandoned = not failure

    try:
        yield is_abandoned
    finally:
        if file is not None:
            os.close(file)


def flush(file: int) -> None:
    """Write the content of the open *file* to the disk, if the file system can; raises `OSError`."""
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno not in LACKING:
            raise


def flush_folder(path: Path) -> None:
    """Write the names in the folder *path* to the disk, if the file system can; raises `OSError`."""
    try:
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        if error.errno in LOST:  # with any other error, the file system cannot flush folders
            raise


def set_mode(path: Path, mode: int) -> None:
    """Set the permissions of *path*, if the file system has permissions; raises `OSError`."""
    try:
        path.chmod(mode)
    except OSError as error:
        if error.errno not in LACKING:
            raise


def set_owner(path: Path, like: Path) -> None:
    """Give *path* the owner and group of *like*, where there are owners; only root gives files away."""
    with suppress(OSError):
        status = like.stat()
        os.chown(path, status.st_uid, status.st_gid, follow_symlinks=False)


def rename_file(file: int, source: Path, target: Path) -> None:
    """Rename *source*, which is open as *file*, to *target*, also in a network file system; raises `OSError`.

    A network file system that repeats a request whose answer was lost reports that *source*
    does not exist.
    """
    try:
        source.replace(target)
    except FileNotFoundError:
        if not _is_at(file, target):
            raise


def _try_lock(file: int, *, wait: bool = False, of_process: bool = False) -> str:
    """Lock the open *file*; return why the file system cannot, or "". Raises `BlockingIOError`."""
    operation = fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB
    try:
        (fcntl.lockf if of_process else fcntl.flock)(file, operation)
    except BlockingIOError:
        raise
    except OSError as error:
        # For a lock that another process holds, POSIX allows this error, too.
        if of_process and error.errno == errno.EACCES:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN)) from error
        return os.strerror(error.errno or errno.ENOLCK)
    return ""


def _is_at(file: int, path: Path) -> bool:
    """Check whether *path* leads to the open *file*."""
    with suppress(OSError):
        return os.path.samestat(os.fstat(file), os.stat(path))  # noqa: PTH116 - both without `Path`
    return False
