"""A folder of kept photographs with a limit in bytes and in days; one process writes to it.

Every file is written under a temporary name and then renamed, the photograph before its record. What a killed
process leaves is deleted at the next start. A file counts as whole blocks, as on most file systems.

Photographs may be the only copies of their owners, so no clock deletes them. The age of a photograph is the
time during which a keeper has run since it was kept, by the monotonic clock, in steps of limited length.
`.ages` has the counted seconds. Without it, as after a copy without hidden files, all ages begin anew.
"""

import logging
import os
import re
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import pydantic

from sopdeploy.config import StrictModel
from sopdeploy.errors import ConfigError, StorageError
from sopdeploy.file_systems import lock_file, set_mode
from sopdeploy.files import (
    LOCK,
    PARTIAL,
    atomic_write,
    new_folder,
    open_regular,
    read_at_most,
    remove_leftovers,
    writing,
)
from sopdeploy_service.second_week.kept import NEAR_BITS, KeptRecord, Reason, read_kept

KeptResult = Literal["kept", "near_duplicate", "dropped", "failed"]
Deletion = Literal["expired", "no_room", "incomplete"]
FILE_BLOCK = 4096  # bytes
CHECK_SECONDS = 60.0  # between two checks of the ages; less if photographs are kept for a short time
MAX_STEP = 2.0  # intervals of checks that count between two checks; a machine that slept counts no more
SAVE_SECONDS = 600.0  # counted between two writes of the ages, which a process that is killed loses
AGES, MAX_AGES_BYTES = ".ages", 1 << 26
SAMPLE_SHARE = 0.5  # of the bytes; with more, the uniform sample makes room
_SUFFIXES = ".jpg", ".png"
_OWN = re.compile(rf"[0-9a-f]{{32}}\.(?:jpg|png|json)(?:(?:\.[0-9a-f]{{8}})?{re.escape(PARTIAL)})?")

log = logging.getLogger("sopdeploy.keep")


Seconds = Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)]


class Ages(StrictModel):
    """Content of `.ages`.

    Attributes:
        counted: Seconds that keepers of this folder have run, all together.
        kept_at: What `counted` was when each photograph was kept, by its name.
    """

    version: Literal[1] = 1
    counted: Seconds = 0.0
    kept_at: dict[str, Seconds] = pydantic.Field(default_factory=dict)


class _Entry(NamedTuple):
    """A kept photograph: `kept_at` are counted seconds, `near_hash` is a number, `bytes` of both files."""

    path: Path
    kept_at: float
    near_hash: int
    reasons: frozenset[str]
    bytes: int


class KeptFolder:
    """Keeps photographs in *path*, at most *max_bytes*, each for *days* in which it runs; not thread-safe.

    The oldest one with the fewest reasons makes room; but while the uniform sample has more than
    `SAMPLE_SHARE` of the bytes or nothing else is kept, the oldest one of the sample does.
    """

    def __init__(
        self, path: Path, max_bytes: int, days: float, on_delete: Callable[[Deletion], None] = lambda _: None
    ) -> None:
        """Reserve *path* for this process, and create it if needed; only its owner can read the files.

        *on_delete* is called for each photograph that was deleted. Raises `StorageError` if the folder cannot
        be written or locked, and `ConfigError` if another process keeps photographs there.
        """
        self.path, self._max_bytes, self._age = path, max_bytes, days * 86_400
        self._entries: dict[str, _Entry] = {}  # by name, the oldest first
        self._failed = False  # whether the last write failed
        self._on_delete = on_delete
        self._counted = self._saved = 0.0  # seconds that keepers of this folder have run, and those in `AGES`
        self._ticked = time.monotonic()
        with ExitStack() as opened:
            with writing(path):
                opened.enter_context(new_folder(path, 0o700))
                try:
                    lock = lock_file(path / LOCK, 0o600)
                except BlockingIOError as error:
                    message = f"{path}: another process keeps photographs there; name another folder"
                    raise ConfigError(message) from error
            opened.callback(os.close, lock.file)
            if lock.failure:  # two servers would delete what the other one writes
                (path / LOCK).unlink()
                raise StorageError(
                    f"{path}: its file system has no locks ({lock.failure}), which keep other servers out; "
                    "keep photographs on another file system"
                )
            with writing(path):
                self._load()
                self._delete_incomplete()
                self.expire()
                self._make_room(0)
            opened.pop_all()
        weakref.finalize(self, os.close, lock.file)  # which releases the lock

    @property
    def used(self) -> int:
        """Bytes of the kept photographs, also of one that is being written."""
        return sum(entry.bytes for entry in self._entries.values())

    def _load(self) -> None:
        """Fill the entries from the complete photographs; an age that is not known begins now."""
        kept, ages = read_kept(self.path), self._read_ages()
        if ages is None and kept:
            log.warning("%s: the ages of %d photographs are not known; they begin now", self.path, len(kept))
        ages = ages or Ages()
        self._counted = self._saved = ages.counted
        kept_at = {path.name: ages.kept_at.get(path.name, ages.counted) for path, _ in kept}
        for path, record in sorted(kept, key=lambda entry: kept_at[entry.path.name]):  # stable
            files = path, path.with_suffix(".json")
            size = sum(_size_on_disk(file.stat().st_size) for file in files)
            self._insert(path, record, size, kept_at[path.name])

    def _read_ages(self) -> Ages | None:
        """Read `AGES`; None if it is missing or damaged."""
        try:
            with open_regular(self.path / AGES) as file:
                ages = Ages.model_validate_json(read_at_most(file, MAX_AGES_BYTES))
        except (OSError, pydantic.ValidationError):
            return None
        is_valid = all(kept_at <= ages.counted for kept_at in ages.kept_at.values())
        return ages if is_valid else None

    def _delete_incomplete(self) -> None:
        """Delete photographs without a record, records without a photograph, and partial files.

        Files that no `KeptFolder` wrote stay, and damaged records with their photographs.
        """
        remove_leftovers(self.path)
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

        The record of a kept image is replaced if it has a new reason. Those of the uniform sample may be
        near-duplicates. The first write that fails is logged, and the next one that succeeds.
        """
        try:
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
        return min(CHECK_SECONDS, max(1.0, self._age / 10))

    def check(self) -> None:
        """Delete photographs that are too old, and forget those that others have deleted or labelled."""
        for entry in list(self._entries.values()):
            self._forget_if_gone(entry)
        self.expire()

    def has_near(self, name: str, reasons: Sequence[Reason], near_hash: str) -> bool:
        """Tell whether the file *name*, without suffix, is kept for *reasons*, or a near-duplicate of it.

        Those of the uniform sample may be near-duplicates, so that it shows all photographs. Entries whose
        photograph is gone do not count and are forgotten.
        """
        for suffix in _SUFFIXES:
            previous = self._entries.get(f"{name}{suffix}")
            if previous is not None and not self._forget_if_gone(previous):
                return previous.reasons.issuperset(reasons)
        if "sample" in reasons:
            return False
        number = int(near_hash, 16)
        near = [one for one in self._entries.values() if (number ^ one.near_hash).bit_count() <= NEAR_BITS]
        return any(not self._forget_if_gone(one) for one in near)

    def _forget_if_gone(self, entry: _Entry) -> bool:
        """Forget *entry* if others have deleted or labelled its photograph; return whether they have."""
        is_gone = not entry.path.exists()
        if is_gone:
            del self._entries[entry.path.name]
        return is_gone

    def expire(self) -> None:
        """Count the time since the last call, and delete photographs that are too old; raises `OSError`.

        The counted time is written to `AGES` from time to time.
        """
        now = time.monotonic()
        step = min(max(0.0, now - self._ticked), MAX_STEP * self.check_seconds)
        self._ticked = now
        self._counted += step
        if self._counted - self._saved >= min(SAVE_SECONDS, self._age / 10):
            kept_at = {name: entry.kept_at for name, entry in self._entries.items()}
            content = Ages(counted=self._counted, kept_at=kept_at).model_dump_json().encode()
            _write(self.path / AGES, content)
            self._saved = self._counted
        old = [one for one in self._entries.values() if self._counted - one.kept_at > self._age]
        self._delete_for("expired", old)

    def _delete_for(self, reason: Deletion, entries: list[_Entry]) -> None:
        """Delete the photographs of *entries*, report each to `on_delete`, and log how many they are."""
        for entry in entries:
            self._delete(entry)
            self._on_delete(reason)
        if entries:
            log.info("deleted photographs", extra={"reason": reason, "photographs": len(entries)})

    def _add(self, image: bytes, record: KeptRecord) -> KeptResult:
        """Keep *image* as `add` does, and make room for it first; raises `OSError`."""
        path = self.path / record.image
        if self.has_near(path.stem, record.reasons, record.near_hash):
            return "near_duplicate"
        previous = self._entries.get(path.name)  # of the same image: the name is a hash of the original bytes
        if previous is not None:
            reasons = tuple(sorted(previous.reasons.union(record.reasons)))
            record = record.model_copy(update={"reasons": reasons})
        content = record.model_dump_json().encode()
        size = _size_on_disk(len(image)) + _size_on_disk(len(content))
        if size > self._max_bytes:
            return "dropped"
        if previous is not None:
            return self._replace_record(previous, record, content)
        self._make_room(size)
        entry = self._insert(path, record, size, self._counted)
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
        entry = self._insert(previous.path, record, size, self._counted)
        if self._forget_if_gone(entry):  # deleted or labelled meanwhile
            previous.path.with_suffix(".json").unlink(missing_ok=True)
            return "dropped"
        return "kept"

    def _insert(self, path: Path, record: KeptRecord, size: int, kept_at: float) -> _Entry:
        """Add an entry as the last one, which is the newest."""
        entry = _Entry(path, kept_at, int(record.near_hash, 16), frozenset(record.reasons), size)
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
        """Delete the files of *entry*, the record first, and forget it."""
        for file in (entry.path.with_suffix(".json"), entry.path):
            file.unlink(missing_ok=True)
        del self._entries[entry.path.name]


def _write(file: Path, content: bytes) -> None:
    """Write *content* to *file* in one step; only its owner can read it."""
    with atomic_write(file) as partial:
        set_mode(partial, 0o600)
        partial.write_bytes(content)


def _size_on_disk(size: int) -> int:
    return -(-size // FILE_BLOCK) * FILE_BLOCK  # rounded up
