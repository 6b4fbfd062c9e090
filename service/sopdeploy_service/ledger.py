"""What one model has done since it was loaded: the sums behind the protocol's statistics."""

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from sopdeploy_service.outcome import Answered, Outcome, Refusal
from sopdeploy_service.timing import Stages


@dataclass(slots=True)
class Sum:
    """How often something was done, and the seconds it took all together."""

    count: int = 0
    seconds: float = 0.0

    def add(self, seconds: float, count: int = 1) -> None:
        """Count it *count* times more."""
        self.count += count
        self.seconds += seconds


@dataclass(slots=True)
class Ledger:
    """Written and read on the event loop only.

    *stages* are sums over requests (of the images of a request the slowest counts), *batches* over images by
    the size of the batch they were in. Requests refused before they came to the model are not in here.
    """

    success: Sum = field(default_factory=Sum)
    failure: Sum = field(default_factory=Sum)
    stages: defaultdict[str, Sum] = field(default_factory=lambda: defaultdict(Sum))
    batches: defaultdict[int, Sum] = field(default_factory=lambda: defaultdict(Sum))
    last: float = 0.0  # time.time() of the last answer

    def note(self, found: Sequence[Outcome] | Refusal, stages: Stages, seconds: float) -> None:
        """Count a request that became *found* in so many *seconds*; one refused image makes it a failure."""
        outcomes = [] if isinstance(found, Refusal) else found
        answered = [outcome for outcome in outcomes if isinstance(outcome, Answered)]
        for outcome in answered:
            self.batches[outcome.batch].add(outcome.infer_seconds)
        if not answered or len(answered) < len(outcomes):
            self.failure.add(seconds)
            return
        self.last = time.time()
        self.success.add(seconds)
        for stage, spent in stages.seconds.items():
            self.stages[stage].add(spent)

    def executions(self) -> dict[int, Sum]:
        """Return the runs of the engine by batch size: the images of a batch shared one run and its time."""
        return {
            size: Sum(round(images.count / size), images.seconds / size)
            for size, images in sorted(self.batches.items())
        }
