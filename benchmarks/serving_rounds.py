"""Results of the server benchmarks by round, and their medians."""

import statistics
from dataclasses import dataclass, field

from load import Load
from measure import Result


@dataclass(slots=True)
class Rounds:
    """Measurements of one server in one case, one value per round.

    `ratios` compare with the reference of the same round; `refused` counts responses other than 200. Each
    benchmark documents what `cpu_ms` includes; `all_cpu_ms` is all CPU time of the server per image.
    """

    server: str
    case: str
    ratios: list[float] = field(default_factory=list)
    images_per_s: list[float] = field(default_factory=list)
    p99_ms: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    all_cpu_ms: list[float] = field(default_factory=list)
    refused: int = 0

    def note(self, load: Load, cpu_ms: float, all_cpu_ms: float = 0.0) -> None:
        """Add the measurements of one round."""
        self.all_cpu_ms.append(all_cpu_ms)
        self.images_per_s.append(load.images_per_s)
        self.p99_ms.append(load.p99_ms)
        self.cpu_ms.append(cpu_ms)
        self.refused += sum(count for code, count in load.codes.items() if code != "200")

    def medians(self) -> tuple[float, float, float]:
        """Medians of images per second, p99 and CPU milliseconds per image."""
        middle = statistics.median
        return middle(self.images_per_s), middle(self.p99_ms), middle(self.cpu_ms)

    def results(self, against: str) -> list[Result]:
        """Return throughput, p99 and CPU time; the ratio to *against* is the median of the rounds."""
        rate, p99, cpu = self.medians()
        runs, case = len(self.ratios), f"{self.case}, {self.server}"
        reference = rate / statistics.median(self.ratios)
        return [
            Result(
                case=f"{case}: throughput",
                against=against,
                ours=rate,
                other=reference,
                unit="images/s",
                runs=runs,
            ),
            Result(case=f"{case}: p99", ours=p99, unit="ms", runs=runs),
            Result(case=f"{case}: CPU per image", ours=cpu, unit="cpu-ms", runs=runs),
            Result(
                case=f"{case}: all CPU per image",
                ours=statistics.median(self.all_cpu_ms),
                unit="cpu-ms",
                runs=runs,
            ),
        ]
