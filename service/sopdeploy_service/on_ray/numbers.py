"""The service's metrics among those of Ray: a page of ours would answer for one replica only.

All are gauges there, as they stand: Ray keeps the numbers of each process apart by the tag `replica`, so
that Prometheus' `rate` and `histogram_quantile` read counters and buckets as ever. `sopdeploy_requests_total`
becomes `ray_sopdeploy_requests_total`.
"""

from collections.abc import Iterable

from prometheus_client import Metric
from ray.util.metrics import Gauge

REPLICA = "replica"


class Numbers:
    """What was told to Ray, so that what is gone becomes 0 there."""

    def __init__(self, replica: str) -> None:
        self._replica = replica
        self._gauges: dict[str, Gauge] = {}
        self._known: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}

    def tell(self, families: Iterable[Metric]) -> None:
        """Tell Ray every sample of *families*; for all of a name the labels are the same."""
        found: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        for family in families:
            for sample in family.samples:
                if not sample.name.endswith("_created"):
                    found[sample.name, tuple(sorted(sample.labels.items()))] = sample.value
        for (name, labels), value in {**dict.fromkeys(self._known, 0.0), **found}.items():
            if self._known.get((name, labels)) != value:
                self._gauge(name, tuple(key for key, _ in labels)).set(
                    value, tags={**dict(labels), REPLICA: self._replica}
                )
        self._known = found

    def _gauge(self, name: str, labels: tuple[str, ...]) -> Gauge:
        if name not in self._gauges:
            self._gauges[name] = Gauge(name, tag_keys=(*labels, REPLICA))
        return self._gauges[name]
