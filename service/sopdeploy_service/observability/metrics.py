"""The Prometheus metrics of one server process, in their own registry."""

import math
from collections import Counter as Counts
from collections.abc import Mapping, Sequence
from functools import cache, partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Summary, disable_created_metrics

from sopdeploy.bundle.folder import Bundle
from sopdeploy.decision import Reference
from sopdeploy.evaluation.drift import SIGNIFICANCE, TESTS, Drift, PredictionCounts
from sopdeploy_service.observability.logs import DROPPED
from sopdeploy_service.runtime.base import Runtime

SECONDS_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
REQUEST_PARTS = ("success", "fail", "decode", "queue", "infer")
WINDOW_IMAGES = 1000  # predictions per test for drift
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)

disable_created_metrics()  # type: ignore[no-untyped-call] # nothing reads these series


class Metrics:
    """Every metric of one server; requests cannot create new label values."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        counter = partial(Counter, namespace="sopdeploy", registry=registry)
        gauge = partial(Gauge, namespace="sopdeploy", registry=registry)
        histogram = partial(Histogram, namespace="sopdeploy", registry=registry)
        self._requests = counter("requests", "Requests answered", ("route", "code", "model"))
        self._request_seconds = histogram(
            "request_duration_seconds",
            "From request to response",
            ("route", "model"),
            buckets=SECONDS_BUCKETS,
        )
        self.inference_seconds = Summary(
            "inference_seconds",
            "Requests with images: success and fail are whole requests, the others stages of successful ones",
            ("model", "part"),
            namespace="sopdeploy",
            registry=registry,
        )
        self.last_inference = gauge(
            "last_inference_timestamp_seconds", "End of the last request with images", ("model",)
        )
        self._stage_seconds = histogram(
            "stage_duration_seconds",
            "Load (wait for the model), receive, decode, queue, infer",
            ("stage",),
            buckets=SECONDS_BUCKETS,
        )
        self.decode_seconds = counter("decode_seconds", "Busy time, sum over all decoders")
        self.decoders = gauge("decoders", "Child processes that decode images of up to 3 megapixels")
        self.max_decode_bytes = gauge(
            "max_decode_bytes", "Memory of a child process that decodes large images"
        )
        self.batch_size = histogram("batch_size", "Images in a batch", ("model",), buckets=BATCH_BUCKETS)
        self.batch_close = counter(
            "batch_close", "Why a batch closed: full, or the worker was idle", ("model", "reason")
        )
        self.rejected = counter("rejected", "Images or requests rejected", ("reason",))
        self.cancelled = counter("cancelled", "Requests whose client disconnected")
        self.nonfinite_outputs = counter("nonfinite_outputs", "Images whose output is not finite", ("model",))
        self.unknown_images = counter(
            "unknown_images", "Images whose score is below the rejection threshold", ("model",)
        )
        self.kept_images = counter(
            "kept_images",
            "Photographs to keep: kept, near_duplicate, dropped (too many or too large), failed (disk)",
            ("result",),
        )
        self.model_memory = gauge("model_memory_bytes", "With a memory budget; 0: not loaded", ("model",))
        self.model_loads = counter("model_loads", "Loads with a memory budget", ("model",))
        self.queue_depth = gauge("queue_depth", "Images admitted and not yet answered")
        self.runtime_seconds = counter("runtime_seconds", "Busy time of the runtime", ("model",))
        self.connections = gauge("connections", "Open connections")
        self.upload_bytes = gauge("upload_bytes", "Bytes of request bodies not yet answered")
        self.dropped_log_lines = DROPPED  # of this process, whichever server it has
        registry.register(DROPPED)
        self.loop_lag = gauge("event_loop_lag_seconds", "Largest lag of the last 10 s")
        self._drift_distance = gauge(
            "drift_distance",
            "Distance (0 to 1) of 1,000 predictions to those of the held-out images",
            ("model", "of"),
        )
        self._drift_p_value = gauge(
            "drift_p_value",
            f"Probability of at least this difference without drift; below {SIGNIFICANCE} is an alarm",
            ("model", "of"),
        )
        # `labels` validates and looks up its values on every call.
        self._requests_of = cache(self._requests.labels)
        self._request_seconds_of = cache(self._request_seconds.labels)
        self._stage_seconds_of = cache(self._stage_seconds.labels)
        self._info = gauge("bundle_info", "Always 1", ("digest", "model", "precision", "runtime"))
        self._models: dict[str, ModelMetrics] = {}
        self._loaded: Counts[tuple[str, ...]] = Counts()

    def of(self, model: str) -> "ModelMetrics":
        """Return the metrics of *model*, shared by all of its versions."""
        if model not in self._models:
            self._models[model] = ModelMetrics(self, model)
        return self._models[model]

    def show_drift(self, model: str) -> None:
        """Show the drift of *model*, NaN before its first full window."""
        counts = self.of(model)
        for test in TESTS:
            self._drift_distance.labels(model, test).set_function(partial(counts.drift_of, test, "distance"))
            self._drift_p_value.labels(model, test).set_function(partial(counts.drift_of, test, "p_value"))

    def count_bundle(self, name: str, bundle: Bundle, runtime: Runtime, change: int) -> None:
        """Count *bundle* as loaded under *name* on *runtime* (*change* 1) or as unloaded (-1).

        A bundle may be loaded again before the last request of its previous load has a response. The
        metrics therefore contain it while its count is positive.
        """
        labels = (bundle.manifest.id, name, bundle.manifest.precision, runtime.name)
        self._loaded[labels] += change
        if self._loaded[labels]:
            self._info.labels(*labels).set(1)
        else:
            del self._loaded[labels]
            self._info.remove(*labels)

    def request(self, route: str, code: int, seconds: float, model: str = "") -> None:
        """Count a response with the status *code*, from *model* if the request chose one."""
        self._requests_of(route, str(code), model).inc()
        self._request_seconds_of(route, model).observe(seconds)

    def stage(self, stage: str, seconds: float) -> None:
        """Count *seconds* spent in `load`, `receive`, `decode`, `queue` or `infer`."""
        self._stage_seconds_of(stage).observe(seconds)


class ModelMetrics:
    """The metrics of one model, shared by all of its versions."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self._stage = metrics.stage
        # Created here, so that they show 0 before the first batch.
        self._size = metrics.batch_size.labels(model)
        self.nonfinite = metrics.nonfinite_outputs.labels(model)
        self._close, self._model = metrics.batch_close, model
        self._busy = metrics.runtime_seconds.labels(model)
        self._seconds = {part: metrics.inference_seconds.labels(model, part) for part in REQUEST_PARTS}
        self._last = metrics.last_inference.labels(model)
        self.drift: Drift | None = None  # of the version that ran the last batch

    def request(
        self, result: Literal["success", "fail"], seconds: float, stages: Mapping[str, float]
    ) -> None:
        """Count a request with images that ended after *seconds*, of which *stages* are parts."""
        for stage in stages.keys() & {"load", "receive"}:
            self._stage(stage, stages[stage])
        self._last.set_to_current_time()
        self._seconds[result].observe(seconds)
        if result == "success":
            for part in REQUEST_PARTS[2:]:
                self._seconds[part].observe(stages.get(part, 0.0))

    def batch(
        self,
        waited: Sequence[float],
        max_batch: int,
        started: float,
        ended: float,
    ) -> None:
        """Count a batch that ran from *started* to *ended*; its images *waited* so many seconds."""
        num_images = len(waited)
        self._size.observe(num_images)
        self._close.labels(self._model, "full" if num_images == max_batch else "idle").inc()
        self._busy.inc(ended - started)
        self._stage("infer", ended - started)
        for seconds in waited:
            self._stage("queue", seconds)

    def drift_of(self, test: str, what: Literal["distance", "p_value"]) -> float:
        """Return the result of the drift *test*; NaN before the first full window."""
        return math.nan if self.drift is None else float(getattr(self.drift.tests[test], what))


def drift_window(bundle: Bundle) -> "DriftWindow | None":
    """Create the window of *bundle*; None if it has no predictions for held-out images."""
    decision = bundle.manifest.decision
    if decision is None or decision.reference is None:
        return None
    return DriftWindow(decision.reference)


class DriftWindow:
    """Counts predictions, and compares every full window with the held-out ones. Not thread-safe.

    Each window of `WINDOW_IMAGES` is tested once, so the false-alarm rate of `sopdeploy.evaluation.drift`
    holds per window. Testing all predictions again at every scrape would raise more and more false alarms.
    """

    def __init__(self, reference: Reference) -> None:
        self._reference = reference
        self._counts = PredictionCounts(len(reference.classes))
        self.latest: Drift | None = None  # of the last full window

    def add(self, logits: Sequence[NDArray[np.float32]]) -> None:
        """Count the predictions of images with *logits* (C,)."""
        if not logits:
            return
        self._counts.add_logits(np.stack(logits))
        if self._counts.images >= WINDOW_IMAGES:
            self.latest = self._counts.compare(self._reference)
            self._counts = PredictionCounts(len(self._reference.classes))
