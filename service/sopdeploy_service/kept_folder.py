"""A folder of photos below their predicted classes, each with a record that is a task of Label Studio.

    kept/label-config.xml       the classes, as Label Studio reads them
    kept/cat/ID-sample.jpg      a photo of the random sample that was predicted as a cat, without metadata
    kept/cat/ID-sample.json     its prediction, which is also a task of Label Studio
    kept/cat/ID.jpg             a photo that was kept for another reason

Every file appears in one step, the record before its photo, so several processes and servers can share
the folder without a lock. Somebody may move or delete its files at any time.

A photo whose record is not beside it, or names another class than its folder, was moved by a person, or
its folder was. It is theirs: it stays, only `max_seconds` deletes it, and the same photo is not kept again.
"""

import json
import logging
import os
import re
import stat
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import quote
from xml.etree import ElementTree

from sopdeploy.base.file_systems import set_mode
from sopdeploy.base.files import (
    MAX_NAMES_BYTES,
    MAX_TEXT_BYTES,
    atomic_write,
    os_reason,
    read_file,
    remove_leftovers,
    writing,
)
from sopdeploy.bundle.folder import Bundle
from sopdeploy.data.photos.kept import (
    LABEL_CONFIG,
    NOT_OURS,
    PHOTO_SUFFIXES,
    SAMPLED,
    image_id,
    is_sampled,
    kept_id,
    kept_names,
)

KeptResult = Literal["kept", "dropped", "failed"]
Deletion = Literal["expired", "no_room"]

# A process looks through the folder after it has written `UNSEEN` of `keep_bytes`, and leaves `SPARE`
# of them free. So the limit also holds while eight other processes write, which it does not see.
SPARE = 0.1
UNSEEN = 0.01
CHECK_SECONDS = 60.0  # between two looks, at most
SAMPLE_SHARE = 0.5  # of the bytes; with more, the random sample makes room
FILE_BLOCK = 4096  # bytes; a file counts as whole blocks
ALONE_SECONDS = 3600.0  # after which a record without a photo is deleted
FIRST_VIEW = (
    '<View><Image name="image" value="$image"/>'
    '<Choices name="class" toName="image" choice="single-radio" showInline="true"/></View>'
)
FULL = "photos that somebody has moved fill it; move them out, or raise keep_bytes"

_KEPT_NAME = re.compile(rf"[0-9a-f]{{32}}(?:{SAMPLED})?\.(?:jpg|png|json)")
MAX_FOLDER_BYTES = 100  # of the name of a class
_NOT_IN_NAMES = (
    '%/\\:*?"<>|'  # of folders on some systems; `%` begins what stands for another one
)

log = logging.getLogger("sopdeploy.keep")


def folder_name(label: str) -> str:
    """Return the name of the folder of kept photos of the class *label*, which may be any text.

    Characters that some systems refuse in names, and dots and spaces at the ends, become `%` and the
    hexadecimal digits of their bytes. A long name is cut, and ends with a hash of the whole name.
    """
    ends = {0, len(label) - 1}
    escaped = "".join(
        quote(character, safe="")
        if character in _NOT_IN_NAMES or not character.isprintable()
        else f"%{ord(character):02X}"
        if position in ends and character in ". "
        else character
        for position, character in enumerate(label)
    )

    if escaped == LABEL_CONFIG:  # the name of a file beside the folders
        return f"%{ord(escaped[0]):02X}{escaped[1:]}"

    encoded = escaped.encode()
    if len(encoded) <= MAX_FOLDER_BYTES:
        return escaped
    start = encoded[: MAX_FOLDER_BYTES - 9].decode(errors="ignore")
    return f"{start}-{image_id(label.encode())[:8]}"


class _Kept(NamedTuple):
    """A photo in the folder: when it was written, and the bytes of its files on the disk."""

    time: float
    path: Path
    size: int


class KeptFolder:
    """A folder of kept photos with limits in bytes and in seconds, which other processes use as well."""

    def __init__(self, path: Path, max_bytes: int, max_seconds: float) -> None:
        """Create *path*; raises `StorageError`."""
        self.path = path
        self._max_bytes = max_bytes
        self._max_seconds = max_seconds

        # Since the last look through the folder: the bytes written, and whether it has no room.
        self._unseen = 0
        self._is_full = False
        self._folders: list[str] = []  # found by the last look, at any depth

        self._listed: set[str] = set()  # bundles whose classes are in `LABEL_CONFIG`
        self._warned: set[Path] = set()  # what cannot be read or written, while the rest can
        self.check_seconds = min(CHECK_SECONDS, max(1.0, max_seconds / 10))

        with writing(path):
            path.mkdir(0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path):  # only to see whether it can be written
                pass
            for folder, _ in self._walk():
                self._folders.append(str(folder))
                remove_leftovers(folder)  # of processes that were killed

    def add(self, name: str, content: bytes, fields: dict[str, Any]) -> KeptResult:
        """Write the photo *content* as *name* into the folder of its predicted class, and its record.

        The same photo may be kept already. If a person has moved it, nothing is written. Otherwise the
        record has the reasons of both, the photo remains in the random sample, and its place in the
        folder of another class is cleared. Raises `OSError`; then the photo is not there.
        """
        if self._is_full:
            raise OSError(FULL)

        earlier = self._find(name)
        if any(self._is_of_person(photo) for photo in earlier):
            return "kept"
        if any(is_sampled(photo.name) for photo in earlier):
            name = f"{kept_id(name)}{SAMPLED}{Path(name).suffix}"

        photo = self.path / folder_name(fields["predicted"]) / name
        for same in [*earlier, photo]:
            fields = _with_earlier(fields, same.with_suffix(".json"))
        task = json.dumps(_make_task(self.path, photo, fields)).encode()

        # Is there room?
        size = _size_on_disk(len(content)) + _size_on_disk(len(task))
        if size > (1 - SPARE) * self._max_bytes:
            return "dropped"
        if not earlier:
            self._unseen += size
            if self._unseen > UNSEEN * self._max_bytes:
                self.delete_surplus(room=size)

        # Write it, then clear its other places.
        for folder in (self.path, photo.parent):
            folder.mkdir(0o700, exist_ok=True)
        if _is_writable(self.path) and not _is_writable(photo.parent):
            self._warn_once(photo.parent, "this user cannot write here; its class is not kept")
            return "failed"
        _write_pair(photo, content, task)
        for same in earlier:
            if same != photo:
                _delete(same)
        return "kept"

    def _find(self, name: str) -> list[Path]:
        """Find the photo *name* in all folders, whether or not it belongs to the random sample there.

        Folders in folders that were made after the last look are not searched.
        """
        folders = {*self._folders, *_subfolders(self.path)}
        names = kept_names(kept_id(name), Path(name).suffix)
        paths = [os.path.join(folder, name) for folder in folders for name in names]  # noqa: PTH118 - of thousands
        return [Path(path) for path in sorted(paths) if os.path.lexists(path)]

    def _is_of_person(self, photo: Path) -> bool:
        """Tell whether a person has put *photo* where it is, because its record does not say that place."""
        record = _read_record(photo.with_suffix(".json"))
        if record and photo.parent == self.path / folder_name(record["predicted"]):
            return False
        return os.path.lexists(photo)  # other processes delete a photo before its record

    def _warn_once(self, path: Path, problem: str) -> None:
        """Log the *problem* of a *path* in this folder, for the first time only."""
        if path not in self._warned:
            log.warning("%s: %s", path, problem)
        self._warned.add(path)

    def list_classes(self, bundle: Bundle) -> None:
        """Add the classes of *bundle* to the file that describes them to Label Studio; raises `OSError`.

        What a person has changed in the file stays.
        """
        if bundle.manifest.id in self._listed:
            return

        file = self.path / LABEL_CONFIG
        view = self._read_view(file)
        if view is not None:
            choices = next(view.iter("Choices"))
            if bundle.manifest.rules.is_multi_label:
                choices.set("choice", "multiple")

            listed = {choice.get("value") for choice in view.iter("Choice")}
            missing = [name for name in (*bundle.labels, NOT_OURS) if name not in listed]
            for name in missing:
                ElementTree.SubElement(choices, "Choice", value=name)
            if missing:
                ElementTree.indent(view)
                _write(file, ElementTree.tostring(view, encoding="utf-8"))
        self._listed.add(bundle.manifest.id)

    def _read_view(self, file: Path) -> ElementTree.Element | None:
        """Read how Label Studio shows a photo and the classes; without *file*, in a first form.

        Return None, with a warning, for a file that has no place for classes.
        """
        comments = ElementTree.TreeBuilder(insert_comments=True)
        parser = ElementTree.XMLParser(target=comments)  # noqa: S314 - expat limits entities
        try:
            view = ElementTree.fromstring(read_file(file, MAX_NAMES_BYTES), parser)  # noqa: S314
        except FileNotFoundError:
            return ElementTree.fromstring(FIRST_VIEW)  # noqa: S314
        except (OSError, ElementTree.ParseError) as error:
            self._warn_once(file, f"gets no new classes, because it cannot be read ({error})")
            return None

        if next(view.iter("Choices"), None) is None:
            self._warn_once(file, "gets no new classes, because it has no <Choices>")
            return None
        return view

    def delete_surplus(self, room: int = 0) -> None:
        """Delete photos that are too old, and others until *room* more bytes fit; raises `OSError`.

        The oldest photo outside of the random sample makes room. While the sample has more than
        `SAMPLE_SHARE` of the bytes, or nothing else is kept, its own oldest photo does. Photos that a
        person has moved make none. What cannot be deleted stays, with a warning.
        """
        photos = sorted(self._list())
        self._unseen = room
        self._listed.clear()  # somebody may have deleted or replaced the file

        # Each photo is kept for the same time.
        oldest = time.time() - self._max_seconds
        remaining = [
            photo
            for photo in photos
            if photo.time >= oldest or not self._try_to_delete(photo, "expired")
        ]

        # The remaining ones make room.
        sample = deque(photo for photo in remaining if is_sampled(photo.path.name))
        others = deque(photo for photo in remaining if not is_sampled(photo.path.name))
        of_sample = sum(photo.size for photo in sample)
        used = of_sample + sum(photo.size for photo in others) + room
        limit = (1 - SPARE) * self._max_bytes

        while (sample or others) and used > limit:
            is_sample_large = of_sample > SAMPLE_SHARE * self._max_bytes
            if sample and (is_sample_large or not others):
                photo = sample.popleft()
                of_sample -= photo.size
            else:
                photo = others.popleft()

            is_free = not self._is_of_person(photo.path)
            if is_free and self._try_to_delete(photo, "no_room"):
                used -= photo.size

        self._is_full = used > limit
        if self._is_full:
            raise OSError(FULL)

    def _try_to_delete(self, photo: _Kept, reason: Deletion) -> bool:
        """Delete *photo*; return whether it is gone. A photo that cannot be deleted keeps no other one."""
        try:
            is_deleted = _delete(photo.path)
        except OSError as error:
            problem = f"its photos cannot be deleted ({os_reason(error)})"
            self._warn_once(photo.path.parent, problem)
            return False
        if is_deleted:
            log.info("deleted a photo", extra={"reason": reason})
        return True

    def _walk(self) -> Iterator[tuple[Path, list[str]]]:
        """Yield the folder and each folder in it, at any depth, with the names of its files.

        Hidden folders, such as the trash of a file manager, and those that cannot be read are left out.
        Raises `OSError` if the folder itself cannot be read.
        """

        def skip(error: OSError) -> None:
            folder = Path(error.filename)
            if isinstance(error, FileNotFoundError):  # deleted meanwhile
                return
            if folder == self.path:
                raise error
            self._warn_once(folder, f"cannot be read ({os_reason(error)}); left out")

        for folder, subfolders, names in os.walk(self.path, onerror=skip):
            subfolders[:] = [name for name in subfolders if not name.startswith(".")]
            yield Path(folder), names

    def _list(self) -> Iterator[_Kept]:
        """Yield the photos in the folder and all folders in it; delete records that have long been alone.

        A record is alone if its photo was moved or deleted by somebody, or if a process was killed.
        """
        self._folders = []
        for folder, names in self._walk():
            self._folders.append(str(folder))

            # The files that a server has written.
            files: dict[str, os.stat_result] = {}
            for name in filter(_KEPT_NAME.fullmatch, names):
                with suppress(OSError):  # deleted meanwhile
                    status = (folder / name).lstat()
                    if stat.S_ISREG(status.st_mode):
                        files[name] = status

            for stem in {Path(name).stem for name in files}:
                record = files.get(f"{stem}.json")
                photos = [stem + suffix for suffix in PHOTO_SUFFIXES if stem + suffix in files]
                for name in photos:
                    size = _size_on_disk(files[name].st_size)
                    size += _size_on_disk(record.st_size if record else 0)
                    yield _Kept(files[name].st_mtime, folder / name, size)

                if (
                    not photos
                    and record is not None
                    and record.st_mtime < time.time() - ALONE_SECONDS
                ):
                    with suppress(OSError):  # in a folder of somebody else
                        (folder / f"{stem}.json").unlink()


def _subfolders(folder: Path) -> list[str]:
    """List the folders in *folder* but hidden ones, none if somebody has deleted it; raises `OSError`."""
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        return [
            entry.path
            for entry in entries
            if entry.is_dir(follow_symlinks=False) and not entry.name.startswith(".")
        ]
    return []


def _is_writable(folder: Path) -> bool:
    return os.access(folder, os.W_OK | os.X_OK)


def _read_record(file: Path) -> dict[str, Any]:
    """Read the fields of the record *file*; {} if it is missing, or nothing that a server has written."""
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        data = json.loads(read_file(file, MAX_TEXT_BYTES))["data"]
        for name in ("predicted", "reasons"):
            data[name].encode()  # raises unless it is text of whole characters
        return dict(data)
    return {}


def _with_earlier(fields: dict[str, Any], record: Path) -> dict[str, Any]:
    """Add the reasons and the suggestion of an earlier *record* of the same photo, if it can be read."""
    earlier = _read_record(record)
    if not earlier:
        return fields
    reasons = [*dict.fromkeys([*earlier["reasons"].split(", "), *fields["reasons"]])]
    suggested = fields["suggested"] or earlier.get("suggested")
    return fields | {"reasons": reasons, "suggested": suggested}


def _make_task(root: Path, photo: Path, fields: dict[str, Any]) -> dict[str, Any]:
    """Return the record with *fields* of *photo* below *root*, as a task of Label Studio.

    Its address is relative to the folder above *root*, which Label Studio is told as its root of
    local files.
    """
    place = quote(f"{root.absolute().name}/{photo.parent.name}/{photo.name}")
    choices = [NOT_OURS] if fields["known"] is False else fields["choices"]
    choice = {
        "from_name": "class",
        "to_name": "image",
        "type": "choices",
        "value": {"choices": choices},
    }
    data = {name: value for name, value in fields.items() if name != "choices"}
    return {
        "data": {
            "image": f"/data/local-files/?d={place}",
            **data,
            "reasons": ", ".join(fields["reasons"]),
        },
        "predictions": [
            {
                "model_version": f"{fields['model']} {fields['bundle'][:12]}",
                "score": max(fields["probabilities"].values()),
                "result": [choice] if choices else [],
            }
        ],
    }


def _write(file: Path, content: bytes) -> None:
    """Write *content* to *file* in one step and to the disk; only its owner can read it."""
    with atomic_write(file, durable=True) as partial:
        set_mode(partial, 0o600)
        partial.write_bytes(content)


def _write_pair(photo: Path, content: bytes, task: bytes) -> None:
    """Write the *content* of *photo*, after its record *task*; raises `OSError`, and leaves no record alone."""
    record = photo.with_suffix(".json")
    _write(record, task)
    try:
        _write(photo, content)
    except OSError:
        if not photo.exists():
            record.unlink(missing_ok=True)
        raise


def _delete(photo: Path) -> bool:
    """Delete the files of *photo*, the record last; return whether the photo was still there."""
    is_there = True
    try:
        photo.unlink()
    except FileNotFoundError:  # another process has deleted it, or somebody has moved it
        is_there = False
    photo.with_suffix(".json").unlink(missing_ok=True)
    return is_there


def _size_on_disk(size: int) -> int:
    return -(-size // FILE_BLOCK) * FILE_BLOCK
