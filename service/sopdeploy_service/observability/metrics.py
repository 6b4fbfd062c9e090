"""What the server tells Prometheus, in a registry of its own: two servers never share a number."""

import threading
import time
from collections import Counter as Counts
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, Counter, Gauge, Metric, generate_latest
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from sopdeploy.bundle.folder import Bundle
from sopdeploy_service.runtime.base import Runtime

MOST = 1024  # observations that are kept before they are counted, of each histogram


class Histograms(Collector):
    """The metric *name*, described by *what*: a histogram for each value of one *label*. Thread-safe.

    *bounds* are the upper ends of its buckets, ascending; a bucket holds what is equal to its end.
    """

    def __init__(self, name: str, what: str, bounds: Sequence[float], label: str) -> None:
        self._name, self._what, self.label = name, what, label
        self._bounds = (*map(float, bounds), float("inf"))
        self._kept: defaultdict[str, deque[float]] = defaultdict(deque)
        self._counts: dict[str, NDArray[np.int64]] = {}
        self._sums: defaultdict[str, float] = defaultdict(float)
        self._counting = threading.Lock()

    def open(self, value: str) -> None:
        """Let the histogram of *value* be shown, also before the first observation."""
        self._kept[value]

    def observe(self, value: str, amount: float) -> None:
        """Count *amount* in the histogram of *value*."""
        kept = self._kept[value]
        kept.append(amount)
        if len(kept) >= MOST:
            with self._counting:
                self._count(value)

    def describe(self) -> Iterable[HistogramMetricFamily]:
        """Return the metric without a number."""
        return [HistogramMetricFamily(self._name, self._what, labels=(self.label,))]

    def collect(self) -> Iterable[HistogramMetricFamily]:
        """Return the metric as it stands now."""
        (family,) = self.describe()
        with self._counting:
            for value in list(self._kept):
                totals = self._count(value).cumsum().tolist()
                ends = map(floatToGoString, self._bounds)
                family.add_metric((value,), list(zip(ends, totals, strict=True)), self._sums[value])
        return [family]

    def _count(self, value: str) -> NDArray[np.int64]:
        """Count what is kept for *value* and return how many each of its buckets holds."""
        kept = self._kept[value]
        amounts = np.array([kept.popleft() for _ in range(len(kept))], np.float64)
        counts = self._counts.setdefault(value, np.zeros(len(self._bounds), np.int64))
        counts += np.bincount(np.searchsorted(self._bounds, amounts), minlength=len(self._bounds))
        self._sums[value] += float(amounts.sum())
        return counts


SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
WINDOW_SECONDS = 10.0


class BusyMeter:
    """Which share of the last seconds the engine was at work. Thread-safe."""

    def __init__(self) -> None:
        self._spans: deque[tuple[float, float]] = deque()
        self._born = time.monotonic()
        self._lock = threading.Lock()

    def add(self, started: float, ended: float) -> None:
        """Count the time from *started* to *ended* (`time.monotonic`) as work."""
        with self._lock:
            self._spans.append((started, ended))
            self._forget(ended)

    def ratio(self) -> float:
        """Return the share, 0 to 1, of the last `WINDOW_SECONDS`."""
        with self._lock:
            now = time.monotonic()
            self._forget(now)
            begin = max(self._born, now - WINDOW_SECONDS)
            busy = sum(ended - max(started, begin) for started, ended in self._spans)
            return min(1.0, busy / max(now - begin, 1e-9))

    def _forget(self, now: float) -> None:
        while self._spans and self._spans[0][1] < now - WINDOW_SECONDS:
            self._spans.popleft()


class ModelMetrics:
    """The numbers of one model, whichever of its versions gives them."""

    def __init__(self, metrics: "Metrics", model: str) -> None:
        self.busy = BusyMeter()
        self._metrics = metrics
        self._model = model

    def batch(self, waited: Sequence[float], largest: int, started: float, ended: float) -> None:
        """Count a batch that ran from *started* to *ended*, whose images had *waited* so many seconds."""
        self._metrics.batch(self._model, len(waited), "full" if len(waited) == largest else "idle")
        self.busy.add(started, ended)
        self._metrics.stage("infer", ended - started)
        for seconds in waited:
            self._metrics.stage("queue", seconds)

    def nonfinite(self, images: int) -> None:
        """Count *images* for which the network gave numbers that are not finite."""
        self._metrics.nonfinite(self._model, images)


class Metrics:
    """Every metric of one server; labels have few values, whatever clients send."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = self._counter("requests", "Requests answered", "route", "code", "model")
        self._request_seconds = self._histogram(
            "request_duration_seconds", "From request to answer", SECONDS, "route"
        )
        self._stage_seconds = self._histogram(
            "stage_duration_seconds", "Receive, decode, queue, infer", SECONDS, "stage"
        )
        self._decode_seconds = self._counter("decode_seconds", "At work, of all decoders together")
        self._decoders = self._gauge("decoders", "Threads that decode")
        self._batch_size = self._histogram("batch_size", "Images in a batch", BATCHES, "model")
        self._closed = self._counter(
            "batch_close", "Why a batch closed: full, or the engine was free", "model", "reason"
        )
        self._rejected = self._counter("rejected", "Images or requests refused", "reason")
        self._cancelled = self._counter("cancelled", "Requests whose client left")
        self._nonfinite = self._counter("nonfinite_outputs", "Images whose output is not finite", "model")
        self._depth = self._gauge("queue_depth", "Images admitted and not yet answered")
        self._busy = self._gauge("engine_busy_ratio", "Share of the last 10 s", "model")
        self._connections = self._gauge("connections", "Open connections")
        self._upload_bytes = self._gauge("upload_bytes", "Bytes of bodies not yet answered")
        self._loop_lag = self._gauge("event_loop_lag_seconds", "Largest lag of the last 10 s")
        self._fast_drift = self._gauge(
            "fast_decode_drift", "Of the logits, of their spread; measured at the start", "model"
        )
        self._fast_agreement = self._gauge(
            "fast_decode_agreement",
            "Share of pictures whose best class stays; measured at the start",
            "model",
        )
        self._info = self._gauge("bundle_info", "Always 1", "digest", "model", "precision", "engine")

        self._models: dict[str, ModelMetrics] = {}
        self._loaded: Counts[tuple[str, ...]] = Counts()
        self._children: dict[tuple[object, ...], Counter] = {}  # to find one takes longer than to count in it

    def of(self, model: str) -> ModelMetrics:
        """Return the numbers of *model*; the same whenever it is asked for."""
        if model not in self._models:
            found = self._models[model] = ModelMetrics(self, model)
            self._busy.labels(model).set_function(found.busy.ratio)
            self._batch_size.open(model)  # shown as 0 before the first
            self._nonfinite.labels(model)
        return self._models[model]

    def serves(self, name: str, bundle: Bundle, runtime: Runtime) -> None:
        """Say that *bundle* is loaded under *name*, on *runtime*."""
        labels = (bundle.manifest.id, name, bundle.manifest.precision, runtime.name)
        self._loaded[labels] += 1
        self._info.labels(*labels).set(1)

    def decodes_fast(self, name: str, drift: float, agreement: float) -> None:
        """Say by how much fast decoding moves the numbers of the model *name*."""
        self._fast_drift.labels(name).set(drift)
        self._fast_agreement.labels(name).set(agreement)

    def serves_no_more(self, name: str, bundle: Bundle, runtime: Runtime) -> None:
        """Say that *bundle* is gone; it may have been loaded anew before its last request had its answer."""
        labels = (bundle.manifest.id, name, bundle.manifest.precision, runtime.name)
        self._loaded[labels] -= 1
        if not self._loaded[labels]:
            del self._loaded[labels]
            self._info.remove(*labels)

    def request(self, route: str, code: int, seconds: float, model: str = "") -> None:
        """Count a request answered with the status *code*, by *model* where one was asked."""
        self._child(self._requests, route, code, model).inc()
        self._request_seconds.observe(route, seconds)

    def stage(self, stage: str, seconds: float) -> None:
        """Count *seconds* spent in one of `receive`, `decode`, `queue`, `infer`."""
        self._stage_seconds.observe(stage, seconds)

    def decoders(self, threads: int) -> None:
        """Say how many *threads* decode."""
        self._decoders.set(threads)

    def decoded(self, seconds: float) -> None:
        """Count *seconds* of a decoder at work; the stage `decode` has the wait for one in it too."""
        self._decode_seconds.inc(seconds)

    def batch(self, model: str, size: int, closed: str) -> None:
        """Count a batch of *size* images and why it was *closed*."""
        self._batch_size.observe(model, size)
        self._child(self._closed, model, closed).inc()

    def rejected(self, reason: str) -> None:
        """Count a refusal; *reason* is its code."""
        self._child(self._rejected, reason).inc()

    def cancelled(self) -> None:
        """Count a request whose client left before its answer."""
        self._cancelled.inc()

    def nonfinite(self, model: str, images: int) -> None:
        """Count *images* for which *model* gave numbers that are not finite."""
        self._child(self._nonfinite, model).inc(images)

    def depth(self, images: Callable[[], int]) -> None:
        """Ask *images*, at every scrape, how many are admitted and not yet answered."""
        self._depth.set_function(images)

    def connections(self, number: int) -> None:
        """Say how many connections are open."""
        self._connections.set(number)

    def upload_bytes(self, number: Callable[[], int]) -> None:
        """Ask *number*, at every scrape, how many bytes the bodies hold whose requests are not answered."""
        self._upload_bytes.set_function(number)

    def loop_lag(self, worst: Callable[[], float]) -> None:
        """Ask *worst* for the seconds by which the event loop was late, at every scrape."""
        self._loop_lag.set_function(worst)

    def families(self) -> Iterable[Metric]:
        """Return every metric with its samples, as they stand now."""
        return self._registry.collect()

    def render(self) -> bytes:
        """Return every metric in Prometheus' text form."""
        return generate_latest(self._registry)

    def _child(self, metric: Counter, *labels: object) -> Counter:
        """Return the child of *metric* with *labels*, which have few values."""
        key = (metric, *labels)
        found = self._children.get(key)
        if found is None:
            found = self._children[key] = metric.labels(*map(str, labels))
        return found

    def _counter(self, name: str, what: str, *labels: str) -> Counter:
        return Counter(f"sopdeploy_{name}", what, labels, registry=self._registry)

    def _gauge(self, name: str, what: str, *labels: str) -> Gauge:
        return Gauge(f"sopdeploy_{name}", what, labels, registry=self._registry)

    def _histogram(self, name: str, what: str, bounds: tuple[float, ...], label: str) -> Histograms:
        found = Histograms(f"sopdeploy_{name}", what, bounds, label)
        self._registry.register(found)
        return found
