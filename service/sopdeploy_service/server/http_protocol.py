"""One connection, under limits: what uvicorn's HTTP/1.1 leaves open, a client cannot use.

uvicorn waits for ever for the head of a request, keeps headers of any size and writes for ever to a
client that does not read. This protocol puts a time and a size on each of them and answers with a
problem. The body is `intake`'s matter, but for a length that is too large by its own announcement.
"""

import asyncio
from collections.abc import Callable
from typing import Any, cast

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from sopdeploy_service.http.disconnect import DEPARTURE, Disconnect
from sopdeploy_service.http.headers import find, right_host
from sopdeploy_service.http.middleware import request_id
from sopdeploy_service.http.problems import problem_response
from sopdeploy_service.images.decode import too_large_error
from sopdeploy_service.inference.results import Rejection
from sopdeploy_service.server.connection_limits import Connections, Timers

INTERIM = b"HTTP/1.1 100 "


class Outlet:
    """Writes one answer to *transport*; to close it is to *hang_up*.

    The head of an answer leaves together with the first piece of its body: uvicorn writes each alone, and
    each write would be a call of the system and wake the client. An answer to `HEAD` has none: *bodiless*.
    """

    def __init__(
        self, transport: asyncio.Transport, hang_up: Callable[[], None], *, bodiless: bool = False
    ) -> None:
        self._transport = transport
        self._hang_up = hang_up
        self._begun = bodiless
        self._head = b""
        self.is_closing = transport.is_closing

    def write(self, data: bytes) -> None:
        """Write a piece of the answer, or `100 Continue` before it."""
        if not self._begun and not data.startswith(INTERIM):
            self._begun = True
            self._head = data
        elif self._head:
            self._transport.write(self._head + data)
            self._head = b""
        else:
            self._transport.write(data)

    def close(self) -> None:
        """End the connection after this answer."""
        if self._head:
            self.write(b"")
        self._hang_up()


LINGER_SECONDS = 2.0  # closing at once would reset the connection: the client would not read the answer
LINGER_BYTES = 100_000_000
MAX_PIPELINE = 16  # requests behind the one being answered; each costs more memory than bytes

MALFORMED = Rejection("malformed_request", 400, "this is not HTTP/1.1 as RFC 9112 has it")
SLOW_HEAD = Rejection("slow_request", 408, "the head of the request did not arrive in time")
LONG_URL = Rejection("url_too_long", 414, "the URL is longer than this server reads")
LARGE_HEAD = Rejection("headers_too_large", 431, "the headers are larger or more than this server reads")


class LimitedHttpProtocol(HttpToolsProtocol):
    """HTTP/1.1 on one socket; `Connections` holds the limits and is one for a whole server."""

    def __init__(self, shared: Connections, **uvicorn: Any) -> None:
        super().__init__(**uvicorn)
        self.url = b""  # a connection may be refused before it has said one
        self._shared = shared
        self._limits = shared.settings
        self._refusal: Rejection | None = None  # set by a callback of the parser
        self._in_head = False
        self._in_body = False
        self._header_bytes = 0
        self._fed = 0  # bytes of an unfinished head
        self._deaf = False  # whatever still comes is read and forgotten
        self._ignored = 0
        self._hung_up = False
        self._timers = Timers(self.loop)
        self._departure = Disconnect()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the connection or refuse it; the clock of the first head starts."""
        super().connection_made(cast(asyncio.Transport, transport))
        refusal = self._shared.opened(self)
        if refusal is not None:
            self._refuse(refusal)
        else:
            self._timers.start("head", self._limits.head_seconds, self._head_is_late)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._shared.closed(self)
        self._unset_keepalive_if_required()
        self._timers.stop_all()
        self.pipeline.clear()
        self._departure.happen()
        super().connection_lost(exc)
        if self.cycle is not None:
            self.cycle.transport = self.transport  # its outlet leads back here

    def data_received(self, data: bytes) -> None:
        """Parse what came, and refuse what breaks a limit."""
        if self._deaf:
            self._ignored += len(data)
            if self._ignored > LINGER_BYTES:
                self.cut()
            return
        self._unset_keepalive_if_required()
        self._shared.busy(self)
        was_in_head = self._in_head
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:  # answered as if it had not been asked for; no more is read
            self._deaf = True
            self.cycle.keep_alive = False
        except httptools.HttpParserError:
            self._refusal = self._refusal or MALFORMED
        if was_in_head and self._in_head:  # the parser keeps a header until its end
            self._fed += len(data)
            if self._fed > self._limits.max_url_bytes + self._limits.max_header_bytes:
                self._refusal = self._refusal or LARGE_HEAD
        if self._refusal is not None:
            self._refuse(self._refusal)
        elif not self._in_body and not self._answering():
            self._timers.start("head", self._limits.head_seconds, self._head_is_late)

    def on_message_begin(self) -> None:
        """Begin a request."""
        super().on_message_begin()
        self._in_head = True
        self._header_bytes = self._fed = 0

    def on_url(self, url: bytes) -> None:
        """Take a piece of the URL."""
        super().on_url(url)
        if len(self.url) > self._limits.max_url_bytes:
            self._refusal = self._refusal or LONG_URL

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header, or one that trails a body."""
        self._header_bytes += len(name) + len(value) + len(": \r\n")
        many = len(self.headers) >= self._limits.max_headers
        if many or self._header_bytes > self._limits.max_header_bytes:
            self._refusal = self._refusal or LARGE_HEAD
        else:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Start the answer, unless a limit is broken."""
        self._in_head = False
        self._in_body = True
        self._timers.stop("head")
        self._refusal = self._refusal or self._refusal_of_head()
        if self._refusal is None:
            super().on_headers_complete()
            self.scope["state"][DEPARTURE] = self._departure
            outlet = Outlet(self.transport, self.hang_up, bodiless=self.scope["method"] == "HEAD")
            self.cycle.transport = cast(asyncio.Transport, outlet)

    def on_body(self, body: bytes) -> None:
        """Hand on a piece of the body."""
        if self._refusal is not None:
            return
        if not self.cycle.body and self._answering():  # a piece that comes alone is never copied
            self.cycle.body, body = cast(bytearray, body), b""
        super().on_body(body)

    def on_message_complete(self) -> None:
        """End the request."""
        if self._refusal is not None:  # the app is not told that the body is whole: it must not wait
            return
        self._in_body = False
        super().on_message_complete()
        if self._timers.stop("rest"):  # it was answered long ago
            self._await_next()

    def on_response_complete(self) -> None:
        """Go on to the next request; give the rest of this one's body a moment."""
        if self._hung_up:
            self.server_state.total_requests += 1
            return
        super().on_response_complete()
        if self.transport.is_closing() or self._answering():
            return
        if self._in_body:
            self._unset_keepalive_if_required()
            self._timers.start("rest", LINGER_SECONDS, self.cut)
        elif self._in_head:
            self._unset_keepalive_if_required()
            self._timers.start("head", self._limits.head_seconds, self._head_is_late)
        else:
            self._shared.idle(self)

    def pause_writing(self) -> None:
        """Wait for the client to read, but not for ever."""
        super().pause_writing()
        self._timers.start("write", self._limits.write_seconds, self.cut)

    def resume_writing(self) -> None:
        """Go on writing."""
        super().resume_writing()
        self._timers.stop("write")

    def timeout_keep_alive_handler(self) -> None:
        """End a connection on which nothing more was asked."""
        self.hang_up()

    def hang_up(self) -> None:
        """Close when what was written is out; a client that still sends may read it first."""
        if self._hung_up:
            return
        self._deaf = self._hung_up = True
        if self._in_body or self._in_head:
            self.flow.resume_reading()
            if self.transport.can_write_eof() and not self.transport.is_closing():
                self.transport.write_eof()
            self._timers.start("close", LINGER_SECONDS, self.cut)
        else:
            self.transport.close()
            self._timers.start("close", self._limits.write_seconds, self.cut)

    def cut(self) -> None:
        """Close at once; a client that has not read its answer by now is a slow reader."""
        if self.transport.get_write_buffer_size():
            self._shared.metrics.rejected("slow_reader")
        self.transport.abort()

    def _await_next(self) -> None:
        self.timeout_keep_alive_task = self.loop.call_later(
            self.timeout_keep_alive, self.timeout_keep_alive_handler
        )
        self._shared.idle(self)

    def _refusal_of_head(self) -> Rejection | None:
        if len(self.pipeline) >= MAX_PIPELINE or not right_host(self.headers, self.parser.get_http_version()):
            return MALFORMED
        length = int(find(self.headers, b"content-length") or 0)
        limit = self._limits.max_body_bytes
        return Rejection.of(too_large_error(limit)) if length > limit else None

    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _refuse(self, refusal: Rejection) -> None:
        """Answer with *refusal* and hang up; a request being answered is answered before."""
        if self.transport.is_closing():
            return
        self._shared.metrics.rejected(refusal.code)
        self._timers.stop("head")
        self._deaf = True
        if self._answering():
            if self.pipeline or self.cycle.response_started or not self._in_body:
                self.cycle.keep_alive = False
                return
            self.cycle.disconnected = True  # its body is broken; the app counts it as a client that left
            self.cycle.message_event.set()
        else:
            self._shared.metrics.request("other", refusal.status, 0.0)
        if not self._timers.stop("rest"):  # else the request whose body is broken has its answer already
            self._write_answer(refusal)
        self._in_head = True  # so that hanging up reads what is on its way
        self.hang_up()

    def _write_answer(self, refusal: Rejection) -> None:
        identity = request_id({"type": "http", "headers": self.headers or []})
        path = self.url.partition(b"?")[0].decode("latin-1")
        response = problem_response(refusal, {"Connection": "close", "X-Request-ID": identity}, path=path)
        lines = [STATUS_LINE[refusal.status]]
        for name, value in [*self.server_state.default_headers, *response.raw_headers]:
            lines += [name, b": ", value, b"\r\n"]
        body = b"" if self.parser.get_method() == b"HEAD" else bytes(response.body)
        self.transport.write(b"".join([*lines, b"\r\n", body]))

    def _head_is_late(self) -> None:
        if self._in_head:
            self._refuse(SLOW_HEAD)
        else:
            self.transport.close()  # nothing was asked, so nothing is answered
