"""What file systems lack, such as locks and links, and what killed processes leave on them."""

import errno
import fcntl
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sopdeploy.base.file_systems import lock_file
from sopdeploy.base.files import (
    atomic_write,
    link_latest,
    new_folder,
    remove_leftovers,
    temporary_folder,
    writing,
)
from sopdeploy.bundle.publication import staging
from sopdeploy.errors import ConfigError, StorageError
from sopdeploy.training.distributed import Strategy
from sopdeploy.training.records.run_folder import RunFolder
from sopdeploy.weights.checkpoint import write_plain
from tests.support.forged import write_hollow

# Errors of file systems without locks; others raise them for a file of a server that was
# restarted.
NO_LOCKS = [
    errno.ENOLCK,
    errno.ENOSYS,
    errno.EOPNOTSUPP,
    errno.ESTALE,
    errno.EINVAL,
    errno.EBADF,
    errno.EIO,
]
LACKING = [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTTY]
LOST = [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.ESTALE]
NO_LINKS = [
    errno.EPERM,
    errno.EACCES,
    errno.ENOSYS,
    errno.EOPNOTSUPP,
    errno.EINVAL,
    errno.EIO,
    errno.EROFS,
]


def failing(code: int) -> Callable[..., None]:
    def fail(*_values: object, **_options: object) -> None:
        raise OSError(code, os.strerror(code))

    return fail


def write_file(folder: Path) -> None:
    with atomic_write(folder / "a.txt") as partial:
        partial.write_text("content")
    assert (folder / "a.txt").read_text() == "content"


def write_checkpoint(folder: Path) -> None:
    write_plain(folder / "new" / "a.pt", {})
    assert (folder / "new" / "a.pt").stat().st_size > 0


def write_bundle(folder: Path) -> None:
    bundle = write_hollow(folder)
    assert sorted(path.name for path in bundle.iterdir()) == sorted(
        path.name for path in write_hollow(folder.parent / "expected").iterdir()
    )


def begin_run(folder: Path) -> None:
    run = RunFolder(folder / "run", Strategy("cpu"))
    run.lock()
    run.unlock()


def make_latest(folder: Path) -> None:
    (folder / "first").mkdir()
    link_latest(folder / "first")


WRITERS = [write_file, write_checkpoint, write_bundle]
# The operation that fails, its errors, what is done, and the line that tells of it; "" if
# nothing is missing.
SURVIVED: list[tuple[object, str, list[int], list[Callable[[Path], None]], str]] = [
    (fcntl, "flock", NO_LOCKS, [*WRITERS, make_latest], ""),
    (fcntl, "lockf", NO_LOCKS, [begin_run], "this file system has no locks"),
    (os, "fsync", LACKING, WRITERS, ""),
    (os, "symlink", NO_LINKS, [make_latest, write_bundle], "this link cannot be made"),
    (Path, "chmod", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL], WRITERS, ""),
]
SURVIVED_CASES = [
    pytest.param(
        (owner, name),
        code,
        action,
        line,
        id=f"{name}-{errno.errorcode[code]}-{action.__name__}",
    )
    for owner, name, codes, actions, line in SURVIVED
    for code in codes
    for action in actions
]


@pytest.mark.parametrize(("operation", "code", "action", "line"), SURVIVED_CASES)
def test_a_file_system_may_lack_an_operation(
    tmp_path: Path,
    monkeypatch,
    caplog,
    operation: tuple[object, str],
    code: int,
    action,
    line: str,
) -> None:
    owner, name = operation
    (tmp_path / "files").mkdir()
    monkeypatch.setattr(owner, name, failing(code))
    action(tmp_path / "files")
    lines = {record.getMessage().split(": ", 1)[1] for record in caplog.records}

    assert all(found.startswith(line) and os.strerror(code) in found for found in lines)
    assert bool(lines) == bool(line)


FAILED_CASES = [
    pytest.param(
        owner, name, code, action, id=f"{name}-{errno.errorcode[code]}-{action.__name__}"
    )
    for owner, name, codes, actions in [
        (os, "fsync", LOST, [write_checkpoint]),
        (
            Path,
            "replace",
            [errno.EBUSY, errno.ESTALE, errno.EXDEV, errno.EIO],
            [write_checkpoint],
        ),
        (
            Path,
            "mkdir",
            [errno.EROFS, errno.EACCES, errno.ENOSPC],
            [write_checkpoint, begin_run],
        ),
    ]
    for code in codes
    for action in actions
]


@pytest.mark.parametrize(("owner", "name", "code", "action"), FAILED_CASES)
def test_a_disk_that_fails_is_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch, owner: object, name: str, code: int, action
) -> None:
    (tmp_path / "files").mkdir()
    monkeypatch.setattr(owner, name, failing(code))
    with pytest.raises(StorageError, match=os.strerror(code)):
        action(tmp_path / "files")

    is_written = name == "fsync" and action is write_checkpoint
    assert is_written or list((tmp_path / "files").rglob("*")) == []


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        # PyArrow's
        (
            OSError(errno.ENOSPC, "Error writing bytes. Detail: [errno 28]"),
            os.strerror(errno.ENOSPC),
        ),
        (OSError("the connection is closed\nand more"), "the connection is closed"),
    ],
)
def test_the_reason_why_a_file_cannot_be_written_is_the_system_s(
    error: OSError, reason: str
) -> None:
    with pytest.raises(StorageError, match=re.escape(reason)), writing("rows"):
        raise error


def test_an_answer_of_a_server_that_was_lost_is_not_an_error(
    tmp_path: Path, monkeypatch
) -> None:
    def replace_twice(source: Path, target: Path) -> None:
        os.rename(source, target)  # noqa: PTH104 - the server has done it
        raise FileNotFoundError(errno.ENOENT, "No such file or directory")  # and is asked again

    monkeypatch.setattr(Path, "replace", replace_twice)
    write_file(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("of_process", [False, True])
@pytest.mark.parametrize("code", [errno.EAGAIN, errno.EWOULDBLOCK])
def test_only_a_lock_that_is_held_means_another_process(
    tmp_path: Path, monkeypatch, of_process, code
) -> None:
    monkeypatch.setattr(fcntl, "lockf" if of_process else "flock", failing(code))
    with pytest.raises(BlockingIOError):
        lock_file(tmp_path / ".lock", of_process=of_process)


def test_a_lock_file_that_its_owner_deletes_is_created_again(
    tmp_path: Path, monkeypatch
) -> None:
    path = tmp_path / ".lock"
    flock = fcntl.flock

    def lock_after_it_was_deleted(file: int, how: int) -> None:
        monkeypatch.undo()  # only the first time
        path.unlink()
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", lock_after_it_was_deleted)
    lock = lock_file(path)

    assert os.path.samestat(os.fstat(lock.file), path.stat())
    os.close(lock.file)


KILLED = """
import os, signal, sys
from pathlib import Path
from sopdeploy.bundle.publication import staging
from sopdeploy.base.files import atomic_write, temporary_folder
folder, how = Path(sys.argv[1]), sys.argv[2]
kill = lambda: (print(flush=True), input(), os.kill(os.getpid(), signal.SIGKILL))
"""
WRITES = {
    "a file": "with atomic_write(folder / 'a.txt') as partial: partial.write_text('half'); kill()",
    "a file of a long name": "with atomic_write(folder / ('n' * 250)) as partial: kill()",
    "a file that was written twice": (
        "with atomic_write(folder / 'a') as path: path.write_text('1'); path.write_text('22'); kill()"
    ),
    "a bundle": "with staging(folder) as path: (path / 'model.onnx').write_bytes(b'1'); kill()",
    "a bundle with folders": "with staging(folder) as path: (path / '1').mkdir(); kill()",
    "two downloads": "with staging(folder) as one, staging(folder) as two: (one / 'a').touch(); kill()",
    "a link": "with temporary_folder(folder) as path: (path / 'latest').symlink_to('x'); kill()",
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_what_a_killed_process_left_is_removed_by_the_next_one(tmp_path: Path, write) -> None:
    command = [sys.executable, "-c", f"{KILLED}\n{write}", str(tmp_path), ""]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin
        assert process.stdout
        process.stdout.readline()
        unfinished = set(tmp_path.rglob("*"))
        assert unfinished

        # While the process lives, others leave its files alone.
        remove_leftovers(tmp_path)
        with staging(tmp_path), atomic_write(tmp_path / "b.txt"):
            pass
        assert unfinished <= set(tmp_path.rglob("*"))

        # It is killed, and cannot remove them itself.
        process.stdin.write(b"\n")
        process.stdin.flush()
        assert process.wait() == -signal.SIGKILL
        process.stdout.close()
    assert unfinished <= set(tmp_path.rglob("*"))

    # The next process that writes there removes them.
    with temporary_folder(tmp_path):
        pass
    assert not unfinished & set(tmp_path.rglob("*"))


def test_the_first_file_in_a_folder_removes_what_was_left(tmp_path: Path) -> None:
    left = tmp_path / "a.txt.0123abcd.partial"
    left.write_text("half")
    write_file(tmp_path)

    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


OTHERS = [
    "x.partial",
    "movie.download.partial",
    "0123abcd.partial.txt",
    ".new-12345678.partial.d",
    "a.partial.d",
]


@pytest.mark.parametrize("name", OTHERS)
def test_files_of_others_stay(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.mkdir() if name.endswith(".d") else path.write_text("mine")
    remove_leftovers(tmp_path)

    assert path.exists()


def test_without_locks_nobody_knows_what_was_left_so_it_stays(
    tmp_path: Path, monkeypatch
) -> None:
    left = tmp_path / "a.txt.0123abcd.partial"
    left.write_text("half")
    monkeypatch.setattr(fcntl, "flock", failing(errno.ENOLCK))
    remove_leftovers(tmp_path)

    assert left.exists()


def test_a_folder_created_for_nothing_is_removed_with_its_parents(tmp_path: Path) -> None:
    with pytest.raises(ConfigError), new_folder(tmp_path / "a" / "b" / "c"):
        raise ConfigError("wrong")
    assert list(tmp_path.iterdir()) == []

    (tmp_path / "a").mkdir()
    with new_folder(tmp_path / "a" / "b"), new_folder(tmp_path / "a" / "c"):
        (tmp_path / "a" / "c" / "file").touch()

    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "c", "file"]
