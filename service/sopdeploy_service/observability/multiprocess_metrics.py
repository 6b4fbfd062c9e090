"""Merge the metrics of several worker processes; adds the label `device`."""

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import httpx
from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

TIMEOUT_SECONDS = 2.0  # a worker that takes longer counts as down


async def collect(workers: Mapping[str, str], headers: Mapping[str, str]) -> bytes:
    """Scrape *workers* (base URLs by device) with *headers* and merge their pages."""

    async def scrape(client: httpx.AsyncClient, url: str) -> str | None:
        try:
            response = await client.get(f"{url}/metrics", params={"own": "true"}, headers=dict(headers))
        except httpx.HTTPError:
            return None
        return response.text if response.status_code == httpx.codes.OK else None

    async with httpx.AsyncClient(timeout=TIMEOUT_SECONDS, trust_env=False) as client:
        pages = await asyncio.gather(*(scrape(client, url) for url in workers.values()))
    return merge(dict(zip(workers, pages, strict=True)))


def merge(pages: Mapping[str, str | None]) -> bytes:
    """Merge *pages* by device (None: worker down); add `sopdeploy_worker_up`."""
    registry = CollectorRegistry()
    registry.register(_MergedPages(pages))
    return generate_latest(registry)


@dataclass(eq=False)  # the registry needs the hash of the identity
class _MergedPages(Collector):
    pages: Mapping[str, str | None]

    def collect(self) -> Iterable[Metric]:
        """Collect the metric families of all pages, joined by name."""
        up = GaugeMetricFamily(
            "sopdeploy_worker_up", "Whether the process of a device answers", labels=("device",)
        )
        families: dict[str, Metric] = {}
        for device, page in self.pages.items():
            up.add_metric((device,), float(page is not None))
            for family in text_string_to_metric_families(page or ""):
                merged = families.setdefault(
                    family.name, Metric(family.name, family.documentation, family.type)
                )
                merged.samples += [
                    sample._replace(labels={**sample.labels, "device": device}) for sample in family.samples
                ]
        return [up, *families.values()]
