"""A folder of kept photographs with a limit in bytes and in days; one process writes to it.

Every file is written under a temporary name and then renamed, the photograph before its record. What a killed
process leaves is deleted at the next start. A file counts as whole blocks, as on most file systems.
"""

import fcntl
import logging
import os
import re
import weakref
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal, NamedTuple

from sopdeploy.errors import ConfigError
from sopdeploy.files import PARTIAL, atomic_write, writing
from sopdeploy.kept import LOCK, NEAR_BITS, KeptRecord, read_kept

KeptResult = Literal["kept", "near_duplicate", "dropped", "failed"]
FILE_BLOCK = 4096  # bytes
SAMPLE_SHARE = 0.5  # of the bytes; with more, the uniform sample makes room
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

    def __init__(self, path: Path, max_bytes: int, days: float) -> None:
        """Reserve *path* for this process, and create it if needed; only its owner can read the files.

        Raises `ConfigError` if it cannot be written, or if another process keeps photographs there.
        """
        self.path, self._max_bytes, self._age = path, max_bytes, timedelta(days=days)
        self._entries: dict[str, _Entry] = {}  # by name, the oldest first
        self._failed = False  # whether the last write failed
        with writing(path, ConfigError):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
            weakref.finalize(self, os.close, lock)  # which releases the lock
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                message = f"{path}: another process keeps photographs there; name another folder"
                raise ConfigError(message) from error
            self._read()
            self._expire()
            self._make_room(0)

    @property
    def used(self) -> int:
        """Bytes of the kept photographs, also of one that is being written."""
        return sum(entry.bytes for entry in self._entries.values())

    def _read(self) -> None:
        """Read the records; delete photographs without a record, records without a photograph, partial files.

        Files that no `KeptFolder` wrote stay, and damaged records with their photographs.
        """
        complete: set[Path] = set()
        for path, record in read_kept(self.path):
            files = path, path.with_suffix(".json")
            self._insert(path, record, sum(_size_on_disk(file.stat().st_size) for file in files))
            complete.update(files)
        for file in set(self.path.iterdir()) - complete:
            if _OWN.fullmatch(file.name) is None:
                continue
            partners = (".jpg", ".png") if file.suffix == ".json" else (".json",)
            has_partner = any(file.with_suffix(suffix).exists() for suffix in partners)
            if file.suffix == PARTIAL or not has_partner:
                file.unlink()

    def add(self, image: bytes, record: KeptRecord) -> KeptResult:
        """Keep *image* unless it is a near-duplicate or too large; return what was done.

        An image that is kept is replaced if it has a new reason. Those of the uniform sample may be
        near-duplicates. The first write that fails is logged, and the next one that succeeds.
        """
        try:
            self._expire()
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

    def _expire(self) -> None:
        """Delete photographs that are too old."""
        earliest = datetime.now(UTC) - self._age
        for entry in [entry for entry in self._entries.values() if entry.time < earliest]:
            self._delete(entry)

    def _add(self, image: bytes, record: KeptRecord) -> KeptResult:
        """Keep *image* as `add` does; raises `OSError`."""
        path = self.path / record.image
        previous = self._entries.get(path.name)  # of the same image: the name is a hash of the original bytes
        if previous is not None:
            if previous.reasons.issuperset(record.reasons):
                return "near_duplicate"
            reasons = tuple(sorted(previous.reasons.union(record.reasons)))
            record = record.model_copy(update={"reasons": reasons})
        elif "sample" not in record.reasons:  # the sample shows all photographs, with their near-duplicates
            near_hash = int(record.near_hash, 16)
            if any((near_hash ^ one.near_hash).bit_count() <= NEAR_BITS for one in self._entries.values()):
                return "near_duplicate"
        # The photograph is written first: its record shows that it is complete.
        files = {path: image, path.with_suffix(".json"): record.model_dump_json().encode()}
        size = sum(_size_on_disk(len(content)) for content in files.values())
        if size > self._max_bytes:
            return "dropped"
        if previous is not None:
            self._delete(previous)  # so that its bytes do not count, and its place in the order is the last
        self._make_room(size)
        entry = self._insert(path, record, size)
        try:
            for file, content in files.items():
                with atomic_write(file) as partial:
                    partial.touch(0o600)
                    partial.write_bytes(content)
        except OSError:
            self._delete(entry)
            raise
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
                self._delete(sample[0])  # the oldest one
            else:  # the first one with the fewest reasons, which is the oldest of those
                self._delete(min(others, key=lambda entry: len(entry.reasons)))

    def _delete(self, entry: _Entry) -> None:
        """Delete the files of *entry*, the record first."""
        for file in (entry.path.with_suffix(".json"), entry.path):
            file.unlink(missing_ok=True)
        del self._entries[entry.path.name]


def _size_on_disk(size: int) -> int:
    return -(-size // FILE_BLOCK) * FILE_BLOCK  # rounded up
