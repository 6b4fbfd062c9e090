"""The line that the log has for each request: who, what, how it went, how long; never a picture or a key."""

import logging

from starlette.types import Scope

from sopdeploy_service.tally import Tally

log = logging.getLogger("sopdeploy.access")

PROBES = frozenset({"/livez", "/readyz", "/metrics", "/v2/health/live", "/v2/health/ready"})
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


def note(scope: Scope, route: str, tally: Tally, status: int, seconds: float) -> None:
    """Log the request of *scope*, answered with *status* in *seconds*.

    A status of 0 means that no answer left. Probes and scrapes are logged at debug level.
    """
    level = logging.DEBUG if route in PROBES and status < 400 else logging.INFO
    if not log.isEnabledFor(level):
        return
    model = scope["state"].get("model")
    fields = {
        "request": tally.request,
        "key": tally.key.name if tally.key is not None else None,
        "method": scope["method"] if scope["method"] in METHODS else "other",
        "route": route,
        "status": status,
        "code": tally.code,
        "model": model.name if model is not None else None,
        "digest": model.version if model is not None else None,
        "images": tally.images,
        "bytes": tally.bytes,
        "ms": round(seconds * 1000, 2),
        "stages_ms": {name: round(spent * 1000, 2) for name, spent in tally.stages.seconds.items()},
        "trace": tally.trace.id if tally.trace is not None else None,
    }
    log.log(level, "request", extra={name: value for name, value in fields.items() if value is not None})
