"""What a client can ask of a server, as talks: the one place that knows the paths and their answers."""

from collections.abc import Sequence
from typing import Any

import httpx

from sopdeploy.client.images import Picture, encoded, listed
from sopdeploy.client.results import Classification, ServerInfo, classifications, server_info
from sopdeploy.client.retry import Compute, Patience, Pause, Send, Talk, ask
from sopdeploy.errors import ConfigError, ServiceError, UnreachableError

BYTES = "application/octet-stream"  # the server looks at the bytes; a wrong image type would be a warning
READY_PAUSE_SECONDS = 0.2
PROBE_SECONDS = 5.0


def checked_url(url: str) -> httpx.URL:
    """Return *url*, with or without a path; raises `ConfigError` where it is no address of a server."""
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, TypeError) as problem:
        raise ConfigError(f"{url!r}: not a URL ({problem})") from problem
    if parsed.scheme not in {"http", "https"} or not parsed.host:
        raise ConfigError(f"{url!r}: not the URL of a server; write it as http://host:8000")
    return parsed


def headers(api_key: str | None) -> dict[str, str]:
    """Return the headers of every request; raises `ConfigError` for a key that no header can hold."""
    if api_key is None:
        return {}
    if not api_key.isascii() or not api_key.isprintable() or " " in api_key or not api_key:
        raise ConfigError("the API key holds characters that no header can carry")
    return {"Authorization": f"Bearer {api_key}"}


def classify(
    pictures: Picture | Sequence[Picture],
    top_k: int | None,
    model: str | None,
    gates: bool,
    patience: Patience,
) -> Talk[Classification | list[Classification]]:
    """Ask for the classes of one picture, or of each in a list."""
    items, several = listed(pictures)
    if not items:
        return []
    bodies = tuple(item for item in items if isinstance(item, bytes))
    if len(bodies) < len(items):  # bytes need no thread to be made
        bodies = yield Compute(lambda: tuple(map(encoded, items)))
    wanted: dict[str, Any] = {"top_k": top_k, "model": model, "gates": "true" if gates else None}
    what = Send(
        method="POST",
        path="/v1/classify",
        seconds=patience.seconds,
        headers={} if several else {"Content-Type": BYTES},
        params={name: str(value) for name, value in wanted.items() if value is not None},
        body=None if several else bodies[0],
        form=bodies if several else (),
    )
    response = yield from ask(what, patience)
    found = classifications(response)
    if len(found) != len(bodies):
        raise ServiceError(
            f"{what.path}: {len(found)} results for {len(bodies)} images",
            code="foreign_answer",
            status=response.status_code,
        )
    return found if several else found[0]


def info(patience: Patience) -> Talk[ServerInfo]:
    """Ask which networks answer."""
    response = yield from ask(Send(method="GET", path="/info", seconds=patience.seconds), patience)
    return server_info(response)


def metrics(patience: Patience) -> Talk[str]:
    """Ask for the server's numbers, in Prometheus' text form."""
    response = yield from ask(Send(method="GET", path="/metrics", seconds=patience.seconds), patience)
    return str(response.text)


def wait_ready(patience: Patience) -> Talk[None]:
    """Ask until the server is ready; raises `UnreachableError` with what it said last."""
    last = "was not asked"
    while patience.left() > 0:
        probe = Patience(seconds=min(PROBE_SECONDS, patience.left()), retries=0)
        try:
            yield from ask(Send(method="GET", path="/readyz", seconds=probe.seconds), probe)
        except ServiceError as problem:
            last = str(problem)
        else:
            return
        yield Pause(min(READY_PAUSE_SECONDS, max(0.0, patience.left())))
    raise UnreachableError(f"not ready after {patience.seconds:.3g} s: {last}", code="not_ready", status=0)
