"""A folder of kept photographs with a limit in bytes and in days; one process writes to it.

Every file is written under a temporary name and then renamed, the photograph before its record.
What a killed process leaves is deleted at the next start. A file counts as whole blocks, as on
most file systems.

Photographs may be the only copies of their owners, so no clock deletes them. The age of a
photograph is the time during which a keeper has run since it was kept, by the monotonic clock,
in steps of limited length. `.ages` has the counted seconds. Without it, as after a copy without
hidden files, all ages begin anew.
"""

import logging
import os
import re
import time
import weakref
from collections.abc import Callable
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
from sopdeploy.images.near_hash import are_near
from sopdeploy_service.labelling.kept import KeptRecord, read_kept

KeptResult = Literal["kept", "near_duplicate", "dropped", "failed"]
Deletion = Literal["expired", "no_room", "incomplete"]
FILE_BLOCK = 4096  # bytes
CHECK_SECONDS = (
    60.0  # between two checks of the ages; less if photographs are kept for a short time
)
# Of the time between two checks, at most so many intervals count, even if the machine slept.
MAX_STEP = 2.0
SAVE_SECONDS = 600.0  # between two writes of the ages; a process that is killed loses as much
AGES = ".ages"
MAX_AGES_BYTES = 1 << 26
SAMPLE_SHARE = 0.5  # of the bytes; with more, the uniform sample makes room
_SUFFIXES = ".jpg", ".png"
_OWN = re.compile(
    rf"[0-9a-f]{{32}}\.(?:jpg|png|json)(?:(?:\.[0-9a-f]{{8}})?{re.escape(PARTIAL)})?"
)

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


class _StoredPhoto(NamedTuple):
    """A kept photograph: `kept_at` are counted seconds, `near_hash` is a number, `bytes` of both files.

    `suggested` is that of its record.
    """

    path: Path
    kept_at: float
    near_hash: int
    reasons: frozenset[str]
    bytes: int
    suggested: str | None


class KeptFolder:
    """Keeps photographs in *path*, at most *max_bytes*, each for *days* in which it runs; not thread-safe.

    The oldest one with the fewest reasons makes room; but while the uniform sample has more
    than `SAMPLE_SHARE` of the bytes or nothing else is kept, the oldest one of the sample does.
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
        folder cannot be written or locked. Raises `ConfigError` if another process keeps
        photographs there, or if no process ever did and there are photographs without records,
        such as labelled ones: they would be deleted as incomplete.
        """
        self.path = path
        self._max_bytes = max_bytes
        self._max_age = days * 86_400  # seconds

        self._photos: dict[str, _StoredPhoto] = {}  # by name, the oldest first
        self._failed = False  # whether the last write failed
        self._on_delete = on_delete

        # Seconds that keepers of this folder have run, and as many as the file `AGES` has of them.
        self._counted = self._saved = 0.0
        self._ticked = time.monotonic()

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
                self._delete_incomplete()
                self.expire()
                self._make_room(0)
            unless_ready.pop_all()

        weakref.finalize(self, os.close, lock)

    @property
    def used(self) -> int:
        """Bytes of the kept photographs, also of one that is being written."""
        return sum(photo.bytes for photo in self._photos.values())

    def _load(self) -> None:
        """Note the complete photographs in the folder; an age that is not known begins now."""
        kept = read_kept(self.path)
        ages = _read_ages(self.path / AGES)
        if ages is None:
            ages = Ages()
            if kept:
                log.warning(
                    "%s: the ages of %d photos are not known; they begin now",
                    self.path,
                    len(kept),
                )

        # Note the photographs, the oldest first.
        self._counted = self._saved = ages.counted
        kept_at = {path.name: ages.kept_at.get(path.name, ages.counted) for path, _ in kept}
        for path, record in sorted(kept, key=lambda photo: kept_at[photo.path.name]):  # stable
            files = path, path.with_suffix(".json")
            size = sum(_size_on_disk(file.stat().st_size) for file in files)
            self._insert(path, record, size, kept_at[path.name])

    def _delete_incomplete(self) -> None:
        """Delete what `_find_incomplete` finds, and the temporary files of processes that have ended."""
        remove_leftovers(self.path)
        for file in _find_incomplete(self.path):
            file.unlink()
            log.warning("deleted %s, which is incomplete", file)
            self._on_delete("incomplete")

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
        return min(CHECK_SECONDS, max(1.0, self._max_age / 10))

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
        """Delete photographs that are too old, then write the counted time to `AGES` if much has passed.

        Each is tried even if the other fails, so a full disk prevents no deletion. `OSError` is
        raised last.
        """
        # Count the seconds that this keeper has run; of a long pause of the process, only some.
        now = time.monotonic()
        step = min(max(0.0, now - self._ticked), MAX_STEP * self.clean_up_seconds)
        self._ticked = now
        self._counted += step

        # Delete the old ones.
        old = [
            photo
            for photo in self._photos.values()
            if self._counted - photo.kept_at > self._max_age
        ]

        try:
            self._delete_for("expired", old)
        finally:
            # Write the ages if much time has passed: after a crash, that much is lost.
            if self._counted - self._saved >= min(SAVE_SECONDS, self._max_age / 10):
                kept_at = {name: photo.kept_at for name, photo in self._photos.items()}
                content = (
                    Ages(counted=self._counted, kept_at=kept_at).model_dump_json().encode()
                )

                _write(self.path / AGES, content)
                self._saved = self._counted

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
            return self._replace_record(previous, record, content)

        # Write the photograph and its record.
        self._make_room(size)
        photo = self._insert(path, record, size, self._counted)
        try:  # the photograph is written first: its record shows that it is complete
            _write(path, image)
            _write(path.with_suffix(".json"), content)
        except OSError:
            self._delete(photo)
            raise
        return "kept"

    def _replace_record(
        self, previous: _StoredPhoto, record: KeptRecord, content: bytes
    ) -> KeptResult:
        """Replace the record of *previous* by *record*, whose JSON is *content*.

        The photograph is then the newest one. If this fails, the previous record stays. So it
        does if there is no room for both records; the result is then "near_duplicate".
        """
        # Refuse it if both records would not fit at once: the new one replaces the old one in
        # one step.
        record_size = _size_on_disk(len(content))
        size = _size_on_disk(previous.path.stat().st_size) + record_size
        if size + record_size > self._max_bytes:
            return "near_duplicate"

        del self._photos[previous.path.name]  # so that it does not make room
        try:
            self._make_room(size + record_size)
            _write(previous.path.with_suffix(".json"), content)
        except OSError:
            self._photos[previous.path.name] = previous
            raise

        photo = self._insert(previous.path, record, size, self._counted)
        if self._forget_if_gone(photo):  # deleted or labelled meanwhile
            previous.path.with_suffix(".json").unlink(missing_ok=True)
            return "dropped"
        return "kept"

    def _insert(
        self, path: Path, record: KeptRecord, size: int, kept_at: float
    ) -> _StoredPhoto:
        """Note a photograph as the newest one."""
        reasons = frozenset(record.reasons)
        number = int(record.near_hash, 16)
        photo = _StoredPhoto(path, kept_at, number, reasons, size, record.suggested)
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
            if is_sample_large or not others:
                self._delete_for("no_room", sample[:1])  # the oldest one
            else:  # the first one with the fewest reasons, which is the oldest of those
                self._delete_for("no_room", [min(others, key=lambda photo: len(photo.reasons))])

    def _delete(self, photo: _StoredPhoto) -> None:
        """Delete the files of *photo*, the record first, and forget it."""
        for file in (photo.path.with_suffix(".json"), photo.path):
            file.unlink(missing_ok=True)
        del self._photos[photo.path.name]


def _lock_folder(path: Path) -> int:
    """Lock the folder at *path* for this process; return the lock's file descriptor.

    Raises `ConfigError` and `StorageError` as `KeptFolder` does.
    """
    # Checked before the lock file exists: if this process is killed here, the next one checks
    # again.
    is_new = not (path / LOCK).exists()
    if is_new and any(file.suffix in _SUFFIXES for file in _find_incomplete(path)):
        raise ConfigError(
            f"{path}: holds photos without records, such as labelled ones, which a server "
            "would delete; name another folder"
        )

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


def _read_ages(path: Path) -> Ages | None:
    """Read the ages at *path*; None if the file is missing or damaged."""
    try:
        with open_regular(path) as file:
            content = read_at_most(file, MAX_AGES_BYTES)
        ages = Ages.model_validate_json(content, extra="ignore")  # of a later version
    except (OSError, pydantic.ValidationError):
        return None
    is_valid = all(kept_at <= ages.counted for kept_at in ages.kept_at.values())
    return ages if is_valid else None


def _find_incomplete(folder: Path) -> list[Path]:
    """List photographs without a record, records without a photograph, and partial files in *folder*.

    Files that no `KeptFolder` wrote are not listed, nor damaged records with their photographs.
    """
    own_files = {file for file in folder.iterdir() if _OWN.fullmatch(file.name)}

    def has_partner(file: Path) -> bool:
        suffixes = _SUFFIXES if file.suffix == ".json" else (".json",)
        return any(file.with_suffix(suffix) in own_files for suffix in suffixes)

    return [file for file in own_files if file.suffix == PARTIAL or not has_partner(file)]


def _write(file: Path, content: bytes) -> None:
    """Write *content* to *file* in one step; only its owner can read it."""
    with atomic_write(file) as partial:
        set_mode(partial, 0o600)
        partial.write_bytes(content)


def _size_on_disk(size: int) -> int:
    return -(-size // FILE_BLOCK) * FILE_BLOCK  # rounded up
