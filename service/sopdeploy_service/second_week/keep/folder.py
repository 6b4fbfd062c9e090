"""A folder of kept photographs with a limit in bytes and in days; one process writes to it.

Every file is written under a temporary name and then renamed, the photograph before its record. What a killed
process leaves is deleted at the next start. A file counts as whole blocks, as on most file systems.

Photographs may be the only copies of their owners, so a wrong clock must not delete them. The modification
time of the lock file is the time of the last check of their ages. If the clock is before it or before a
photograph, or after the time in which only few of them can have expired, none expires.
"""

import fcntl
import logging
import os
import re
import weakref
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from shlex import quote
from typing import Literal, NamedTuple

from sopdeploy.errors import ConfigError
from sopdeploy.files import PARTIAL, atomic_write, writing
from sopdeploy_service.second_week.kept import LOCK, NEAR_BITS, KeptRecord, Reason, read_kept

KeptResult = Literal["kept", "near_duplicate", "dropped", "failed"]
Deletion = Literal["expired", "no_room", "incomplete"]
FILE_BLOCK = 4096  # bytes
CHECK_SECONDS = 60.0  # between two checks of the ages; less if photographs are kept for a short time
MAX_ABSENCE = timedelta(days=2)  # that is accepted since the last check, or `ABSENCE_SHARE` of their age
ABSENCE_SHARE = 0.25
CLOCK_STEP = timedelta(seconds=60)  # by which a clock may be set back
SAMPLE_SHARE = 0.5  # of the bytes; with more, the uniform sample makes room
_SUFFIXES = ".jpg", ".png"
_OWN = re.compile(rf"[0-9a-f]{{32}}\.(?:jpg|png|json)(?:{re.escape(PARTIAL)})?")

log = logging.getLogger("sopdeploy.keep")


class _Entry(NamedTuple):
    """A kept photograph: `near_hash` is a number, `bytes` are those of both files."""

    path: Path
    time: datetime
    near_hash: int
    reasons: frozenset[str]
    bytes: int


class KeptFolder:
    """Keeps photographs in *path*, at most *max_bytes*, each for *days*; not thread-safe.

    The oldest one with the fewest reasons makes room; but while the uniform sample has more than
    `SAMPLE_SHARE` of the bytes or nothing else is kept, the oldest one of the sample does.
    """

    def __init__(
        self, path: Path, max_bytes: int, days: float, on_delete: Callable[[Deletion], None] = lambda _: None
    ) -> None:
        """Reserve *path* for this process, and create it if needed; only its owner can read the files.

        *on_delete* is called for each photograph that was deleted. Raises `StorageError` if the folder cannot
        be written, and `ConfigError` if another process keeps photographs there.
        """
        self.path, self._max_bytes, self._age = path, max_bytes, timedelta(days=days)
        self._entries: dict[str, _Entry] = {}  # by name, the oldest first
        self._failed = False  # whether the last write failed
        self._on_delete = on_delete
        self._clock_problem = ""  # why no photograph expires; empty if they do
        with writing(path):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            was_here = (path / LOCK).exists()
            lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
            weakref.finalize(self, os.close, lock)  # which releases the lock
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                message = f"{path}: another process keeps photographs there; name another folder"
                raise ConfigError(message) from error
            self._read()
            self._delete_incomplete()
            if not was_here and self._entries:  # as after a copy: the newest photograph shows the last run
                self._checked_at(max(entry.time for entry in self._entries.values()))
            self.expire()
            self._make_room(0)

    @property
    def used(self) -> int:
        """Bytes of the kept photographs, also of one that is being written."""
        return sum(entry.bytes for entry in self._entries.values())

    def _read(self) -> None:
        """Read the records of the complete photographs."""
        for path, record in read_kept(self.path):
            files = path, path.with_suffix(".json")
            self._insert(path, record, sum(_size_on_disk(file.stat().st_size) for file in files))

    def _delete_incomplete(self) -> None:
        """Delete photographs without a record, records without a photograph, and partial files.

        Files that no `KeptFolder` wrote stay, and damaged records with their photographs.
        """
        photographs = {entry.path for entry in self._entries.values()}
        complete = photographs | {path.with_suffix(".json") for path in photographs}
        for file in set(self.path.iterdir()) - complete:
            if _OWN.fullmatch(file.name) is None:
                continue
            partners = _SUFFIXES if file.suffix == ".json" else (".json",)
            has_partner = any(file.with_suffix(suffix).exists() for suffix in partners)
            if file.suffix == PARTIAL or not has_partner:
                file.unlink()
                log.warning("deleted %s, which is incomplete", file)
                self._on_delete("incomplete")

    def add(self, image: bytes, record: KeptRecord) -> KeptResult:
        """Keep *image* unless it is a near-duplicate or too large; return what was done.

        An image that is kept is replaced if it has a new reason. Those of the uniform sample may be
        near-duplicates. The first write that fails is logged, and the next one that succeeds.
        """
        try:
            self.expire()
            result = self._add(image, record)
        except OSError as error:
            if not self._failed:
                log.warning("%s: cannot be written (%s); no photograph is kept", self.path, error.strerror)
            self._failed = True
            return "failed"
        if self._failed:
            log.warning("%s: can be written again", self.path)
        self._failed = False
        return result

    @property
    def check_seconds(self) -> float:
        """Seconds after which `check` should be called again."""
        return min(CHECK_SECONDS, max(1.0, self._age.total_seconds() / 10))

    def check(self) -> None:
        """Delete photographs that are too old, and forget those that others have deleted or labelled."""
        for entry in list(self._entries.values()):
            self._forget_if_gone(entry)
        self.expire()

    def has_near(self, name: str, reasons: Sequence[Reason], near_hash: str) -> bool:
        """Tell whether the file *name*, without suffix, is kept for *reasons*, or a near-duplicate of it.

        Those of the uniform sample may be near-duplicates, so that it shows all photographs.
        """
        for suffix in _SUFFIXES:
            previous = self._entries.get(f"{name}{suffix}")
            if previous is not None and not self._forget_if_gone(previous):
                return previous.reasons.issuperset(reasons)
        number = int(near_hash, 16)
        near = [one for one in self._entries.values() if (number ^ one.near_hash).bit_count() <= NEAR_BITS]
        return "sample" not in reasons and any(not self._forget_if_gone(one) for one in near)

    def _forget_if_gone(self, entry: _Entry) -> bool:
        """Forget *entry* if others have deleted or labelled its photograph; return whether they have."""
        is_gone = not entry.path.exists()
        if is_gone:
            del self._entries[entry.path.name]
        return is_gone

    def expire(self) -> None:
        """Delete photographs that are too old, unless the clock may be wrong, and record the time."""
        now = datetime.now(UTC)
        problem = self._find_clock_problem(now)
        if problem and not self._clock_problem:
            log.warning("%s: %s; no photograph expires until then", self.path, problem)
        self._clock_problem = problem
        if problem:
            return
        earliest = now - self._age
        self._delete_for("expired", [entry for entry in self._entries.values() if entry.time < earliest])
        self._checked_at(now)

    def _find_clock_problem(self, now: datetime) -> str:
        """Say why *now* may be wrong, and what to do; empty if it is plausible."""
        checked = datetime.fromtimestamp((self.path / LOCK).stat().st_mtime, UTC)
        newest = max(self._entries.values(), key=lambda entry: entry.time, default=None)
        if now < checked - CLOCK_STEP:
            return f"the clock is before {checked:%Y-%m-%d %H:%M}, the last check of ages; correct it"
        if newest is not None and now < newest.time - CLOCK_STEP:
            return f"the clock is before that of {newest.path.name}; correct it, or forget this photograph"
        if now - checked > max(MAX_ABSENCE, self._age * ABSENCE_SHARE):
            return (
                f"the last check of ages was {(now - checked).days} days ago; correct the clock or, if it is "
                f"right, run: touch {quote(str(self.path / LOCK))}"
            )
        return ""

    def _checked_at(self, time: datetime) -> None:
        os.utime(self.path / LOCK, (time.timestamp(), time.timestamp()))

    def _delete_for(self, reason: Deletion, entries: list[_Entry]) -> None:
        """Delete *entries*, and count and log this."""
        for entry in entries:
            self._delete(entry)
            self._on_delete(reason)
        if entries:
            log.info("deleted photographs", extra={"reason": reason, "photographs": len(entries)})

    def _add(self, image: bytes, record: KeptRecord) -> KeptResult:
        """Keep *image* as `add` does; raises `OSError`."""
        path = self.path / record.image
        if self.has_near(path.stem, record.reasons, record.near_hash):
            return "near_duplicate"
        previous = self._entries.get(path.name)  # of the same image: the name is a hash of the original bytes
        if previous is not None:
            reasons = tuple(sorted(previous.reasons.union(record.reasons)))
            record = record.model_copy(update={"reasons": reasons})
        content = record.model_dump_json().encode()
        record_size = _size_on_disk(len(content))
        size = _size_on_disk(len(image)) + record_size
        if size > self._max_bytes:
            return "dropped"
        if previous is not None:
            return self._replace_record(previous, record, content)
        self._make_room(size)
        entry = self._insert(path, record, size)
        try:  # the photograph is written first: its record shows that it is complete
            _write(path, image)
            _write(path.with_suffix(".json"), content)
        except OSError:
            self._delete(entry)
            raise
        return "kept"

    def _replace_record(self, previous: _Entry, record: KeptRecord, content: bytes) -> KeptResult:
        """Write *content*, the *record*, for the photograph of *previous*, which stays if this fails.

        Its place in the order is then the last. Without room for both records, the previous one stays.
        """
        record_size = _size_on_disk(len(content))
        size = _size_on_disk(previous.path.stat().st_size) + record_size
        if size + record_size > self._max_bytes:
            return "near_duplicate"
        del self._entries[previous.path.name]  # so that it does not make room
        try:
            self._make_room(size + record_size)
            _write(previous.path.with_suffix(".json"), content)
        except OSError:
            self._entries[previous.path.name] = previous
            raise
        if self._forget_if_gone(self._insert(previous.path, record, size)):  # deleted meanwhile
            previous.path.with_suffix(".json").unlink(missing_ok=True)
            return "dropped"
        return "kept"

    def _insert(self, path: Path, record: KeptRecord, size: int) -> _Entry:
        entry = _Entry(path, record.time, int(record.near_hash, 16), frozenset(record.reasons), size)
        self._entries[path.name] = entry
        return entry

    def _make_room(self, size: int) -> None:
        """Delete photographs until *size* more bytes fit; *size* is at most the limit."""
        while self.used + size > self._max_bytes:
            sample = [entry for entry in self._entries.values() if "sample" in entry.reasons]
            others = [entry for entry in self._entries.values() if "sample" not in entry.reasons]
            is_sample_large = sum(entry.bytes for entry in sample) > SAMPLE_SHARE * self._max_bytes
            if is_sample_large or not others:
                self._delete_for("no_room", sample[:1])  # the oldest one
            else:  # the first one with the fewest reasons, which is the oldest of those
                self._delete_for("no_room", [min(others, key=lambda entry: len(entry.reasons))])

    def _delete(self, entry: _Entry) -> None:
        """Delete the files of *entry*, the record first."""
        for file in (entry.path.with_suffix(".json"), entry.path):
            file.unlink(missing_ok=True)
        del self._entries[entry.path.name]


def _write(file: Path, content: bytes) -> None:
    with atomic_write(file) as partial:
        partial.touch(0o600)
        partial.write_bytes(content)


def _size_on_disk(size: int) -> int:
    return -(-size // FILE_BLOCK) * FILE_BLOCK  # rounded up
