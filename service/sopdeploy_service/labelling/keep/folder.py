"""A folder of kept photographs with a limit in bytes and in days; one process writes to it.

Every file is written under a temporary name and then renamed, the record before its photograph.
So a record without a photograph is what a killed process leaves, or a label that was given; it
is deleted at the next start. A file counts as whole blocks, as on most file systems. A
photograph is as old as its record says.
"""

import logging
import os
import re
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal, NamedTuple

from sopdeploy.errors import ConfigError, StorageError
from sopdeploy.file_systems import lock_file, set_mode
from sopdeploy.files import LOCK, atomic_write, new_folder, remove_leftovers, writing
from sopdeploy.images.near_hash import are_near
from sopdeploy_service.labelling.kept import KeptRecord, read_kept

KeptResult = Literal["kept", "near_duplicate", "dropped", "failed"]
Deletion = Literal["expired", "no_room"]
FILE_BLOCK = 4096  # bytes
CHECK_SECONDS = (
    60.0  # between two checks of the ages; less if photographs are kept for a short time
)
SAMPLE_SHARE = 0.5  # of the bytes; with more, the uniform sample makes room
_SUFFIXES = ".jpg", ".png"
_RECORD = re.compile(r"[0-9a-f]{32}\.json")

log = logging.getLogger("sopdeploy.keep")


class _StoredPhoto(NamedTuple):
    """A kept photograph: `near_hash` is a number, `bytes` of both files, the others are those of its record."""

    path: Path
    time: datetime
    near_hash: int
    reasons: frozenset[str]
    bytes: int
    suggested: str | None


class KeptFolder:
    """Keeps photographs in *path*, at most *max_bytes*, each for *days*; not thread-safe.

    The oldest one outside of the uniform sample makes room; but while the sample has more than
    `SAMPLE_SHARE` of the bytes or nothing else is kept, the oldest one of the sample does.
    """

    def __init__(
        self,
        path: Path,
        max_bytes: int,
        days: float,
        on_delete: Callable[[Deletion], None] = lambda _: None,
    ) -> None:
        """Reserve *path* for this process, and create it if needed; only its owner can read the files.

        *on_delete* is called for each photograph that was deleted. Raises `StorageError` if the
        folder cannot be written or locked, and `ConfigError` if another process keeps
        photographs there.
        """
        self.path = path
        self._max_bytes = max_bytes
        self._max_age = timedelta(days=days)

        self._photos: dict[str, _StoredPhoto] = {}  # by name, the oldest first
        self._failed = False  # whether the last write failed
        self._on_delete = on_delete

        # The lock is held for as long as this object lives.
        with ExitStack() as unless_ready:
            with writing(path):
                unless_ready.enter_context(new_folder(path, 0o700))
                lock = _lock_folder(path)
            unless_ready.callback(os.close, lock)

            # Read what an earlier server has kept, and delete what is incomplete, too old or
            # too much.
            with writing(path):
                self._load()
                remove_leftovers(path)
                self.expire()
                self._make_room(0)
            unless_ready.pop_all()

        weakref.finalize(self, os.close, lock)

    @property
    def used(self) -> int:
        """Bytes of the kept photographs, also of one that is being written."""
        return sum(photo.bytes for photo in self._photos.values())

    def _load(self) -> None:
        """Note the complete photographs in the folder, and delete records without a photograph.

        Also deletes the file in which 0.2.0 noted the ages of photographs by hashes of their content.
        """
        (self.path / ".ages").unlink(missing_ok=True)

        for path, record in read_kept(self.path):  # the oldest first
            files = path, path.with_suffix(".json")
            size = sum(_size_on_disk(file.stat().st_size) for file in files)
            self._insert(path, record, size)

        for file in self.path.glob("*.json"):
            has_photo = any(file.with_suffix(suffix).exists() for suffix in _SUFFIXES)
            if _RECORD.fullmatch(file.name) and not has_photo:
                file.unlink()

    def add(self, image: bytes, record: KeptRecord) -> KeptResult:
        """Keep *image* unless it is a near-duplicate or too large; return what was done.

        The record of a kept image is replaced if it has a new reason or suggestion. Images of the uniform
        sample may be near-duplicates. The first write that fails is logged, and the next one
        that succeeds.
        """
        # Store it. The log tells once that the folder cannot be written, and once that it can
        # again.
        try:
            result = self._store(image, record)
        except OSError as error:
            if not self._failed:
                log.warning(
                    "%s: cannot be written (%s); no photo is kept",
                    self.path,
                    error.strerror,
                )
            self._failed = True
            return "failed"

        if self._failed:
            log.warning("%s: can be written again", self.path)
        self._failed = False
        return result

    @property
    def clean_up_seconds(self) -> float:
        """Seconds after which `clean_up` should be called again."""
        return min(CHECK_SECONDS, max(1.0, self._max_age.total_seconds() / 10))

    def clean_up(self) -> None:
        """Delete photographs that are too old, and forget those that others have deleted or labelled."""
        try:
            for photo in list(self._photos.values()):
                self._forget_if_gone(photo)
        finally:  # also if a file cannot be looked up
            self.expire()

    def has_duplicate(self, name: str, record: KeptRecord) -> bool:
        """Tell whether the file *name*, without suffix, is kept as *record* says, or a near-duplicate is kept.

        Images of the uniform sample may be near-duplicates, so that it shows all photographs.
        Kept images that others have deleted or labelled do not count and are forgotten.
        """
        # The same file is a duplicate if it is kept for each of the reasons, with the suggestion.
        for suffix in _SUFFIXES:
            previous = self._photos.get(f"{name}{suffix}")
            if previous is not None and not self._forget_if_gone(previous):
                is_suggested = record.suggested in {None, previous.suggested}
                return is_suggested and previous.reasons.issuperset(record.reasons)

        # Near-duplicates count only outside of the sample, which must stay uniform.
        if "sample" in record.reasons:
            return False

        number = int(record.near_hash, 16)
        near = [photo for photo in self._photos.values() if are_near(number, photo.near_hash)]
        return any(not self._forget_if_gone(photo) for photo in near)

    def _forget_if_gone(self, photo: _StoredPhoto) -> bool:
        """Forget *photo* if others have deleted or labelled it; return whether they have."""
        is_gone = not photo.path.exists()
        if is_gone:
            del self._photos[photo.path.name]
        return is_gone

    def expire(self) -> None:
        """Delete photographs that are too old."""
        oldest = datetime.now(UTC) - self._max_age
        self._delete_for(
            "expired", [photo for photo in self._photos.values() if photo.time < oldest]
        )

    def _delete_for(self, reason: Deletion, photos: list[_StoredPhoto]) -> None:
        """Delete *photos*, report each to `on_delete`, and log how many they are.

        One that cannot be deleted raises `OSError` after the others are deleted.
        """
        # Delete each, whatever happens to the others.
        errors: list[OSError] = []
        for photo in photos:
            try:
                self._delete(photo)
            except OSError as error:
                errors.append(error)
            else:
                self._on_delete(reason)

        if num_deleted := len(photos) - len(errors):
            log.info("deleted photos", extra={"reason": reason, "photographs": num_deleted})

        if errors:
            raise errors[0]

    def _store(self, image: bytes, record: KeptRecord) -> KeptResult:
        """Keep *image* unless it is a near-duplicate or too large; raises `OSError`.

        Makes room for it first. If it is kept already, only its record is replaced.
        """
        path = self.path / record.image
        if self.has_duplicate(path.stem, record):
            return "near_duplicate"

        # The same image, whose name is a hash of its bytes, is kept for the reasons of both.
        previous = self._photos.get(path.name)
        if previous is not None:
            reasons = tuple(sorted(previous.reasons.union(record.reasons)))
            suggested = record.suggested or previous.suggested
            record = record.model_copy(update={"reasons": reasons, "suggested": suggested})

        # Refuse it if it would not fit into an empty folder.
        content = record.model_dump_json().encode()
        size = _size_on_disk(len(image)) + _size_on_disk(len(content))
        if size > self._max_bytes:
            return "dropped"

        if previous is not None:
            return self._replace_record(previous, record, content, size)

        # Write the photograph and its record.
        self._make_room(size)
        photo = self._insert(path, record, size)
        try:
            _write(path.with_suffix(".json"), content)
            _write(path, image)
        except OSError:
            self._delete(photo)
            raise
        return "kept"

    def _replace_record(
        self, previous: _StoredPhoto, record: KeptRecord, content: bytes, size: int
    ) -> KeptResult:
        """Replace the record of *previous* by *record*, whose JSON is *content*.

        The photograph is then the newest one. If this fails, the previous record stays.
        """
        _write(previous.path.with_suffix(".json"), content)
        del self._photos[previous.path.name]
        photo = self._insert(previous.path, record, size)
        if self._forget_if_gone(photo):  # deleted or labelled meanwhile
            previous.path.with_suffix(".json").unlink(missing_ok=True)
            return "dropped"
        return "kept"

    def _insert(self, path: Path, record: KeptRecord, size: int) -> _StoredPhoto:
        """Note a photograph as the newest one."""
        reasons = frozenset(record.reasons)
        number = int(record.near_hash, 16)
        photo = _StoredPhoto(path, record.time, number, reasons, size, record.suggested)
        self._photos[path.name] = photo
        return photo

    def _make_room(self, size: int) -> None:
        """Delete photographs until *size* more bytes fit; *size* is at most the limit."""
        while self.used + size > self._max_bytes:
            sample = [photo for photo in self._photos.values() if "sample" in photo.reasons]
            others = [photo for photo in self._photos.values() if "sample" not in photo.reasons]

            is_sample_large = (
                sum(photo.bytes for photo in sample) > SAMPLE_SHARE * self._max_bytes
            )
            self._delete_for(
                "no_room", (sample if is_sample_large or not others else others)[:1]
            )

    def _delete(self, photo: _StoredPhoto) -> None:
        """Delete the files of *photo*, the record last, and forget it."""
        for file in (photo.path, photo.path.with_suffix(".json")):
            file.unlink(missing_ok=True)
        del self._photos[photo.path.name]


def _lock_folder(path: Path) -> int:
    """Lock the folder at *path* for this process; return the lock's file descriptor.

    Raises `ConfigError` and `StorageError` as `KeptFolder` does.
    """
    try:
        lock = lock_file(path / LOCK, 0o600)
    except BlockingIOError as error:
        raise ConfigError(
            f"{path}: another process keeps photos there; name another folder"
        ) from error

    # Without locks, two servers would delete what the other one writes.
    if lock.failure:
        os.close(lock.file)
        (path / LOCK).unlink()
        raise StorageError(
            f"{path}: its file system has no locks ({lock.failure}), which keep other servers out; "
            "keep photos on another file system"
        )
    return lock.file


def _write(file: Path, content: bytes) -> None:
    """Write *content* to *file* in one step; only its owner can read it."""
    with atomic_write(file) as partial:
        set_mode(partial, 0o600)
        partial.write_bytes(content)


def _size_on_disk(size: int) -> int:
    return -(-size // FILE_BLOCK) * FILE_BLOCK  # rounded up
