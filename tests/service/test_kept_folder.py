"""The folder of kept photographs stays within its limits, whatever happens to its process or its disk."""

import errno
import gc
import logging
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial, partialmethod
from pathlib import Path

import pytest

from sopdeploy.errors import ConfigError
from sopdeploy.kept import KeptRecord, read_kept
from sopdeploy_service import kept_folder
from sopdeploy_service.kept_folder import FILE_BLOCK, KeptFolder
from tests.sopdeploy.test_kept import record_of

ROOT = Path(__file__).parents[2]
PHOTO = b"x" * FILE_BLOCK  # one block, and one for its record
PAIR = 2 * FILE_BLOCK


def photo(number: int, *reasons: str, **changes: object) -> KeptRecord:
    """A record of today whose hash differs from those of other numbers below 16."""
    name, near_hash = f"{number:032x}", f"{number:x}" * 16
    given = {"time": datetime.now(UTC), "reasons": reasons or ("low_margin",), "near_hash": near_hash}
    return record_of(name, **given | changes)


def numbers(folder: Path) -> list[int]:
    return sorted(int(path.stem, 16) for path, _ in read_kept(folder))


def size_of(folder: Path) -> int:
    blocks = (-(-file.stat().st_size // FILE_BLOCK) for file in folder.iterdir())
    return sum(blocks) * FILE_BLOCK


# Reasons of the photographs in the order in which they arrive, and which of them remain of room for three.
EVICTIONS = {
    "oldest first": ([["unknown"]] * 5, [2, 3, 4]),
    "fewest reasons first": ([["unknown", "low_margin"], ["unknown"], ["unknown"], ["unknown"]], [0, 2, 3]),
    "a small sample stays": ([["sample"], *[["unknown", "low_margin"]] * 5], [0, 4, 5]),
    "a large sample makes room": ([["sample"], ["sample"], ["unknown"], ["unknown"]], [1, 2, 3]),
    "of the sample only age counts": (
        [["sample", "unknown", "low_margin"], ["sample"], ["sample"], ["sample"]],
        [1, 2, 3],
    ),
}


@pytest.mark.parametrize(("arriving", "remaining"), EVICTIONS.values(), ids=EVICTIONS)
def test_the_oldest_with_the_fewest_reasons_makes_room(tmp_path: Path, arriving, remaining) -> None:
    kept = KeptFolder(tmp_path, 3 * PAIR, 30)
    for number, reasons in enumerate(arriving):
        assert kept.add(PHOTO, photo(number, *reasons)) == "kept"
    assert numbers(tmp_path) == remaining


def test_the_limit_holds_before_and_after_every_step(tmp_path: Path, monkeypatch) -> None:
    limit, sizes = 3 * PAIR + FILE_BLOCK, []

    def checked(original: Callable[..., object], path: Path, *values: object, **options: object) -> object:
        result = original(path, *values, **options)
        sizes.append(size_of(tmp_path))
        return result

    for name in ("touch", "write_bytes", "replace", "unlink"):
        monkeypatch.setattr(Path, name, partialmethod(partial(checked, getattr(Path, name))))
    kept = KeptFolder(tmp_path, limit, 30)
    for number in range(16):
        image = PHOTO * (1 + number % 3)
        kept.add(image, photo(number, "sample" if number % 4 else "unknown"))
        kept.add(image, photo(number, "low_margin"))
        assert kept.used == size_of(tmp_path)
    assert max(sizes) == limit
    assert kept.add(PHOTO * 8, photo(1, "unknown")) == "dropped"  # larger than the limit
    assert kept.used == size_of(tmp_path)


def test_near_duplicates_are_skipped_unless_they_belong_to_the_sample(tmp_path: Path) -> None:
    kept = KeptFolder(tmp_path, 100 * PAIR, 30)
    near, far = "0" * 15 + "f", "0" * 14 + "1f"  # four and five bits
    assert kept.add(PHOTO, photo(0)) == "kept"
    assert kept.add(PHOTO, photo(1, near_hash=near)) == "near_duplicate"
    assert kept.add(PHOTO, photo(2, near_hash=far)) == "kept"
    assert kept.add(PHOTO, photo(3, "sample", near_hash=near)) == "kept"
    assert kept.add(PHOTO, photo(3, "sample", near_hash=near)) == "near_duplicate"
    assert numbers(tmp_path) == [0, 2, 3]


def test_a_copy_adds_its_reasons(tmp_path: Path) -> None:
    kept = KeptFolder(tmp_path, 100 * PAIR, 30)
    kept.add(PHOTO, photo(0, "low_margin"))
    assert kept.add(PHOTO, photo(0, "low_margin", "unknown", bundle="new")) == "kept"
    ((_, record),) = read_kept(tmp_path)
    assert (set(record.reasons), record.bundle) == ({"low_margin", "unknown"}, "new")
    assert kept.used == PAIR


def test_old_photographs_are_deleted_at_the_start_and_with_the_next_one(tmp_path: Path) -> None:
    ages = [timedelta(days=31), timedelta(days=29.5), timedelta(0)]
    kept = KeptFolder(tmp_path, 100 * PAIR, 40)
    for number, age in enumerate(ages):
        reason = "sample" if number == 1 else "unknown"
        kept.add(PHOTO, photo(number, reason, time=datetime.now(UTC) - age))
    assert numbers(tmp_path) == [0, 1, 2]
    del kept
    gc.collect()  # closes the lock
    kept = KeptFolder(tmp_path, 100 * PAIR, 30)
    assert numbers(tmp_path) == [1, 2]
    kept._age = timedelta(days=29)
    kept.add(PHOTO, photo(3))
    assert numbers(tmp_path) == [2, 3]


def test_a_start_counts_what_exists_and_deletes_only_what_is_incomplete(tmp_path: Path) -> None:
    kept = KeptFolder(tmp_path, 100 * PAIR, 30)
    for number in range(4):
        kept.add(PHOTO, photo(number))
    del kept
    gc.collect()
    own = [f"{8:032x}.jpg", f"{9:032x}.png.partial", f"{1:032x}.json.partial", f"{10:032x}.json"]
    later = [f"{11:032x}.jpg", f"{11:032x}.json"]  # a record of a later version
    foreign = ["photo.jpg", "notes.json", "x.partial", f"{7:032x}.gif", f"{7:031x}.jpg", *later]
    for name in (*own, *foreign):
        (tmp_path / name).write_bytes(b"1")
    (tmp_path / "folder").mkdir()
    kept = KeptFolder(tmp_path, 3 * PAIR + len(foreign) * FILE_BLOCK, 30)
    names = {file.name for file in tmp_path.iterdir()}
    assert not names.intersection(own)
    assert names.issuperset(foreign)
    assert numbers(tmp_path) == [1, 2, 3]
    kept.add(PHOTO, photo(4))
    assert numbers(tmp_path) == [2, 3, 4]


def test_other_files_that_fill_the_folder_stay(tmp_path: Path) -> None:
    (tmp_path / "film.mov").write_bytes(PHOTO * 4)
    kept = KeptFolder(tmp_path, 4 * FILE_BLOCK, 30)
    assert kept.add(PHOTO, photo(0)) == "dropped"
    assert [file.name for file in tmp_path.iterdir() if file.name != ".lock"] == ["film.mov"]


def test_only_the_owner_can_read(tmp_path: Path) -> None:
    folder, mask = tmp_path / "new" / "kept", os.umask(0)
    try:
        KeptFolder(folder, 100 * PAIR, 30).add(PHOTO, photo(0))
    finally:
        os.umask(mask)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {0o600}


def test_a_folder_has_one_writer(tmp_path: Path) -> None:
    first = KeptFolder(tmp_path, PAIR, 30)
    with pytest.raises(ConfigError, match="another process keeps photographs there; name another folder"):
        KeptFolder(tmp_path, PAIR, 30)
    assert first.add(PHOTO, photo(0)) == "kept"


def test_a_folder_that_cannot_be_made_is_an_error_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        KeptFolder(tmp_path / "file" / "kept", PAIR, 30)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_full_disk_stops_keeping_with_one_warning_until_it_works_again(
    tmp_path: Path, monkeypatch, caplog, code
) -> None:
    kept = KeptFolder(tmp_path, 100 * PAIR, 30)
    kept.add(PHOTO, photo(0))
    tried = []

    def fail(path: Path, content: bytes) -> None:
        tried.append(path)
        with path.open("wb") as file:
            file.write(content[:100])
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as full, caplog.at_level(logging.WARNING, "sopdeploy.keep"):
        full.setattr(Path, "write_bytes", fail)
        assert [kept.add(PHOTO, photo(number)) for number in (1, 2)] == ["failed", "failed"]
        assert len(tried) == 1
        full.setattr(kept_folder, "PAUSE_SECONDS", 0.0)
        assert kept.add(PHOTO, photo(3)) == "failed"
        assert len(tried) == 2
        assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert (numbers(tmp_path), len(list(tmp_path.glob("*"))), kept.used) == ([0], 3, PAIR)
    monkeypatch.setattr(kept_folder, "PAUSE_SECONDS", 0.0)
    assert kept.add(PHOTO, photo(4)) == "kept"
    assert numbers(tmp_path) == [0, 4]


def test_a_process_killed_at_any_step_leaves_no_half_photograph(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.service.killed_while_keeping", str(tmp_path)]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    lines = [line.split() for line in printed.splitlines()]
    assert [line for line in lines if line[1] != "True"] == []
    assert int(lines[-1][0]) > 15  # steps
