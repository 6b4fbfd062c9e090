"""The numbers of a server at two moments, and what grew between them."""

import time
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from sopdeploy.errors import ServiceError


@dataclass(frozen=True, slots=True)
class Scrape:
    """What `/metrics` said at *moment* (`time.monotonic`)."""

    samples: tuple[Sample, ...]
    moment: float = field(default_factory=time.monotonic)

    def total(self, name: str, **labels: str) -> float:
        """Return the sum of the samples `sopdeploy_`*name* that have *labels*; 0 where there is none."""
        wanted = labels.items()
        return sum(
            sample.value
            for sample in self.samples
            if sample.name == f"sopdeploy_{name}" and wanted <= sample.labels.items()
        )

    @property
    def processes(self) -> int:
        """Return how many processes answer behind the port, each with an engine of its own."""
        return sum(sample.name == "sopdeploy_decoders" for sample in self.samples)


@dataclass(frozen=True, slots=True)
class Between:
    """What happened from the scrape *before* to that *after*."""

    before: Scrape
    after: Scrape

    @property
    def seconds(self) -> float:
        """Return how long that was."""
        return self.after.moment - self.before.moment

    def grown(self, name: str, **labels: str) -> float:
        """Return by how much a counter grew; a server that began anew in between has none."""
        return max(0.0, self.after.total(name, **labels) - self.before.total(name, **labels))

    def mean(self, name: str, **labels: str) -> float:
        """Return the mean of what a histogram saw; 0 where it saw nothing."""
        count = self.grown(f"{name}_count", **labels)
        return self.grown(f"{name}_sum", **labels) / count if count else 0.0


def read(text: str) -> Scrape:
    """Return the scrape that *text* is; raises `ServiceError` where no sopdeploy server wrote it."""
    try:
        samples = tuple(
            sample
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name.startswith("sopdeploy_")
        )
    except ValueError as problem:
        raise not_ours(str(problem)) from problem
    scrape = Scrape(samples)
    if not scrape.processes:
        raise not_ours("its numbers are not there")
    return scrape


def not_ours(reason: str) -> ServiceError:
    """Return the error of numbers that this version does not know."""
    return ServiceError(
        f"/metrics: not those of a sopdeploy server of this version ({reason})",
        code="foreign_answer",
        status=200,
    )
