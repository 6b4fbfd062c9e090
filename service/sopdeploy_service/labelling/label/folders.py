"""Photographs that wait for a label, and the folders into which labels move them.

They are kept photographs, with a record of what a network predicted, or a heap: the images of a
folder, in which nobody has sorted them. Suggestions for these come from the photographs that
have a label.

The folders are the only state. A label is one rename of the photograph, so a photograph is
either kept or labelled, also after a crash, and of two labels for one photograph only the first
succeeds. Its record is then renamed to `ID.labelled`; `read_kept` skips a record that remains. A
file `ID.skipped` marks a skipped photograph.
"""

import errno
import itertools
import os
import shutil
import stat
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sopdeploy.decision import softmax
from sopdeploy.errors import ConfigError, DataError, shorten
from sopdeploy.file_systems import flush_folder, set_mode, set_owner
from sopdeploy.files import LOCK, atomic_write, expand_user, new_folder
from sopdeploy.images.signatures import count_suffixes, note_skipped
from sopdeploy.photos.change import CHANGE, write_change
from sopdeploy.photos.files import (
    HELD_OUT_SUFFIX,
    SAMPLE_FOLDER,
    data_folder,
    find_parts,
    kept_id,
    list_subfolders,
    lookalike_key,
    name_id,
    normalize,
    numbered_name,
    sampled_name,
)
from sopdeploy.photos.table_search import find_table
from sopdeploy_service.inference.drift_state import read_alarms
from sopdeploy_service.labelling.kept import (
    LABELLED,
    Kept,
    KeptRecord,
    read_kept,
    read_labelled,
)
from sopdeploy_service.labelling.label.class_names import check_class_name, class_folders
from sopdeploy_service.labelling.label.heap import Embed, Suggestions, list_heap
from sopdeploy_service.labelling.label.labelled import Labelled, list_labelled
from sopdeploy_service.labelling.label.order import Shown, order_kept, role_of

SKIPPED = ".skipped"
DECIDING = 30  # labels with which `promote` can decide about a bundle that is clearly better
LEASE_SECONDS = 60.0  # for which a browser's photographs are offered to no other one
MAX_REJECTED = 200  # newest ones, of which some may be a new class
GONE = "that photo has a label already or is no longer kept; this is the next one"


class GoneError(DataError):
    """The photograph has a label already, or the server has deleted it."""


class Waiting(NamedTuple):
    """The path of a photograph that waits for a label, and its record, which a photograph of a heap has not."""

    path: Path
    record: KeptRecord | None

    @property
    def is_of_heap(self) -> bool:
        """Whether no server has kept the photograph."""
        return self.record is None

    @property
    def identity(self) -> str:
        """The ID, which stays the same after a label was undone."""
        return name_id(self.path.name) if self.is_of_heap else self.path.stem


class LabelStep(NamedTuple):
    """What `LabelFolders.undo` reverses: a photograph that was moved to `target` or, without it, skipped.

    `made_folder` tells whether the folder of `target` was created for it.
    """

    photo: Waiting
    target: Path | None = None
    made_folder: bool = False

    @property
    def is_skip(self) -> bool:
        """Whether the photograph was skipped, so that it was not moved."""
        return self.target is None


class Lease(NamedTuple):
    """The browser's *session* that a photograph was shown to, and the *end* by `time.monotonic`."""

    session: str
    end: float


class LabelFolders:
    """Photographs in the order in which they are labelled, and the labels of this session.

    Attributes:
        waiting: The photographs without a label and their records, by ID; the next one is first.
        steps: The labels and skips of this session.
        suggestions: The suggested classes of the photographs of a heap.
    """

    def __init__(self, kept: Path, photos: Path, embed: Embed | None = None) -> None:
        """Read the photographs in *kept*; labels go to *photos* and to two folders beside it.

        *embed* computes what the suggestions for a heap compare. Raises `DataError` if *kept*
        is no folder or holds folders but no photographs, or if *photos* has its classes in a
        folder `train/` or in a table, as `find_table` tells.
        """
        # The path is absolute, but its links stay: the two folders beside it are named like the
        # folder that the user gave.
        self.kept = expand_user(kept)
        self.photos = Path(os.path.abspath(expand_user(photos)))  # noqa: PTH100

        # Refuse folders that would not do: without photographs, or whose classes `train` finds
        # elsewhere.
        data_folder(self.kept, "photos, such as the folder of `serve --setting keep=FOLDER`")
        if self.photos.exists():
            data_folder(self.photos, "class folders, or a new name")

        if self.photos.is_dir() and (train := find_parts(self.photos).train):
            raise DataError(
                f"{photos}: has its classes in the folder {train}; give {photos / train}"
            )

        if table := find_table(self.photos):
            raise DataError(
                f"{photos}: `train` reads its classes from {table.name}, not from class folders; give "
                "another folder, or list the photos there"
            )

        self.held_out = self.photos.with_name(f"{self.photos.name}{HELD_OUT_SUFFIX}")
        self.unknown = self.photos.with_name(f"{self.photos.name}-unknown")

        self.steps: list[LabelStep] = []
        self.suggestions = Suggestions(embed)
        # The ids of those skipped in this session; a kept photograph gets a file `ID.skipped`.
        self._skipped_of_heap: set[str] = set()
        # The photographs that decide about the next bundle, which `label` compares
        self._deciding = Shown()
        self.alarms: dict[str, datetime] = {}  # begins of changes, by model
        self._leases: dict[str, Lease] = {}  # by ID

        self.read()

        other_folders = [
            name
            for name in list_subfolders(self.kept)
            if not os.path.exists(self.kept / name / LOCK)  # noqa: PTH110
        ]

        if not self.waiting and other_folders:  # only subfolders to which no server writes
            raise DataError(
                f"{self.kept}: holds no kept photos, but folders ({shorten(other_folders)}); give one of "
                "them, or the folder of `serve --setting keep=FOLDER`"
            )

    def read(self) -> None:
        """Read and order what waits for a label again, and start to compute suggestions.

        Kept photographs come first, then the heap: images that no server has kept. Raises
        `DataError` and `OSError`.
        """
        kept = self._read_kept()
        images, unused = list_heap(self.kept)
        note_skipped(self.kept, count_suffixes(unused))
        heap = [path for path in images if name_id(path.name) not in self._skipped_of_heap]

        waiting = [Waiting(path, record) for path, record in kept]
        waiting += [Waiting(path, None) for path in heap]
        self.waiting = {photo.identity: photo for photo in waiting}
        self.suggestions.learn(class_folders(self.photos))
        self.suggestions.compute(heap, self._rejected())

    def _read_kept(self) -> list[Kept]:
        """Read the kept photographs that wait, in the order in which they are to be labelled.

        The photographs that decide about the next bundle are remembered, also after they are
        labelled, until they have decided.
        """
        # A photograph that was sent and kept again has its label already.
        labelled_ids = self._labelled_ids()
        skipped_of_kept = {path.stem for path in self.kept.rglob(f"*{SKIPPED}")}
        waiting = [
            photo
            for photo in read_kept(self.kept)
            if photo.path.stem not in skipped_of_kept and photo.path.stem not in labelled_ids
        ]

        labelled = read_labelled(self.kept)
        held_out = _kept_ids(self.held_out) | _kept_ids(self.unknown / SAMPLE_FOLDER)
        self._deciding = Shown(
            record for record in labelled if Path(record.image).stem in held_out
        )
        for _, record in waiting:
            if role_of(record) == "decides":
                self._deciding.add(record)

        self.alarms = read_alarms(self.kept)
        self._note_change()
        return order_kept(waiting, labelled, self.alarms)

    def _note_change(self) -> None:
        """Write when a change began beside the photographs that decide, for `compare`; delete it without one."""
        if not self.alarms:
            (self.held_out / CHANGE).unlink(missing_ok=True)
        elif self.held_out.is_dir():
            write_change(self.held_out, min(self.alarms.values()))

    def _labelled_ids(self) -> set[str]:
        """Return the ids of the kept photographs that have a label."""
        folders = (self.photos, self.held_out, self.unknown)
        return set[str]().union(*map(_kept_ids, folders))

    def upcoming(self, session: str, count: int) -> list[str]:
        """Return the next photograph for a browser's *session* and more, *count* in all, which it leases.

        After a photograph of a heap, the others of the heap that look most like it come first.
        Photographs that another session has leased in the last `LEASE_SECONDS` are returned only
        if nothing else waits.
        """
        now = time.monotonic()
        of_others = {
            identity: lease
            for identity, lease in self._leases.items()
            if lease.end > now and lease.session != session
        }

        # What no other session has leased; if that is nothing, everything.
        free = [identity for identity in self.waiting if identity not in of_others]
        upcoming = self._put_similar_first(free or list(self.waiting))[:count]

        # A lease of another session stays.
        lease = Lease(session, now + LEASE_SECONDS)
        self._leases = dict.fromkeys(upcoming, lease) | of_others
        return upcoming

    def _put_similar_first(self, identities: list[str]) -> list[str]:
        """Order *identities* after the first one by their similarity to it, as far as that is known."""
        if not identities or not self.waiting[identities[0]].is_of_heap:
            return identities

        of_path = {self.waiting[identity].path: identity for identity in identities}
        first, *others = of_path
        similar = self.suggestions.most_similar(first, others)
        ordered = dict.fromkeys([first, *similar, *others])
        return [of_path[path] for path in ordered]

    def probabilities(self, identity: str) -> dict[str, float]:
        """Return the probabilities of classes for a photograph: of the network, or of a heap those suggested."""
        path, record = self.waiting[identity]
        if record is None:
            return self.suggestions.suggest([path]).get(path, {})
        labels = map(normalize, record.labels)
        return dict(zip(labels, softmax(np.asarray(record.logits)).tolist(), strict=True))

    def suggestion(self, identity: str) -> str | None:
        """Return the class that a person has suggested for a photograph, who reported a wrong answer."""
        record = self.waiting[identity].record
        if not record or not record.suggested:
            return None

        # A class in other letters is that class.
        suggested = normalize(record.suggested).strip()
        key = lookalike_key(suggested)
        same = (name for name in self.classes() if lookalike_key(name) == key)
        return next(same, suggested)

    def suggested(self) -> dict[str, list[str]]:
        """List the photographs of a heap by their suggested class, the surest ones first."""
        ids = {
            photo.path: identity for identity, photo in self.waiting.items() if photo.is_of_heap
        }
        by_class: dict[str, list[tuple[float, str]]] = {}
        for path, probabilities in self.suggestions.suggest([*ids]).items():
            name = max(probabilities, key=lambda name: probabilities[name])
            by_class.setdefault(name, []).append((-probabilities[name], ids[path]))

        return {
            name: [identity for _, identity in sorted(by_class[name])]
            for name in sorted(by_class)
        }

    def _rejected(self) -> list[Path]:
        """List the newest kept photographs that the network rejected, without those that decide.

        These are labelled in a random order only: others would make them a sample of what is chosen.
        """
        rejected = [
            (record.time, path)
            for path, record in self.waiting.values()
            if record and record.known is False and role_of(record) != "decides"
        ]
        return [path for _, path in sorted(rejected, reverse=True)[:MAX_REJECTED]]

    def maybe_new_class(self) -> list[str]:
        """List the kept photographs that look most alike among those that the network rejected."""
        return [path.stem for path in self.suggestions.group_alike(self._rejected())]

    def classes(self) -> list[str]:
        """List the names of classes, sorted: those of the folders, and in the records that wait."""
        records = [record for _, record in self.waiting.values() if record is not None]
        names = {normalize(label) for record in records for label in record.labels}
        return sorted(names.union(class_folders(self.photos), class_folders(self.held_out)))

    def label(self, identity: str, name: str | None) -> None:
        """Move the photograph *identity* to the folder of the class *name*; None is "not one of ours".

        Photographs that decide about the next bundle, their copies and other photographs of their
        objects are held out from training: a network that was trained on them would look better
        than it is. Without a class, such photographs go to `SAMPLE_FOLDER`. Raises `ConfigError`
        if *name* cannot name a class, `GoneError` if the photograph does not wait for a label, and `OSError`.
        """
        photo = self._find(identity)
        folder = self._folder_for(name, is_held_out=self._is_held_out(photo))
        is_new_folder = not folder.is_dir()

        # `train` sees by the name of a photograph that it is of the uniform sample.
        is_sampled = photo.record is not None and role_of(photo.record) != "other"
        file_name = sampled_name(photo.path) if is_sampled else photo.path.name

        try:
            target = _move_into(folder, photo.path, file_name)
        except FileNotFoundError:
            del self.waiting[identity]
            raise GoneError(GONE) from None

        # Note the step, and let the suggestions learn from the photograph.
        del self.waiting[identity]
        self.steps.append(LabelStep(photo, target, is_new_folder))

        if not photo.is_of_heap:
            # Its record stays under another name, so that copies are not asked for again.
            with suppress(FileNotFoundError):
                photo.path.with_suffix(".json").rename(photo.path.with_suffix(LABELLED))
            self._note_change()
        self.suggestions.move(
            photo.path, target, None if name is None else normalize(folder.name)
        )

    def can_be_class(self, name: str) -> bool:
        """Tell whether a photograph can get the class *name*, which need not exist yet."""
        try:
            self._folder_for(name, is_held_out=False)
        except ConfigError:
            return False
        return True

    def labelled(self) -> dict[str, Labelled]:
        """List the photographs that were labelled last, by ID, the last label first.

        There are at most as many as the page lists. Raises as `list_labelled` does.
        """
        # The class, its folder, and whether it is held out.
        parts = [
            *((name, path, False) for name, path in class_folders(self.photos).items()),
            *((name, path, True) for name, path in class_folders(self.held_out).items()),
            (None, self.unknown, False),
            (None, self.unknown / SAMPLE_FOLDER, True),
        ]
        return list_labelled(parts)

    def correct(self, photo: Labelled, name: str | None) -> None:
        """Move *photo*, which has a label, to the folder of the class *name*; None is "not one of ours".

        A held-out photograph stays held out. The old folder is deleted if this was the last
        photograph there. Raises as `label` does.
        """
        folder = self._folder_for(name, is_held_out=photo.is_held_out)
        if folder == photo.path.parent:
            return

        try:
            target = _move_into(folder, photo.path, photo.path.name)
        except FileNotFoundError:
            raise GoneError(f"{photo.path}: is no longer there; read the list again") from None
        with suppress(OSError):  # the folder stays if other photographs are in it
            photo.path.parent.rmdir()

        self.suggestions.move(
            photo.path, target, None if name is None else normalize(folder.name)
        )

    def _is_held_out(self, photo: Waiting) -> bool:
        """Tell whether *photo* decides about the next bundle, or shows what one of these shows."""
        return photo.record is not None and self._deciding.shows(photo.record)

    def progress(self) -> str:
        """Say how many labels decide and train, and from how many days those of the session are.

        If too few decide and no others wait, it says how the server keeps more. It is empty for a
        heap, without a photograph that a server kept.
        """
        records = [
            step.photo.record
            for step in self.steps
            if step.photo.record is not None and not step.is_skip
        ]
        if not records:
            return ""

        deciding = len(_kept_ids(self.held_out))
        training = sum(
            step.target is not None and self.photos in step.target.parents
            for step in self.steps
        )
        days = len({record.time.date() for record in records})
        decide = f"{deciding} of the {DECIDING}" if deciding < DECIDING else f"{deciding:,}"
        text = f"{decide} that decide, {training} that train"
        text = f"{text}, from {days} day{'' if days == 1 else 's'}"

        waits = any(
            photo.record is not None and role_of(photo.record) == "decides"
            for photo in self.waiting.values()
        )
        if deciding >= DECIDING or waits:
            return text
        return f"{text}; no photo that decides is left, and a larger keep_sample keeps more"

    def _folder_for(self, name: str | None, *, is_held_out: bool) -> Path:
        """Return the folder of the class *name*; None is "not one of ours".

        Raises `ConfigError` if *name* cannot name a class.
        """
        if name is None:
            return self.unknown / SAMPLE_FOLDER if is_held_out else self.unknown

        folders = class_folders(self.photos) | class_folders(self.held_out)
        name = check_class_name(name, self.classes(), folders)
        parent = self.held_out if is_held_out else self.photos
        return class_folders(parent).get(name, parent / name)

    def skip(self, identity: str) -> None:
        """Let the photograph *identity* wait no more; raises `GoneError` and `OSError`.

        A file marks a kept one for later sessions, too; one of a heap is skipped in this
        session only.
        """
        photo = self._find(identity)
        if not photo.path.exists():
            del self.waiting[identity]
            raise GoneError(GONE)

        if photo.is_of_heap:
            self._skipped_of_heap.add(identity)
        else:
            photo.path.with_suffix(SKIPPED).touch()

        del self.waiting[identity]
        self.steps.append(LabelStep(photo))

    def undo(self) -> None:
        """Reverse the last step of this session; its photograph comes next. Raises `GoneError`, `OSError`."""
        if not self.steps:
            raise GoneError("nothing to undo in this session; move older photos yourself")

        photo, target, made_folder = self.steps[-1]
        present_path = photo.path if target is None else target
        if not present_path.exists():
            self.steps.pop()
            raise GoneError(
                f"{present_path}: no longer there, so the last step cannot be undone"
            )

        # Reverse the step.
        if target is not None:
            self._move_back(photo, target, made_folder=made_folder)
        elif photo.is_of_heap:
            self._skipped_of_heap.discard(photo.identity)
        else:
            photo.path.with_suffix(SKIPPED).unlink(missing_ok=True)

        self.steps.pop()
        self.waiting = {photo.identity: photo, **self.waiting}

    def _move_back(self, photo: Waiting, target: Path, *, made_folder: bool) -> None:
        """Move *photo* back from *target*; with *made_folder*, delete the folder there if it is empty."""
        # A server that starts deletes a record without its photograph, so the record gets its name
        # after the photograph. It is written before: on a full disk, nothing is moved.
        if photo.record is not None:
            with atomic_write(photo.path.with_suffix(".json")) as partial:
                # The mode and the owner that the server gave it, so that the server can read it.
                set_mode(partial, 0o600)
                set_owner(partial, photo.path.parent)
                partial.write_text(photo.record.model_dump_json(), encoding="utf-8")
                _move(target, photo.path)
            photo.path.with_suffix(LABELLED).unlink(missing_ok=True)
        elif os.path.lexists(photo.path):
            raise GoneError(
                f"{photo.path}: another photo has its name now; move {target} yourself"
            )
        else:
            _move(target, photo.path)

        # A folder that the step made goes if it is empty.
        self.suggestions.move(target, photo.path, None)
        if made_folder:
            with suppress(OSError):  # stays if other photographs are in it
                target.parent.rmdir()
                if target.parent == self.unknown / SAMPLE_FOLDER:
                    self.unknown.rmdir()

    def _find(self, identity: str) -> Waiting:
        """Return the photograph *identity*; raises `GoneError` if it does not wait."""
        if identity not in self.waiting:
            raise GoneError(GONE)
        return self.waiting[identity]


def _kept_ids(folder: Path) -> set[str]:
    """Return the ids of the kept photographs below *folder*, which may not exist."""
    paths = folder.rglob("*") if folder.is_dir() else ()
    return {kept_id(path.name) for path in paths} - {""}


def _move_into(folder: Path, source: Path, name: str) -> Path:
    """Move the photograph *source* into *folder*, which is made if it is missing; return its new path.

    Its new name is *name*, with a number if there is such a file.

    Raises `OSError`; then the photograph is where it was.
    """
    # Photographs that no server has kept (a heap) can have equal names.
    targets = (folder / numbered_name(Path(name), number) for number in itertools.count(1))
    target = next(path for path in targets if not os.path.lexists(path))

    with new_folder(folder):  # which is removed after a move that failed
        _move(source, target)
    return target


def _move(source: Path, target: Path) -> None:
    """Move a file in one step; between file systems, the copy is complete before *source* is deleted."""
    try:
        source.rename(target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise

        with atomic_write(target, durable=True) as partial:
            # As a rename does, so that only the owner can read a kept one; it must be written,
            # too.
            set_owner(partial, source)
            status = source.stat()
            set_mode(partial, stat.S_IMODE(status.st_mode) | stat.S_IWUSR)
            try:
                shutil.copyfile(source, partial)
            except OSError as copy_error:  # a full disk has no name
                reason = copy_error.strerror
                raise OSError(copy_error.errno, reason, str(target.parent)) from copy_error

            # The time of a kept photograph tells `compare` how recent it is.
            os.utime(partial, ns=(status.st_atime_ns, status.st_mtime_ns))

        # The copy and its name are on the disk before the only other one goes.
        flush_folder(target.parent)
        source.unlink()
