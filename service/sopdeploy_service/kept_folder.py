"""A folder of photos below their predicted classes, each with a record that is a task of Label Studio.

    kept/label-config.xml       the classes, as Label Studio reads them
    kept/cat/ID-sample.jpg      a photo of the random sample that was predicted as a cat, without metadata
    kept/cat/ID-sample.json     its prediction, which is also a task of Label Studio
    kept/cat/ID.jpg             a photo that was kept for another reason

Every file appears in one step, the record before its photo, so several processes and servers can share
the folder without a lock. Somebody may move or delete its files at any time.
"""

import json
import logging
import os
import re
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
    read_file,
    remove_leftovers,
    writing,
)
from sopdeploy.bundle.folder import Bundle
from sopdeploy.data.photos.kept import LABEL_CONFIG, NOT_OURS, SAMPLED, image_id, is_sampled

Deletion = Literal["expired", "no_room"]

# A process looks through the folder after it has written `UNSEEN` of `keep_bytes`, and leaves `SPARE`
# of them free. So the limit also holds while eight other processes write, which it does not see.
SPARE = 0.1
UNSEEN = 0.01
CHECK_SECONDS = 60.0  # between two looks, at most
SAMPLE_SHARE = 0.5  # of the bytes; with more, the random sample makes room
FILE_BLOCK = 4096  # bytes; a file counts as whole blocks
ALONE_SECONDS = 3600.0  # after which a record without a photo is deleted

_KEPT_NAME = re.compile(rf"[0-9a-f]{{32}}(?:{SAMPLED})?\.(?:jpg|png|json)")
_SUFFIXES = (".jpg", ".png")
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

        self._unseen = 0  # bytes written since the last look through the folder
        self._listed: set[str] = set()  # bundles whose classes are in `LABEL_CONFIG`
        self.check_seconds = min(CHECK_SECONDS, max(1.0, max_seconds / 10))

        with writing(path):
            path.mkdir(0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path):  # only to see whether it can be written
                pass
            for folder in (path, *_subfolders(path)):
                remove_leftovers(folder)  # of processes that were killed

    def add(
        self, name: str, content: bytes, fields: dict[str, Any]
    ) -> Literal["kept", "dropped"]:
        """Write the photo *content* as *name* into the folder of its predicted class, and its record.

        The same photo may be kept already. Then the record has the reasons of both, and a photo in the
        folder of another class is deleted. Raises `OSError`; then the photo is not there.
        """
        folder = self.path / folder_name(fields["predicted"])
        previous = [path for path in self._find(name) if path.parent != folder]
        for record in [*previous, folder / name]:
            fields = _with_earlier(fields, record.with_suffix(".json"))

        task = json.dumps(_make_task(self.path, folder / name, fields)).encode()
        size = _size_on_disk(len(content)) + _size_on_disk(len(task))
        if size > (1 - SPARE) * self._max_bytes:
            return "dropped"
        if not previous and not (folder / name).exists():
            self._unseen += size
            if self._unseen > UNSEEN * self._max_bytes:
                self.delete_surplus(room=size)

        for path in (self.path, folder):
            path.mkdir(0o700, exist_ok=True)
        _write_pair(folder / name, content, task)
        for path in previous:
            _delete(path)
        return "kept"

    def _find(self, name: str) -> list[Path]:
        """Find the photo *name* in the folders of all classes."""
        paths = [folder / name for folder in _subfolders(self.path)]
        return [path for path in paths if path.exists()]

    def list_classes(self, bundle: Bundle) -> None:
        """Add the classes of *bundle* to the file that describes them to Label Studio; raises `OSError`."""
        if bundle.manifest.id in self._listed:
            return

        file = self.path / LABEL_CONFIG
        listed: list[str] = []
        with suppress(OSError, ElementTree.ParseError):
            content = read_file(file, MAX_NAMES_BYTES)
            root = ElementTree.fromstring(content)  # noqa: S314 - expat limits entities
            listed = [choice.get("value", "") for choice in root.iter("Choice")]

        names = [*dict.fromkeys((*listed, *bundle.labels, NOT_OURS))]
        if names != listed:
            _write(file, _label_config(names, several=bundle.manifest.rules.is_multi_label))
        self._listed.add(bundle.manifest.id)

    def delete_surplus(self, room: int = 0) -> None:
        """Delete photos that are too old, and others until *room* more bytes fit; raises `OSError`.

        The oldest photo outside of the random sample makes room. While the sample has more than
        `SAMPLE_SHARE` of the bytes, or nothing else is kept, its own oldest photo does.
        """
        photos = sorted(self._list())
        self._unseen = room
        self._listed.clear()  # somebody may have deleted or replaced the file

        # Delete each, whatever happens to the others.
        errors: list[OSError] = []
        for photo, reason in self._choose_surplus(photos, room):
            try:
                is_deleted = _delete(photo.path)
            except OSError as error:
                errors.append(error)
            else:
                if is_deleted:
                    log.info("deleted a photo", extra={"reason": reason})
        if errors:
            raise errors[0]

    def _choose_surplus(
        self, photos: list[_Kept], room: int
    ) -> Iterator[tuple[_Kept, Deletion]]:
        """Yield which of *photos*, the oldest first, `delete_surplus` deletes, and why."""
        # Each photo is kept for the same time.
        oldest = time.time() - self._max_seconds
        for photo in photos:
            if photo.time < oldest:
                yield photo, "expired"

        # The remaining ones make room.
        remaining = [photo for photo in photos if photo.time >= oldest]
        sample = deque(photo for photo in remaining if is_sampled(photo.path.name))
        others = deque(photo for photo in remaining if not is_sampled(photo.path.name))
        of_sample = sum(photo.size for photo in sample)
        used = of_sample + sum(photo.size for photo in others)

        while (sample or others) and used + room > (1 - SPARE) * self._max_bytes:
            is_sample_large = of_sample > SAMPLE_SHARE * self._max_bytes
            if sample and (is_sample_large or not others):
                photo = sample.popleft()
                of_sample -= photo.size
            else:
                photo = others.popleft()
            used -= photo.size
            yield photo, "no_room"

    def _list(self) -> Iterator[_Kept]:
        """Yield the photos in the folder and its subfolders; delete records that have long been alone.

        A record is alone if its photo was moved or deleted by somebody, or if a process was killed.
        """
        for folder in (self.path, *_subfolders(self.path)):
            statuses: dict[str, os.stat_result] = {}
            with suppress(FileNotFoundError), os.scandir(folder) as entries:
                for entry in entries:
                    is_file = entry.is_file(follow_symlinks=False)
                    if is_file and _KEPT_NAME.fullmatch(entry.name):
                        with suppress(FileNotFoundError):  # deleted meanwhile
                            statuses[entry.name] = entry.stat(follow_symlinks=False)

            stems = {Path(name).stem for name in statuses}
            for stem in stems:
                record = statuses.get(f"{stem}.json")
                names = [stem + suffix for suffix in _SUFFIXES if stem + suffix in statuses]
                for name in names:
                    size = _size_on_disk(statuses[name].st_size)
                    size += _size_on_disk(record.st_size if record else 0)
                    yield _Kept(statuses[name].st_mtime, folder / name, size)

                if (
                    not names
                    and record is not None
                    and record.st_mtime < time.time() - ALONE_SECONDS
                ):
                    (folder / f"{stem}.json").unlink(missing_ok=True)


def _subfolders(folder: Path) -> list[Path]:
    """List the folders in *folder*, none if somebody has deleted it; raises `OSError`."""
    folders: list[Path] = []
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        folders += [Path(entry) for entry in entries if entry.is_dir(follow_symlinks=False)]
    return folders


def _with_earlier(fields: dict[str, Any], record: Path) -> dict[str, Any]:
    """Add the reasons and the suggestion of an earlier *record* of the same photo, if it can be read."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        earlier = json.loads(read_file(record, MAX_TEXT_BYTES))["data"]
        reasons = [*dict.fromkeys([*earlier["reasons"].split(", "), *fields["reasons"]])]
        suggested = fields["suggested"] or earlier["suggested"]
        return fields | {"reasons": reasons, "suggested": suggested}
    return fields


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


def _label_config(names: list[str], *, several: bool) -> bytes:
    """Return Label Studio's description of a page that shows a photo and the classes *names*."""
    view = ElementTree.Element("View")
    ElementTree.SubElement(view, "Image", name="image", value="$image")
    choice = "multiple" if several else "single-radio"
    choices = ElementTree.SubElement(
        view, "Choices", name="class", toName="image", choice=choice, showInline="true"
    )
    for name in names:
        ElementTree.SubElement(choices, "Choice", value=name)
    ElementTree.indent(view)
    return ElementTree.tostring(view, encoding="utf-8")


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
