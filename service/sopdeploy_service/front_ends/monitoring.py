"""Metrics and health of several processes on one page."""

import asyncio
import socket
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import cast

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response

from sopdeploy_service.api.schema import Health
from sopdeploy_service.inference.service import State
from sopdeploy_service.server.health_port import monitoring_app

Connect = Callable[[], socket.socket]  # opens a connection to a process

SCRAPE_SECONDS = 2.0  # a process that takes longer counts as down


def group_health_app(workers: Mapping[str, Connect]) -> Starlette:
    """Create the app of the health port of several *workers*, by name: ready if one of them is."""

    async def respond(request: Request) -> Response:
        if request.url.path == "/metrics":
            return Response(await collect(workers, {}), media_type=CONTENT_TYPE_LATEST)
        status: State = "ok"
        if request.url.path == "/readyz":
            answers = await asyncio.gather(*(get(connect, "/readyz", {}) for connect in workers.values()))
            status = "ok" if any(answers) else "draining"
        body = Health(status=status).model_dump_json()
        return Response(body, status_code=200 if status == "ok" else 503, media_type="application/json")

    return monitoring_app(respond)


async def collect(workers: Mapping[str, Connect], headers: Mapping[str, str]) -> bytes:
    """Scrape *workers* (by name) with *headers* and merge their pages."""
    pages = await asyncio.gather(
        *(get(connect, "/metrics?own=true", headers) for connect in workers.values())
    )
    return merge(dict(zip(workers, pages, strict=True)))


async def get(connect: Connect, path: str, headers: Mapping[str, str]) -> str | None:
    """Request *path* from the process that *connect* reaches; None if it does not answer with 200."""
    lines = [
        f"{name}: {value}" for name, value in {"Host": "worker", "Connection": "close", **headers}.items()
    ]
    try:
        async with asyncio.timeout(SCRAPE_SECONDS):
            reader, writer = await asyncio.open_connection(sock=connect())
            writer.write("\r\n".join([f"GET {path} HTTP/1.1", *lines, "", ""]).encode("latin-1"))
            response = await reader.read()
            writer.close()
    except (OSError, TimeoutError):
        return None
    head, _, page = response.partition(b"\r\n\r\n")
    return page.decode() if head.startswith(b"HTTP/1.1 200 ") else None


def merge(pages: Mapping[str, str | None]) -> bytes:
    """Merge the metrics *pages* of processes by name; add the label `process` and `sopdeploy_worker_up`.

    A page is None if its process is down. The name is that of the device, and `DEVICE:NUMBER` of a front end.
    """
    up = Metric("sopdeploy_worker_up", "Whether a process that serves HTTP answers", "gauge")
    families: dict[str, Metric] = {}
    for name, page in pages.items():
        added = {"process": name}
        up.add_sample(up.name, added, float(page is not None))
        for family in text_string_to_metric_families(page or ""):
            merged = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            merged.samples += [
                sample._replace(labels={**sample.labels, **added}) for sample in family.samples
            ]
    pages_merged = SimpleNamespace(collect=lambda: [up, *families.values()])
    return generate_latest(cast(CollectorRegistry, pages_merged))  # which calls only `collect`
