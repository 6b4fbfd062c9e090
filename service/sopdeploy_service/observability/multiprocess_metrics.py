"""The metrics of several worker processes as one page: every sample says which device it is of."""

import asyncio
from collections.abc import Iterable, Mapping

import httpx
from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

SECONDS = 2.0  # a sibling that takes longer to tell its numbers counts as down


async def collect(siblings: Mapping[str, str], headers: Mapping[str, str]) -> bytes:
    """Return the metrics of *siblings*, URLs by device, asked at once with a client's *headers* on."""
    async with httpx.AsyncClient(timeout=SECONDS, trust_env=False) as client:
        texts = await asyncio.gather(*(ask(client, url, headers) for url in siblings.values()))
    return merge(dict(zip(siblings, texts, strict=True)))


async def ask(client: httpx.AsyncClient, url: str, headers: Mapping[str, str]) -> str | None:
    """Return the metrics page of one sibling's own numbers, or None where it gives none."""
    try:
        reply = await client.get(f"{url}/metrics", params={"own": "true"}, headers=dict(headers))
    except httpx.HTTPError:
        return None
    return reply.text if reply.status_code == httpx.codes.OK else None


def merge(texts: Mapping[str, str | None]) -> bytes:
    """Return one page of the pages *texts* by device, with `sopdeploy_worker_up` for each; None is down."""
    registry = CollectorRegistry()
    registry.register(Merged(texts))
    return generate_latest(registry)


class Merged(Collector):
    """What prometheus_client asks for the families of a page."""

    def __init__(self, texts: Mapping[str, str | None]) -> None:
        self._texts = texts

    def collect(self) -> Iterable[Metric]:
        """Return the families of all pages, joined by name."""
        up = GaugeMetricFamily(
            "sopdeploy_worker_up", "Whether a device's process answers", labels=("device",)
        )
        families: dict[str, Metric] = {}
        for device, text in self._texts.items():
            up.add_metric((device,), float(text is not None))
            for family in text_string_to_metric_families(text or ""):
                joined = families.setdefault(
                    family.name, Metric(family.name, family.documentation, family.type)
                )
                joined.samples += [
                    sample._replace(labels={**sample.labels, "device": device}) for sample in family.samples
                ]
        return [up, *families.values()]
