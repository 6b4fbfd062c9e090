"""What this process predicts: shares of the last day beside the seven days before, for an owner without Prometheus.

One line a day in the log and `/info` tell them.
"""

import logging
import time
from collections import Counter as Counts
from collections.abc import Iterator
from dataclasses import dataclass, field

from sopdeploy.bundle.http_api import PredictedShares

DAY = 24  # hours
DAYS_BEFORE = 7
MAX_TOLD_CLASSES = 10  # in a line of the log

log = logging.getLogger("sopdeploy.predictions")


@dataclass
class Predicted:
    """Images by their class, and how many of them are unknown."""

    labels: Counts[str] = field(default_factory=Counts)
    num_unknown: int = 0

    def add(self, other: "Predicted") -> None:
        """Add the images of *other*."""
        self.labels += other.labels
        self.num_unknown += other.num_unknown

    def describe(self) -> PredictedShares:
        """Return the shares."""
        num_images = self.labels.total()
        return PredictedShares(
            num_images=num_images,
            labels={
                label: round(count / num_images, 4) for label, count in self.labels.items()
            },
            unknown=round(self.num_unknown / max(1, num_images), 4),
        )


class DailyShares:
    """The predictions of each bundle in each hour; methods run on the event loop.

    A promoted bundle begins anew: other shares than those of the bundle before do not count as drift.
    """

    def __init__(self) -> None:
        self._hours: dict[tuple[str, str], dict[int, Predicted]] = {}  # of a model, by digest
        self._told: dict[str, int] = {}  # hour of the last line of each model

    def count(self, model_name: str, digest: str, label: str, *, is_unknown: bool) -> None:
        """Count an image of the class *label*, by the bundle *digest* of a model."""
        hour = int(time.time() // 3600)
        self._tell_when_due(model_name, digest, hour)
        counted = self._hours.setdefault((model_name, digest), {}).setdefault(hour, Predicted())
        counted.labels[label] += 1
        counted.num_unknown += is_unknown

    def describe(self, model_name: str, digest: str) -> tuple[PredictedShares, PredictedShares]:
        """Return the shares of the last 24 hours, and of the seven days before, by the bundle *digest*."""
        now = int(time.time() // 3600)
        last_day = Predicted()
        before = Predicted()
        for hour, counted in self._hours.get((model_name, digest), {}).items():
            if hour > now - DAY:
                last_day.add(counted)
            elif hour > now - DAY * (1 + DAYS_BEFORE):
                before.add(counted)
        return last_day.describe(), before.describe()

    def _tell_when_due(self, model_name: str, digest: str, hour: int) -> None:
        """Log the shares once a day, and forget hours that are no longer needed."""
        if hour < self._told.setdefault(model_name, hour) + DAY:
            return

        self._told[model_name] = hour
        last_day, before = self.describe(model_name, digest)
        if last_day.num_images:
            log.info("%s: %s", model_name, ", ".join(describe_shares(last_day, before)))
        for key in [key for key in self._hours if key[0] == model_name]:
            hours = self._hours[key]
            for old in [one for one in hours if one <= hour - DAY * (1 + DAYS_BEFORE)]:
                del hours[old]
            if not hours and key[1] != digest:
                del self._hours[key]


def describe_shares(last_day: PredictedShares, before: PredictedShares) -> Iterator[str]:
    """Describe the shares of predicted classes that differ most from those *before*, in percent."""
    yield f"{last_day.num_images:,} images in 24 h, {before.num_images:,} in 7 days before"
    yield _compare("unknown", last_day.unknown, before.unknown)

    def difference(label: str) -> float:
        return abs(last_day.labels.get(label, 0.0) - before.labels.get(label, 0.0))

    labels = sorted({*last_day.labels, *before.labels}, key=difference, reverse=True)
    for label in labels[:MAX_TOLD_CLASSES]:
        yield _compare(label, last_day.labels.get(label, 0.0), before.labels.get(label, 0.0))


def _compare(name: str, now: float, before: float) -> str:
    return f"{name} {100 * now:.1f} % (before {100 * before:.1f} %)"
