"""What the benchmarks of servers keep of each: figures by round, and their medians."""

import statistics
from dataclasses import dataclass, field

from load import Load


@dataclass(slots=True)
class Rounds:
    """One server in one case, a figure for each round; *refused* counts answers other than 200.

    Which CPU time of an image *cpu_ms* is, its benchmark says.
    """

    server: str
    case: str
    ratios: list[float] = field(default_factory=list)
    images_per_s: list[float] = field(default_factory=list)
    p99_ms: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    refused: int = 0

    def note(self, load: Load, cpu_ms: float) -> None:
        """Note what one round measured."""
        self.images_per_s.append(load.images_per_s)
        self.p99_ms.append(load.p99_ms)
        self.cpu_ms.append(cpu_ms)
        self.refused += sum(count for code, count in load.codes.items() if code != "200")

    def medians(self) -> tuple[float, float, float]:
        """Return images per second, p99 and CPU milliseconds per image, each the median of its rounds."""
        middle = statistics.median
        return middle(self.images_per_s), middle(self.p99_ms), middle(self.cpu_ms)
