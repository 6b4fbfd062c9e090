"""Keep photos that clients send, because a label for them would help: unknown, uncertain, reported, and a sample.

    kept/label-config.xml       the classes, as Label Studio reads them
    kept/cat/ID-sample.jpg      a photo of the random sample that was predicted as a cat, without metadata
    kept/cat/ID-sample.json     its prediction, which is also a task of Label Studio
    kept/cat/ID.jpg             a photo that was kept for another reason

A request only appends its photo to a queue. One thread of each process decides which photos to keep
and writes them. Every file appears in one step, the record before its photo, so several processes and
servers can share the folder without a lock. Somebody may move or delete its files at any time.
"""

import json
import logging
import os
import queue
import re
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, get_args
from urllib.parse import quote
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from sopdeploy.bundle.folder import Bundle
from sopdeploy.decision import sigmoid, softmax
from sopdeploy.errors import ImageError
from sopdeploy.file_systems import set_mode
from sopdeploy.files import (
    MAX_NAMES_BYTES,
    MAX_TEXT_BYTES,
    atomic_write,
    os_reason,
    read_file,
    remove_leftovers,
    writing,
)
from sopdeploy.photos.kept import LABEL_CONFIG, NOT_OURS, SAMPLED, image_id, is_sampled
from sopdeploy.version import __version__
from sopdeploy_service.inference.model import Model
from sopdeploy_service.inference.results import Prediction, RejectedError
from sopdeploy_service.observability.metrics import Metrics
from sopdeploy_service.settings import Settings

Reason = Literal["sample", "unknown", "low margin", "reported"]
KeptResult = Literal["kept", "dropped", "failed"]
Deletion = Literal["expired", "no_room"]
CopyImage: TypeAlias = Callable[[bytes], tuple[bytes, str]]  # `Decoders.copy`

LOW_MARGIN = 0.2  # between the probabilities of the two most probable classes
MAX_PROBABILITIES = 100  # classes in a record, the most probable ones

MAX_QUEUED_PHOTOS = 256
MAX_QUEUED_BYTES = 64_000_000
PAUSE = 0.5  # seconds between two photos outside of the sample, on average
BURST = 60.0  # seconds without one, after which as many may come at once
STOP_SECONDS = 5.0  # for the photos in the queue

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


class QueuedPhoto(NamedTuple):
    """A file that a client has sent, and the logits (C,) that *bundle*, served as *model*, has for it.

    *reported* is the class that a person suggests after a wrong prediction, "" without a suggestion;
    None if nobody has reported one.
    """

    image: bytes
    logits: NDArray[np.float32]
    bundle: Bundle
    model: str
    time: datetime
    reported: str | None


def reasons_to_keep(
    bundle: Bundle,
    logits: NDArray[np.float32],
    identity: str,
    share: float,
    *,
    is_reported: bool = False,
) -> list[Reason]:
    """List why an image with the ID *identity* and with *logits* (C,) of *bundle* is worth a label.

    *share* of all files are in the random sample. The margin of a network with several classes
    per image is twice the distance of a probability from its threshold, for the closest class.
    """
    rules = bundle.manifest.rules
    answer = rules.answer(logits, top_k=2)

    # The margin: between the two best classes, or to the nearest threshold of a class.
    if rules.thresholds is None:
        probabilities = [probability for _, probability in answer.ranked]
        margin = probabilities[0] - (probabilities[1] if len(probabilities) > 1 else 0.0)
    else:
        margin = 2 * np.abs(sigmoid(rules.calibrate(logits)) - rules.thresholds).min()

    reasons: dict[Reason, bool] = {
        "sample": int(identity[:8], 16) < share * 2**32,  # the first 32 bits are uniform
        "unknown": answer.known is False,  # None: the bundle does not tell
        "low margin": bool(margin < LOW_MARGIN),
        "reported": is_reported,
    }
    return [reason for reason, applies in reasons.items() if applies]


def folder_name(label: str) -> str:
    """Return the name of the folder of the class *label*, which may be any text.

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


class Keeper:
    """Writes photos that are worth a label into a folder, within the limits of *settings*, in a thread.

    *copy* copies an image without its metadata, and returns the suffix of its file.
    """

    def __init__(
        self, folder: Path, settings: Settings, metrics: Metrics, copy: CopyImage
    ) -> None:
        """Create *folder*, which only its owner can read; raises `StorageError` if it cannot be written."""
        self._share = settings.keep_sample
        self._copy = copy
        self._folder = KeptFolder(
            folder,
            settings.keep_bytes,
            86_400 * settings.keep_days,
            on_delete=lambda reason: metrics.kept_deleted.labels(reason).inc(),
        )

        # Counters begin with 0, so that their first increase is seen.
        self._counts = {
            result: metrics.kept_images.labels(result) for result in get_args(KeptResult)
        }
        for reason in get_args(Deletion):
            metrics.kept_deleted.labels(reason)

        # Two totals of bytes instead of one: each is written by one thread only, so no lock is needed.
        self._photos: queue.SimpleQueue[QueuedPhoto | None] = queue.SimpleQueue()
        self._bytes_in = self._bytes_out = 0

        self._next_time = -BURST  # when another photo outside of the sample may be kept
        self._is_failing = False
        self._thread = threading.Thread(target=self._run, name="keeper", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Store what is queued, for at most `STOP_SECONDS`, and end the thread."""
        self._photos.put(None)
        self._thread.join(STOP_SECONDS)

    def offer(
        self, model: Model, image: bytes, prediction: Prediction, reported: str | None = None
    ) -> None:
        """Queue *image* with its *prediction* by *model*, on the event loop; drop it if the queue is full.

        *reported* is the class that a person suggests instead, "" without a suggestion.
        """
        waiting = self._bytes_in - self._bytes_out
        if self._photos.qsize() >= MAX_QUEUED_PHOTOS or waiting + len(image) > MAX_QUEUED_BYTES:
            self._counts["dropped"].inc()
            return

        logits = prediction.outputs[model.bundle.manifest.outputs[0].name]
        photo = QueuedPhoto(
            image, logits, model.bundle, model.name, datetime.now(UTC), reported
        )
        self._bytes_in += len(image)
        self._photos.put(photo)

    def _run(self) -> None:
        """Keep photos from the queue until None, and delete those that are too old."""
        next_check = 0.0
        while True:
            if time.monotonic() >= next_check:
                self._look_through()
                next_check = time.monotonic() + self._folder.check_seconds

            try:
                photo = self._photos.get(timeout=self._folder.check_seconds)
            except queue.Empty:
                continue

            if photo is None:
                return
            self._bytes_out += len(photo.image)

            result = self._try_to_keep(photo)
            if result is not None:
                self._counts[result].inc()

    def _look_through(self) -> None:
        try:
            self._folder.delete_surplus()
        except OSError as error:
            self._warn(error)

    def _try_to_keep(self, photo: QueuedPhoto) -> KeptResult | None:
        """Keep *photo* if it is worth a label; return the result to count, None for one that is not."""
        try:
            result = self._keep(photo)
        except (ImageError, RejectedError):  # no decoder could copy it
            return "dropped"
        except OSError as error:
            self._warn(error)
            return "failed"
        except Exception:  # untrusted bytes, and nothing else sees the error of this thread
            log.exception("a photo of %d bytes is not kept", len(photo.image))
            return "failed"

        if result == "kept" and self._is_failing:
            log.warning("%s: can be written again", self._folder.path)
            self._is_failing = False
        return result

    def _warn(self, error: OSError) -> None:
        """Log that the folder cannot be written, once until it can be written again."""
        if not self._is_failing:
            log.warning(
                "%s: cannot be written (%s); no photo is kept",
                self._folder.path,
                os_reason(error),
            )
        self._is_failing = True

    def _keep(self, photo: QueuedPhoto) -> KeptResult | None:
        """Write *photo* if it is worth a label and may be written now; raises as *copy* does, and `OSError`."""
        identity = image_id(photo.image)
        is_reported = photo.reported is not None
        reasons = reasons_to_keep(
            photo.bundle, photo.logits, identity, self._share, is_reported=is_reported
        )
        if not reasons:
            return None

        # All photos of the sample are kept, so that it stays random. Others have a limited rate.
        is_sample = "sample" in reasons
        if not is_sample and not self._is_in_time():
            return "dropped"

        content, suffix = self._copy(photo.image)
        name = f"{identity}{SAMPLED if is_sample else ''}{suffix}"
        result = self._folder.add(name, content, describe(photo, reasons))
        self._folder.list_classes(photo.bundle)
        return result

    def _is_in_time(self) -> bool:
        """Check whether a photo outside of the sample may be kept now, and if so, count it.

        Each takes `PAUSE` of time. Up to `BURST` of time without one is saved for later ones.
        """
        now = time.monotonic()
        if now < self._next_time:
            return False
        self._next_time = max(self._next_time, now - BURST) + PAUSE
        return True


def describe(photo: QueuedPhoto, reasons: list[Reason]) -> dict[str, Any]:
    """Describe *photo*, which is kept for *reasons*: the fields of its record but for those of its place."""
    rules = photo.bundle.manifest.rules
    labels = photo.bundle.labels
    answer = rules.answer(photo.logits)

    # The most probable classes, whether or not they reach their thresholds.
    calibrated = rules.calibrate(photo.logits)
    probabilities = (sigmoid if rules.is_multi_label else softmax)(calibrated)
    best = np.argsort(-calibrated, kind="stable")[:MAX_PROBABILITIES].tolist()

    present = [labels[index] for index, _ in answer.ranked]
    return {
        "predicted": labels[best[0]],
        "choices": present if rules.is_multi_label else present[:1],
        "probabilities": {labels[index]: float(probabilities[index]) for index in best},
        "known": answer.known,
        "score": answer.score,
        "bundle": photo.bundle.manifest.id,
        "model": photo.model,
        "time": photo.time.isoformat(),
        "reasons": reasons,
        "suggested": photo.reported or None,
        "written_by": __version__,
    }


class _Kept(NamedTuple):
    """A photo in the folder: when it was written, and the bytes of its files on the disk."""

    time: float
    path: Path
    size: int


class KeptFolder:
    """A folder of kept photos with limits in bytes and in seconds, which other processes use as well."""

    def __init__(
        self,
        path: Path,
        max_bytes: int,
        max_seconds: float,
        on_delete: Callable[[Deletion], None],
    ) -> None:
        """Create *path*; *on_delete* is called for each deleted photo. Raises `StorageError`."""
        self.path = path
        self._max_bytes = max_bytes
        self._max_seconds = max_seconds
        self._on_delete = on_delete

        self._unseen = 0  # bytes written since the last look through the folder
        self._listed: set[str] = set()  # bundles whose classes are in `LABEL_CONFIG`
        self.check_seconds = min(CHECK_SECONDS, max(1.0, max_seconds / 10))

        with writing(path):
            path.mkdir(0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path):  # only to see whether it can be written
                pass
            for folder in (path, *_subfolders(path)):
                remove_leftovers(folder)  # of processes that were killed

    def add(self, name: str, content: bytes, fields: dict[str, Any]) -> KeptResult:
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
                    self._on_delete(reason)
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
