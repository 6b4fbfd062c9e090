"""Keep photos that clients send, because a label for them would help: unknown, uncertain, reported, and a sample.

A request only appends its photo to a queue. One thread of each process decides which photos to keep,
lets a decoder process copy them without metadata, and writes them (`kept_folder`). Photos are dropped if
the queue is full, and those outside of the random sample if more than one comes per `PAUSE`: nobody
labels as many, and copies take time from requests.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from sopdeploy.base.files import os_reason
from sopdeploy.bundle.decision import sigmoid, softmax
from sopdeploy.bundle.folder import Bundle
from sopdeploy.data.photos.kept import SAMPLED, image_id
from sopdeploy.errors import ImageError
from sopdeploy.version import __version__
from sopdeploy_service.inference.model import Model
from sopdeploy_service.inference.results import Prediction, RejectedError
from sopdeploy_service.kept_folder import KeptFolder, KeptResult
from sopdeploy_service.observability.metrics import Metrics
from sopdeploy_service.settings import Settings

Reason = Literal["sample", "unknown", "low margin", "reported"]
CopyImage: TypeAlias = Callable[[bytes], tuple[bytes, str]]  # `Decoders.copy`

LOW_MARGIN = 0.2  # between the probabilities of the two most probable classes
MAX_PROBABILITIES = 100  # classes in a record, the most probable ones

MAX_QUEUED_PHOTOS = 256
MAX_QUEUED_BYTES = 64_000_000
PAUSE = 0.5  # seconds between two photos outside of the sample, on average
BURST = 60.0  # seconds without one, after which as many may come at once
STOP_SECONDS = 5.0  # for the photos in the queue

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
        self._folder = KeptFolder(folder, settings.keep_bytes, 86_400 * settings.keep_days)

        # Counters begin with 0, so that their first increase is seen.
        self._counts = {
            result: metrics.kept_images.labels(result) for result in get_args(KeptResult)
        }

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
