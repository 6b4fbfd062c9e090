"""The answer to a client while no process serves HTTP."""

import asyncio
import contextlib
import json
from http import HTTPStatus
from typing import cast

from sopdeploy_service.inference import results


def refusal_response(root_path: str) -> bytes:
    """Build the HTTP response to every request while no process serves HTTP: problem details.

    Paths below `/v2` get them, too. The link to the page of errors is below *root_path*.
    """
    reason = results.RUNTIME_DEAD
    title = HTTPStatus(reason.status).phrase
    page = f"{root_path}/errors#{reason.code}"
    problem = {"type": page, "title": title, "status": reason.status, "code": reason.code}
    body = json.dumps({**problem, "detail": reason.message}, separators=(",", ":")).encode()

    lines = (
        f"HTTP/1.1 {reason.status} {title}",
        "Content-Type: application/problem+json",
        f"Content-Length: {len(body)}",
        f"Retry-After: {reason.retry_after}",
        "Connection: close",
    )
    return "".join(f"{line}\r\n" for line in lines).encode() + b"\r\n" + body


class Refusal(asyncio.Protocol):
    """Sends *response* to a client, whatever it sends."""

    def __init__(self, response: bytes) -> None:
        self._response = response
        self.transport: asyncio.Transport | None = None
        self.ended = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the response as the last one."""
        self.transport = cast(asyncio.Transport, transport)
        self.transport.write(self._response)
        if self.transport.can_write_eof():  # not with HTTPS
            with contextlib.suppress(OSError):  # the client has gone
                self.transport.write_eof()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        """Note that the client has closed the connection."""
        self.ended.set()
