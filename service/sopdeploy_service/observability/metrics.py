"""The Prometheus metrics of one server process, in their own registry."""

import functools
from collections import Counter as Counts
from collections.abc import Sequence

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)

from sopdeploy.bundle.decision import Answer
from sopdeploy.bundle.folder import Bundle
from sopdeploy.errors import SopdeployError
from sopdeploy_service.observability.busy import WINDOW as BUSY_WINDOW
from sopdeploy_service.observability.busy import BusyShare
from sopdeploy_service.observability.logs import DROPPED
from sopdeploy_service.observability.pages import keys_gauge
from sopdeploy_service.observability.predictions import DailyShares

SECONDS_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)
# Classes that are counted one by one, the first ones of a bundle: each is a series.
MAX_COUNTED_CLASSES = 100
OTHER = "other"  # all further classes
CONFIDENCE_BUCKETS = tuple(tenth / 10 for tenth in range(1, 11))
ATTEMPTS = ("1", "2", "3", "4", "5")  # others are counted together

disable_created_metrics()  # type: ignore[no-untyped-call] # nothing reads these series


class Metrics:
    """Every metric of one server; requests cannot create new label values."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        counter = functools.partial(Counter, namespace="sopdeploy", registry=registry)
        gauge = functools.partial(Gauge, namespace="sopdeploy", registry=registry)
        histogram = functools.partial(Histogram, namespace="sopdeploy", registry=registry)
        seconds_of = functools.partial(histogram, buckets=SECONDS_BUCKETS)

        # Requests.
        self._requests = counter(
            "requests",
            "Requests that got a response; reason: code of the error, empty without one",
            ("route", "code", "model", "reason"),
        )
        self._request_seconds = seconds_of(
            "request_duration_seconds",
            "Seconds from request to response; refused requests (4xx, 5xx) are fast",
            ("route", "model", "status"),
        )
        self._attempts = counter(
            "attempts",
            "Requests with the header X-Request-Attempt; attempts above 1 are retries",
            ("attempt",),
        )
        for attempt in (*ATTEMPTS, "other"):
            self._attempts.labels(attempt)

        self._stage_seconds = seconds_of(
            "stage_duration_seconds",
            "Seconds in a stage: receive, decode_queue (wait for a decoder), decode, "
            "queue (wait for the runtime), infer",
            ("stage",),
        )

        # Decoding and batches.
        self.decode_seconds = counter(
            "decode_seconds", "Seconds of decoding, in all decoders together"
        )
        self.decoders = gauge(
            "decoders", "Child processes that decode images of up to 3 megapixels"
        )
        self.max_decode_bytes = gauge(
            "max_decode_bytes", "Memory limit of a process that decodes large images"
        )

        self.batch_size = histogram(
            "batch_size", "Images in a batch", ("model",), buckets=BATCH_BUCKETS
        )
        self.decoder_ended = counter(
            "decoder_ended",
            "Replaced decoder processes; reason: a limit, a wrong reply or a signal",
            ("reason",),
        )

        # What was refused, and what the answers were.
        self.rejected = counter("rejected", "Rejected images or requests", ("reason",))
        self.unknown_images = counter(
            "unknown_images",
            "Images whose score is below the rejection threshold",
            ("model", "digest"),
        )
        self._predictions = counter(
            "predictions",
            f"Images by their most probable class; after the first {MAX_COUNTED_CLASSES} classes: {OTHER}",
            ("model", "digest", "label"),
        )
        self._confidence = histogram(
            "confidence",
            "Probability of the most probable class",
            ("model", "digest"),
            buckets=CONFIDENCE_BUCKETS,
        )
        self.shares = DailyShares()

        # Kept photographs.
        self.kept_images = counter(
            "kept_images",
            "Photos worth a label; result: kept, dropped (too many or too large) or failed (disk)",
            ("result",),
        )

        # Models.
        self.load_failures = counter(
            "load_failures",
            "Failed reloads, by the code of the error",
            ("code",),
        )
        self.reload_failed = gauge(
            "reload_failed",
            "1 if the bundles could not be reloaded the last time, so that those before stay in use",
        )

        # The series of all codes begin at 0: Prometheus sees no increase in one that begins at 1.
        codes = [
            "internal",
            SopdeployError.code,
            *(kind.code for kind in SopdeployError.__subclasses__()),
        ]
        for code in codes:
            self.load_failures.labels(code)

        # What the server has to do now, and how busy it is.
        self.device_busy = BusyShare()
        self.loop_busy = BusyShare()
        self.busy_shares = [self.device_busy, self.loop_busy]  # also those of decoders
        self.busy = gauge(
            "busy",
            f"Share of the last {BUSY_WINDOW} s in which the decoders, the device or the event loop "
            "worked, whichever is largest",
        )
        self.busy.set_function(lambda: max(one.share() for one in self.busy_shares))
        self.images_waiting = gauge(
            "images_waiting", "Images that wait for a decoder or a batch"
        )
        self.images_running = gauge("images_running", "Images in a decoder or a batch")
        self.queue_depth = gauge(
            "queue_depth",
            "Deprecated, leaves in 0.5: sum of sopdeploy_images_waiting and sopdeploy_images_running",
        )
        self.runtime_seconds = counter(
            "runtime_seconds", "Seconds in which the runtime worked", ("model",)
        )

        self.connections = gauge(
            "connections", "Open connections, also before the end of their handshake"
        )
        self.upload_bytes = gauge(
            "upload_bytes", "Bytes of the bodies of requests without a response yet"
        )
        self.ready = gauge("ready", "1 if the process is ready for images, else 0")
        self.limit = gauge(
            "limit",
            "Limit: images of the whole server, connections or upload_bytes of a process",
            ("of",),
        )

        # What a person must renew or repair.
        self.keys_unreadable = keys_gauge(registry)
        self.certificate_expiry = gauge(
            "certificate_expiry_timestamp_seconds",
            "Time at which the certificate of ssl_certfile expires; 0 without HTTPS",
        )

        # A global counter, which is an attribute because the documentation lists attributes.
        self.dropped_log_lines = DROPPED
        registry.register(DROPPED)

        ProcessCollector(registry=registry)

        # Looking up a child by its labels takes longer than counting.
        self._child = functools.cache(lambda metric, *labels: metric.labels(*labels))

        self._info = gauge(
            "bundle_info",
            "Always 1; the labels describe the loaded bundle",
            ("digest", "model", "precision", "runtime"),
        )
        # How often a bundle is loaded, by the labels of `_info`.
        self._loaded: Counts[tuple[str, ...]] = Counts()

    def create_series(self, model_name: str) -> None:
        """Create the series of a model, at 0."""
        for metric in (
            self.batch_size,
            self.runtime_seconds,
        ):
            metric.labels(model_name)

    def create_predictions(
        self, model_name: str, digest: str, labels: Sequence[str], *, rejects: bool
    ) -> None:
        """Create the series of the predictions of a model, the bundle *digest* with *labels*, at 0.

        Prometheus sees no increase in a series that begins at 1. *rejects* tells whether the model
        may find an image unknown.
        """
        counted = [
            *labels[:MAX_COUNTED_CLASSES],
            *([OTHER] if len(labels) > MAX_COUNTED_CLASSES else []),
        ]
        for label in counted:
            self._child(self._predictions, model_name, digest, label)
        self._child(self._confidence, model_name, digest)
        if rejects:
            self._child(self.unknown_images, model_name, digest)

    def count_prediction(
        self, model_name: str, digest: str, labels: Sequence[str], answer: Answer
    ) -> None:
        """Count the *answer* of a model, the bundle *digest* with *labels*, one of which every image has."""
        index, confidence = answer.ranked[0]
        label = labels[index] if index < MAX_COUNTED_CLASSES else OTHER
        self._child(self._predictions, model_name, digest, label).inc()
        self._child(self._confidence, model_name, digest).observe(confidence)

        is_unknown = answer.known is False  # None: the bundle does not tell
        if is_unknown:
            self._child(self.unknown_images, model_name, digest).inc()
        self.shares.count(model_name, digest, label, is_unknown=is_unknown)

    def count_bundle(self, name: str, bundle: Bundle, runtime: str, change: int) -> None:
        """Count *bundle* as loaded under *name* on *runtime* (*change* 1) or as unloaded (-1).

        A bundle may be loaded again before the last request of its previous load has a
        response. The metrics therefore contain it while its count is positive.
        """
        labels = (bundle.manifest.id, name, bundle.manifest.precision, runtime)

        self._loaded[labels] += change
        if self._loaded[labels]:
            self._info.labels(*labels).set(1)
        else:
            del self._loaded[labels]
            self._info.remove(*labels)

    def count_load_failure(self, error: Exception) -> None:
        """Count a reload that ended with *error*; until another one succeeds, the bundles before stay in use."""
        self.reload_failed.set(1)
        self.load_failures.labels(
            error.code if isinstance(error, SopdeployError) else "internal"
        ).inc()

    def count_request(
        self,
        route: str,
        code: int,
        seconds: float,
        model_name: str = "",
        attempt: str | None = None,
        reason: str = "",
    ) -> None:
        """Count a response with the status *code*, from *model_name* if the request chose one.

        *attempt* is the number that the client has sent, whatever it is. *reason* is the code of
        the error, if the response is one.
        """
        if attempt is not None:
            self._child(self._attempts, attempt if attempt in ATTEMPTS else "other").inc()
        self._child(self._requests, route, str(code), model_name, reason).inc()
        status = f"{code // 100}xx"
        self._child(self._request_seconds, route, model_name, status).observe(seconds)

    def observe_stage(self, stage: str, seconds: float) -> None:
        """Count *seconds* spent in *stage*."""
        self._child(self._stage_seconds, stage).observe(seconds)

    def count_batch(
        self,
        model_name: str,
        waited: Sequence[float],
        started: float,
        ended: float,
    ) -> None:
        """Count a batch of *model_name* from *started* to *ended*; its images *waited* so many seconds."""
        self._child(self.batch_size, model_name).observe(len(waited))
        self._child(self.runtime_seconds, model_name).inc(ended - started)
        self.observe_stage("infer", ended - started)

        queue = self._child(self._stage_seconds, "queue")
        for seconds in waited:
            queue.observe(seconds)
