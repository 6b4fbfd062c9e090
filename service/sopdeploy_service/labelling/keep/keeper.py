"""Keep photographs that are worth a label: unknown, uncertain and reported ones, and a small uniform sample.

A request only appends its photographs and logits to a queue. One thread decides which to keep,
lets a decoder process copy them without metadata, and stores them. Photographs are dropped if
the queue is full, and those outside of the uniform sample if more than one comes per `PAUSE`:
nobody labels as many, and copies take time from requests.

If a server has several processes, each decides on its own photographs, and one stores those of
all.
"""

import logging
import queue
import socket
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from sopdeploy.bundle.folder import Bundle
from sopdeploy.decision import sigmoid
from sopdeploy.errors import ImageError
from sopdeploy.images.near_hash import near_hash
from sopdeploy.photos.files import image_id
from sopdeploy.version import __version__
from sopdeploy_service.inference.model import Model
from sopdeploy_service.inference.results import Prediction, RejectedError
from sopdeploy_service.labelling.keep import forwarding
from sopdeploy_service.labelling.keep.folder import Deletion, KeptFolder, KeptResult
from sopdeploy_service.labelling.kept import (
    MAX_KEPT_LABELS,
    KeptRecord,
    Reason,
)
from sopdeploy_service.observability.metrics import Metrics
from sopdeploy_service.settings import Settings

LOW_MARGIN = 0.2  # between the probabilities of the two most probable classes
MAX_QUEUED_PHOTOS = 256
MAX_QUEUED_PHOTO_BYTES = 64_000_000
PAUSE = 0.5  # seconds between two photographs outside of the sample, on average
BURST = 60.0  # seconds without one, after which as many may come at once
_STOP_SECONDS = 5.0  # for the photographs in the queue

log = logging.getLogger("sopdeploy.keep")
CopyImage: TypeAlias = Callable[[bytes], tuple[bytes, str]]  # `Decoders.copy`


class PredictedPhoto(NamedTuple):
    """A file, the network's input (H, W, 3) uint8, and the logits (C,) of *bundle*, served as *model*.

    *reported* is the class that a person suggests after a wrong answer, "" without a
    suggestion; None if nobody has reported one.
    """

    image: bytes
    pixels: NDArray[np.uint8]
    logits: NDArray[np.float32]
    bundle: Bundle
    model: str
    time: datetime
    reported: str | None = None


def reasons_to_keep(
    bundle: Bundle,
    logits: NDArray[np.float32],
    identity: str,
    share: float,
    *,
    is_reported: bool = False,
) -> tuple[Reason, ...]:
    """List why an image with the ID *identity* and with *logits* (C,) of *bundle* is worth a label.

    *share* of all files are in the uniform sample. The margin of a network with several classes
    per image is twice the distance of a probability from its threshold, for the closest class.
    """
    # Compute the margin: between the two best classes, or to the nearest threshold of a class.
    manifest = bundle.manifest
    answer = manifest.rules.answer(logits, top_k=2)
    if manifest.rules.thresholds is None:  # one class per image
        probabilities = [probability for _, probability in answer.ranked]
        margin = probabilities[0] - (probabilities[1] if len(probabilities) > 1 else 0.0)
    else:
        margin = (
            2
            * np.abs(
                sigmoid(manifest.rules.calibrate(logits)) - manifest.rules.thresholds
            ).min()
        )

    reasons: dict[Reason, bool] = {
        "unknown": answer.known is False,  # None: the bundle does not tell
        "low_margin": bool(margin < LOW_MARGIN),
        "sample": int(identity[:8], 16) < share * 2**32,  # the first 32 bits are uniform
        "reported": is_reported,
    }

    return tuple(reason for reason, applies in reasons.items() if applies)


def open_keeper(
    settings: Settings, metrics: Metrics, copy: CopyImage, *, is_keeper: bool
) -> "Keeper | None":
    """Create the keeper of the folder `keep` of *settings*; None if it is not set.

    One process keeps the photographs of all, as far as they are connected (`Keeper.connect`);
    *is_keeper* says whether it is this one. Raises as `KeptFolder` does.
    """
    if settings.keep is None:
        return None
    folder = None

    # Only the process that keeps the photographs has the folder; the others send them to it.
    if is_keeper:
        for reason in get_args(Deletion):  # from 0 on, as `Metrics.load_failures`
            metrics.kept_deleted.labels(reason)
        folder = KeptFolder(
            settings.keep,
            settings.keep_bytes,
            settings.keep_days,
            on_delete=lambda reason: metrics.kept_deleted.labels(reason).inc(),
        )

    return Keeper(folder, settings.keep_sample, metrics, copy)


class WorthPhoto(NamedTuple):
    """A file of this or of another process that is worth a label, and its record."""

    image: bytes
    record: KeptRecord


class Keeper:
    """Passes copies made by *copy* to *folder* in a thread; *share* of all photographs are the sample.

    The thread also deletes what is too old. Without a *folder*, photographs that are worth a
    label go to another process, which keeps them. With one, those of other processes are kept,
    too.
    """

    def __init__(
        self, folder: KeptFolder | None, share: float, metrics: Metrics, copy: CopyImage
    ) -> None:
        self._folder = folder
        self._share = share
        self._copy = copy
        self._socket: socket.socket | None = None  # to the keeping process

        self._counts = {
            result: metrics.kept_images.labels(result) for result in get_args(KeptResult)
        }

        # The queue between the event loop and the thread, and how many bytes it holds.
        self._photos: queue.SimpleQueue[PredictedPhoto | WorthPhoto | None] = (
            queue.SimpleQueue()
        )
        # Two totals instead of one counter: each is written by one thread only, so no lock is
        # needed. The event loop adds the bytes that it puts into the queue, the keeper's thread
        # those that it takes out.
        self._bytes_in = self._bytes_out = 0

        self._next_time = -BURST  # when another photo outside of the sample may be kept
        self._thread = threading.Thread(target=self._run, name="keeper", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def connect(self, end: socket.socket) -> None:
        """Use *end*, a socket from another process or, without a folder, to the one that keeps now."""
        if self._folder is not None:
            forwarding.Receiver(end, self.receive, self._drop)
        else:
            # The thread may still use an earlier socket, whose other end is closed.
            self._socket = end

    def stop(self) -> None:
        """Store what is queued, for at most `_STOP_SECONDS`, and end the thread."""
        self._photos.put(None)
        self._thread.join(_STOP_SECONDS)

    def offer(
        self, model: Model, image: bytes, prediction: Prediction, reported: str | None = None
    ) -> None:
        """Queue *image* with its *prediction* by *model*, on the event loop; drop it if the queue is full.

        *reported* is the class that a person suggests instead, "" without a suggestion.
        """
        logits_name = model.bundle.manifest.outputs[0].name
        photo = PredictedPhoto(
            image=image,
            pixels=prediction.pixels,
            logits=prediction.outputs[logits_name],
            bundle=model.bundle,
            model=model.name,
            time=datetime.now(UTC),
            reported=reported,
        )
        self._queue_or_drop(photo)

    def receive(self, image: bytes, record: KeptRecord) -> None:
        """Queue what another process forwards, on the event loop; drop it if the queue is full."""
        self._queue_or_drop(WorthPhoto(image, record))

    def _queue_or_drop(self, photo: PredictedPhoto | WorthPhoto) -> None:
        """Queue *photo* for the thread; count it as dropped if the queue is full."""
        size = _size_of(photo)
        queued = self._bytes_in - self._bytes_out

        if self._photos.qsize() >= MAX_QUEUED_PHOTOS or queued + size > MAX_QUEUED_PHOTO_BYTES:
            self._drop()
            return
        self._bytes_in += size
        self._photos.put(photo)

    def _drop(self) -> None:
        self._counts["dropped"].inc()

    def _run(self) -> None:
        """Keep photographs from the queue until None, and clean up the folder."""
        next_clean_up = 0.0
        # How long it waits for a photograph; without a folder to clean up, without limit.
        timeout = None if self._folder is None else self._folder.clean_up_seconds
        while True:
            if self._folder is not None and time.monotonic() >= next_clean_up:
                try:
                    self._folder.clean_up()
                except OSError as error:
                    log.warning(
                        "%s: cannot be cleaned up (%s)", self._folder.path, error.strerror
                    )
                next_clean_up = time.monotonic() + self._folder.clean_up_seconds

            try:
                photo = self._photos.get(timeout=timeout)
            except queue.Empty:
                continue

            if photo is None:
                return

            self._bytes_out += _size_of(photo)

            try:
                result = self._keep(photo)
            except Exception:  # untrusted bytes, and nothing else sees the error of this thread
                log.exception("a photo of %d bytes is not kept", len(photo.image))
                result = "failed"

            if result is not None:  # None: not worth a label, or counted by the keeping process
                self._counts[result].inc()

    def _keep(self, photo: PredictedPhoto | WorthPhoto) -> KeptResult | None:
        """Store or forward *photo* if it is worth a label; return the result to count.

        It is None for a photograph that is not worth one, and for one that the keeping process
        counts.
        """
        worth = self._judge(photo) if isinstance(photo, PredictedPhoto) else photo
        if worth is None:
            return None

        # All photos of the sample are kept, so that it stays uniform. Others have a limited rate.
        if "sample" not in worth.record.reasons and not self._is_in_time():
            return "dropped"
        return self._store(worth)

    def _is_in_time(self) -> bool:
        """Check whether a photo outside of the sample may be kept now, and if so, count it.

        Each takes `PAUSE` of time. Up to `BURST` of time without one is saved for later ones.
        """
        now = time.monotonic()
        if now < self._next_time:
            return False
        self._next_time = max(self._next_time, now - BURST) + PAUSE
        return True

    def _judge(self, photo: PredictedPhoto) -> WorthPhoto | None:
        """Describe *photo* if it is worth a label."""
        identity = image_id(photo.image)
        is_reported = photo.reported is not None
        reasons = reasons_to_keep(
            photo.bundle, photo.logits, identity, self._share, is_reported=is_reported
        )
        if not reasons:
            return None

        # The suffix is not known before the copy is made; until then, it is `.jpg`.
        return WorthPhoto(photo.image, _describe(photo, reasons, f"{identity}.jpg"))

    def _store(self, photo: WorthPhoto) -> KeptResult | None:
        """Copy *photo* without its metadata into the folder, or send it to the process that has it."""
        record = photo.record
        if self._folder is None:
            end = self._socket
            is_taken = end is not None and forwarding.forward(end, photo.image, record)
            return None if is_taken else "dropped"

        name = Path(record.image).stem
        if self._folder.has_duplicate(name, record):
            return "near_duplicate"

        try:
            copy, suffix = self._copy(photo.image)
        except (ImageError, RejectedError):
            return "dropped"
        return self._folder.add(copy, record.model_copy(update={"image": f"{name}{suffix}"}))


def _describe(photo: PredictedPhoto, reasons: tuple[Reason, ...], image: str) -> KeptRecord:
    """Describe *photo*, which is worth a label for *reasons* and is kept as the file *image*."""
    manifest = photo.bundle.manifest
    labels = photo.bundle.labels
    # The labels in the record: all, or those with the largest logits.
    indexes = list(range(len(labels)))
    if len(labels) > MAX_KEPT_LABELS:
        indexes = np.argsort(-photo.logits, kind="stable")[:MAX_KEPT_LABELS].tolist()

    answer = manifest.rules.answer(photo.logits, top_k=1)
    return KeptRecord(
        written_by=__version__,
        image=image,
        bundle=manifest.id,
        model=photo.model,
        time=photo.time,
        reasons=reasons,
        labels=tuple(labels[index] for index in indexes),
        logits=tuple(manifest.rules.calibrate(photo.logits)[indexes].tolist()),
        known=answer.known,
        score=answer.score,
        near_hash=near_hash(photo.pixels),
        suggested=photo.reported or None,
    )


def _size_of(photo: PredictedPhoto | WorthPhoto) -> int:
    """Return the bytes of *photo* in the queue."""
    return len(photo.image) + (photo.pixels.nbytes if isinstance(photo, PredictedPhoto) else 0)
