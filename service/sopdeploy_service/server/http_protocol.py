"""uvicorn's HTTP/1.1 protocol with time and size limits.

uvicorn waits without limit for request headers of any size, and for clients that do not read
their response. This protocol rejects such requests and closes such connections. `connections`
limits their number, `api.admission` the bodies.
"""

import asyncio
import math
import random
import select
import socket
import ssl
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, NoReturn, cast

import httptools
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from sopdeploy_service.http.middleware import RequestContext, record_refusal, request_id
from sopdeploy_service.http.problems import problem_response
from sopdeploy_service.inference.results import HttpError, RejectedError
from sopdeploy_service.origins import is_within, join_headers, without_prefix
from sopdeploy_service.server.connections import Connections
from sopdeploy_service.server.tls import TLS_LIMITS

HEADER_SECONDS = 10.0  # in which the headers of a request must arrive
WRITE_SECONDS = 30.0  # after which a client that reads nothing is disconnected
# After which an idle connection is closed. One of a trusted proxy is kept longer than by every usual
# proxy, of which Envoy waits longest (1 h), because a request on a connection that closes is lost.
KEEP_ALIVE_SECONDS = 75
PROXY_IDLE_SECONDS = 3700
CLOSING_SECONDS = 2  # for sending the last responses after the end
MAX_URL_BYTES = 8192  # path and query
MAX_HEADERS = 100  # of one request
MAX_HEADER_BYTES = 32_768  # of all headers of a request
# For which input is read, and ignored, after a response: closing a connection with unread input
# resets it, and the client could not read the response. Of a body that still arrives, each piece
# gets this time, as long as the whole rest has not taken `REST_SECONDS`.
LINGER_SECONDS = 2.0
REST_SECONDS = 30.0
AGE_SPREAD = 0.1  # of the age limit: connections that began together do not end together
BODY_LENGTH = {b"content-length", b"transfer-encoding"}

_MALFORMED = HttpError("malformed_request", 400, "the request is not valid HTTP/1.1 (RFC 9112)")
SLOW_HEADERS = HttpError("slow_request", 408, "the request headers did not arrive in time")
LONG_URL = HttpError("url_too_long", 414, "the URL is longer than the limit of this server")
LARGE_HEADERS = HttpError(
    "headers_too_large",
    431,
    "the request has more or larger headers, trailers or chunk extensions than this server accepts",
)
UNKNOWN_CODING = HttpError(
    "unknown_transfer_coding",
    501,
    "the only transfer coding here is `chunked`; send the body without others",
)


def without_mapping(address: str) -> str:
    """Return *address*, as IPv4 if a socket for both families writes it as `::ffff:192.0.2.1`."""
    return address.removeprefix("::ffff:") if "." in address else address


def limited_config(app: ASGIApp, connections: Connections) -> uvicorn.Config:
    """Create the uvicorn configuration of *app* with the limits of *connections*."""
    return uvicorn.Config(
        app,
        http=cast(type[asyncio.Protocol], partial(LimitedHttpProtocol, connections)),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # `client_address` reads them
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=CLOSING_SECONDS,
    )


class LimitedHttpProtocol(HttpToolsProtocol):
    """One HTTP/1.1 connection; all connections of a server share one `Connections` and its settings."""

    def __init__(self, shared: Connections, **uvicorn: Any) -> None:
        super().__init__(**uvicorn)
        self.url = b""  # uvicorn sets it with the first byte of a request
        self._shared = shared
        self._limits = shared.settings

        # The address of the client or proxy.
        self.address = ""
        self.is_trusted = False
        self.body_bytes = 0  # of the present request
        self._error: HttpError | None = None  # set by a callback of the parser

        self._handshake: asyncio.Task[None] | None = None  # of HTTPS, until its end

        # Whether the headers, or the body, of a request are arriving now.
        self._in_headers = self._in_body = False
        self._header_bytes = 0  # of the names and values of complete headers and trailers
        # Of headers, trailers or chunk extensions that have no end yet, which the parser holds
        self._pending_bytes = 0
        self._ignores_input = False  # true after the last request
        self._closed = False  # whether `close` was called; the transport may still have output
        self._head = b""  # of a response, until its body or the end of this turn of the loop
        self._rest_until = (
            math.inf
        )  # by the loop's clock: the rest of a body after its response
        self._kept_until: float | None = (
            None  # by the loop's clock; later responses are the last one
        )

        # This limits the wait for headers, a body or the end.
        self._timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Admit the connection unless it counts since its handshake; begin the time for its first request."""
        super().connection_made(cast(asyncio.Transport, transport))
        if self._handshake is None:
            self._shared.admit(self)
        else:
            self._handshake = None
            self._shared.note_idle(self, is_fresh=True)

        # uvicorn's response cycle calls `is_closing` and `write` of this object, see
        # `on_headers_complete`.
        self.is_closing = self.transport.is_closing
        if self.client is not None:
            self.client = (without_mapping(self.client[0]), self.client[1])
        self.address = self.client[0] if self.client else ""
        self.is_trusted = is_within(self.address, self._limits.trusted_proxies)
        if self.is_trusted:
            self.timeout_keep_alive = PROXY_IDLE_SECONDS

        age = self._limits.max_connection_age
        if age is not None:
            spread = random.uniform(-AGE_SPREAD, AGE_SPREAD)  # noqa: S311 - no secret
            self._kept_until = self.loop.time() + age * (1 + spread)

        if self.is_trusted:  # proxies may open connections before they have a request
            self._begin_idle_time()
        else:
            self._start_header_timeout()

    async def shake_hands(self, connection: socket.socket, context: ssl.SSLContext) -> None:
        """Serve the accepted *connection*, which counts from now on, after its handshake of HTTPS.

        Raises `OSError` if the handshake fails.
        """
        self._handshake = asyncio.current_task()
        self._shared.admit(self)
        try:
            await self.loop.connect_accepted_socket(
                lambda: self, connection, ssl=context, **TLS_LIMITS
            )
        finally:
            if self._handshake is not None:  # it has failed
                self._shared.remove(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop all timers, and let go of the cycle of the last request."""
        self._shared.remove(self)
        self._unset_keepalive_if_required()
        self._stop_timer()
        self.resume_writing()  # stops the write timeout

        # The cycle referred to this object as its transport, which refers to the cycle: memory
        # would wait for the garbage collector.
        super().connection_lost(exc)
        if self.cycle is not None:
            self.cycle.transport = self.transport

    def data_received(self, data: bytes) -> None:
        """Parse *data* unless the last request has arrived."""
        if not self._ignores_input:
            self._parse(data)
        elif self._closed:  # the rest of a body, after the last response
            self._wait_for_rest()

    def _parse(self, data: bytes) -> None:
        """Parse *data*; reject a bad request, else begin the time for headers if they are due."""
        self._pending_bytes += len(data)  # unless a callback of the parser sets it to 0

        try:
            self._feed_without_upgrade(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            if self._ignores_input:  # it follows the last request
                return
            self._error = self._error or _MALFORMED

        # The headers arrive with the URL.
        if self._error is None and self._pending_bytes > MAX_URL_BYTES + MAX_HEADER_BYTES:
            self._error = LONG_URL if len(self.url) > MAX_URL_BYTES else LARGE_HEADERS

        # Respond to an error, or begin the time for what is due.
        is_responding = self.cycle is not None and not self.cycle.response_complete
        expects_headers = not self._in_body and not is_responding

        if self._error is not None:
            self._reject(self._error)
        elif expects_headers and self._timer is None:
            self._start_header_timeout()

    def _feed_without_upgrade(self, data: bytes) -> None:
        """Parse *data*; answer a request for an upgrade as if it had not asked for one, then close.

        Java asks for one by default. httptools does not read the body of such a request; a new
        parser does.
        """
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            if self._ignores_input:
                return
            self.cycle.keep_alive = False  # closes after the response

            # The new parser gets headers that say only how long the body is, then the body.
            lengths = [
                name + b": " + value for name, value in self.headers if name in BODY_LENGTH
            ]
            head = b"\r\n".join([b"POST / HTTP/1.1", *lengths]) + b"\r\n\r\n"

            # The offset in *data*, by httptools, of the first byte after the headers.
            body_start = upgrade.args[0]
            callbacks = SimpleNamespace(
                on_body=self.on_body,
                on_message_complete=self._end_last_request,
            )

            self.parser = httptools.HttpRequestParser(callbacks)
            self.parser.feed_data(head + data[body_start:])

    def _end_last_request(self) -> None:
        """End the request of `_feed_without_upgrade`; ignore what the parser takes for further ones."""
        if not self._ignores_input:
            self.on_message_complete()
            self._ignores_input = True

    def _refuse(self, reason: HttpError) -> NoReturn:
        """Stop the parser, which calls back for nothing more, and let `_parse` reject the request."""
        self._error = reason
        raise RejectedError(reason)

    def on_message_begin(self) -> None:
        """Begin a request: end the idle time before it, and count its headers from zero.

        One that does not wait for the response before it (pipelining) is ignored: that response
        closes the connection, and the client sends the request again (RFC 9112, section 9.3.2).
        """
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.keep_alive = False
            self._ignores_input = True
            raise RejectedError(_MALFORMED)  # only stops the parser: input is ignored now

        super().on_message_begin()
        self._unset_keepalive_if_required()  # stops the timer of the idle time
        self._shared.note_request(self)

        self._in_headers = True
        self._header_bytes = 0
        self._rest_until = math.inf

    def on_header(self, name: bytes, value: bytes) -> None:
        """Limit the number and size of headers and trailers."""
        self._header_bytes += len(name) + len(value) + len(": \r\n")
        if len(self.headers) >= MAX_HEADERS or self._header_bytes > MAX_HEADER_BYTES:
            self._refuse(LARGE_HEADERS)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Start the ASGI task unless the request is rejected.

        RFC 9112, section 3.2: an HTTP/1.1 request has one `Host`. Of several, a proxy could use
        another one.
        """
        # End the time for the headers.
        self._in_headers = False
        self._pending_bytes = 0
        self._stop_timer()

        # Only now: a page of an allowed origin may read the response, which its header tells.
        if len(self.url) > MAX_URL_BYTES:
            self._refuse(LONG_URL)

        # Refuse what proxies and servers may read differently (request smuggling).
        num_hosts = [name for name, _ in self.headers].count(b"host")
        codings = [value for name, value in self.headers if name == b"transfer-encoding"]

        if self.parser.get_http_version() == "1.1":
            is_valid = num_hosts == 1
        else:  # HTTP/1.0 has neither transfer codings nor interim responses
            self.expect_100_continue = False
            is_valid = (
                self.parser.get_http_version() == "1.0" and num_hosts <= 1 and not codings
            )

        if not is_valid:
            self._refuse(_MALFORMED)
        if codings and [value.strip(b" \t").lower() for value in codings] != [b"chunked"]:
            self._refuse(UNKNOWN_CODING)

        # Without room for the connection, refuse all but probes and the metrics.
        no_room = self._shared.admit_request(self, self._path)
        if no_room is not None:
            self._refuse(no_room)

        # Start the app, and let its response pass through this object.
        super().on_headers_complete()
        # The request has the present list. Trailers, which it must not use, are appended to a
        # copy.
        self.headers = list(self.headers)
        self._in_body = True
        self.body_bytes = 0

        # The cycle then calls `write` and `close` of this object.
        self.cycle.transport = cast(asyncio.Transport, self)

        is_old = self._kept_until is not None and self.loop.time() >= self._kept_until
        if self._shared.is_leaving or is_old or self._shared.is_over_limit():
            self.close_after_response()

    @property
    def _path(self) -> str:
        """The path of the present request, below `root_path`."""
        url = self.url.partition(b"?")[0].decode("latin-1")
        return without_prefix(url, self._limits.root_path)

    def close_after_response(self) -> None:
        """Send `Connection: close` with the present response, unless there is none or it has begun."""
        if self.cycle is not None and not self.cycle.response_started:
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        """Pass a piece of the body to the request."""
        self._pending_bytes = 0
        self.body_bytes += len(body)
        if not self._ignores_input:
            super().on_body(body)
        if self.cycle.response_complete and not self._closed:
            self._wait_for_rest()

    def on_message_complete(self) -> None:
        """End the request."""
        # If an upgrade is asked for, httptools calls this before the body. `_end_last_request`
        # calls it again after the body.
        if self.parser.should_upgrade():
            return
        self._in_body = False
        self._pending_bytes = 0
        super().on_message_complete()

        # The response was complete before the body: the idle time begins only now.
        if self.cycle.response_complete:
            self._stop_timer()  # stops the timer of the rest of the body
            self._begin_idle_time()
            self._shared.note_idle(self)

    def _begin_idle_time(self) -> None:
        """Start the timer that uvicorn starts after a response."""
        self.timeout_keep_alive_task = self.loop.call_later(
            self.timeout_keep_alive, self.timeout_keep_alive_handler
        )

    def on_response_complete(self) -> None:
        """Continue with the next request, after the rest of this request's body."""
        if self._closed:  # the next request must not begin
            self.server_state.total_requests += 1
            return

        super().on_response_complete()
        if self.transport.is_closing():
            return

        if self._in_body:  # of this request; the app did not wait for its end
            self._unset_keepalive_if_required()
            self._begin_rest()
        else:
            self._shared.note_idle(self)

    def _begin_rest(self) -> None:
        """Begin the time for the rest of a body whose response is complete, once for each request."""
        self._rest_until = min(self._rest_until, self.loop.time() + REST_SECONDS)
        self._wait_for_rest()

    def _wait_for_rest(self) -> None:
        """Give the client time for the next piece of a body whose response is complete."""
        left = self._rest_until - self.loop.time()
        self._start_timer(min(LINGER_SECONDS, max(left, 0.0)), self.abort)

    def pause_writing(self) -> None:
        """Start the write timeout: the client does not read."""
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(WRITE_SECONDS, self.abort)

    def resume_writing(self) -> None:
        """Stop the write timeout."""
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def write(self, data: bytes) -> None:
        """Send *data* unless the connection was closed, the head of a response together with its body.

        Sent alone, each of them would wake the client.
        """
        if self._closed or self.transport.is_closing():
            return

        if not self._head and data.startswith(b"HTTP/1.1 "):
            self._head = data
            self.loop.call_soon(self._flush)  # if no body follows
        else:
            self._flush(data)

    def _flush(self, data: bytes = b"") -> None:
        """Send the head that waits, if any, and *data*."""
        if (self._head or data) and not self.transport.is_closing():
            self.transport.write(self._head + data)
        self._head = b""

    def close(self, *, is_input_in_transit: bool = False) -> None:
        """Close after the pending output; a client that still sends gets time to read it.

        *is_input_in_transit* says that the client may still send, if its request does not show
        it.
        """
        if self._closed:
            return
        if self._handshake is not None:
            self.abort()
            return

        self._flush()
        is_input_in_transit |= self._ignores_input or self._in_body
        self._ignores_input = self._closed = True

        if is_input_in_transit:
            # Read on: closing with unread input would reset the connection. It does not count
            # as an open one any more.
            self.flow.resume_reading()
            if self.transport.can_write_eof() and not self.transport.is_closing():
                self.transport.write_eof()
            self._begin_rest()
            self._shared.note_last_response(self)
        else:
            # It closes after the pending output, for which the client has limited time.
            self.transport.close()
            self._start_timer(WRITE_SECONDS, self.abort)

    timeout_keep_alive_handler = close

    def is_quiet(self) -> bool:
        """Tell whether nothing waits to be read, or to be sent."""
        if self._handshake is not None or self.transport.is_closing():
            return True
        if self._head or self.transport.get_write_buffer_size():
            return False

        # A request that arrives in this turn of the loop is still in the socket.
        poll = select.poll()
        poll.register(self.transport.get_extra_info("socket"), select.POLLIN)
        return not poll.poll(0)

    def abort(self) -> None:
        """Close immediately and discard the pending output."""
        if self._handshake is not None:
            self._handshake.cancel()
            return

        if self.transport.get_write_buffer_size():
            self._shared.metrics.rejected.labels("slow_reader").inc()
        self.transport.abort()

    def _reject(self, reason: HttpError) -> None:
        """Respond with *reason*, and close.

        A response that has begun, or that is to an earlier request, is completed instead, as the
        last one.
        """
        if self.transport.is_closing():
            return

        if reason is SLOW_HEADERS and not self._in_headers:  # no request was started
            self.transport.close()
            return

        # Count the rejection, and parse nothing more.
        self._shared.metrics.rejected.labels(reason.code).inc()
        self._stop_timer()
        self._ignores_input = True

        is_app_responding = self.cycle is not None and not self.cycle.response_complete

        # The app may still respond, to this request or to an earlier one.
        if is_app_responding:
            # The response is to an earlier request if the rejected one is still in its headers.
            if not self._in_body or self.cycle.response_started:
                self.cycle.keep_alive = False  # closes after the response
                return

            self.cycle.disconnected = True  # the app, which reads the invalid body, sees this
            self.cycle.message_event.set()
            self._write_error(reason)
        elif not self._in_body:
            # Invalid headers; a request whose body is invalid has its response already.
            self._write_error(reason)
        self.close(is_input_in_transit=True)

    def _write_error(self, reason: HttpError) -> None:
        """Send the response of *reason* as the last one, without the app."""
        # The request has an identifier already if the app has it.
        root = self._limits.root_path
        headers = join_headers(self.headers or [])
        context = RequestContext(request_id(headers), headers, self._path, self.address)
        if self._in_body and self.cycle is not None:
            known = self.cycle.scope.get("state", {}).get("context")
            context.request_id = context.request_id if known is None else known.request_id
            context.bytes = self.body_bytes

        # Without a URL, the parser names a method that nobody has sent.
        method = self.parser.get_method() if self.url else b""
        sent = record_refusal(
            self._shared.metrics, self._limits, context, method.decode("latin-1"), reason
        )
        response = problem_response(reason, {"Connection": "close", **sent}, context.path, root)

        lines = [STATUS_LINE[reason.status]]
        for name, value in [*self.server_state.default_headers, *response.raw_headers]:
            lines += [name, b": ", value, b"\r\n"]

        body = b"" if method == b"HEAD" else bytes(response.body)
        self.write(b"".join([*lines, b"\r\n", body]))

    def _start_header_timeout(self) -> None:
        """Reject the request if its headers do not arrive in time."""
        self._start_timer(HEADER_SECONDS, partial(self._reject, SLOW_HEADERS))

    def _start_timer(self, seconds: float, callback: Callable[[], None]) -> None:
        """Call *callback* after *seconds*, instead of what the timer would call."""
        self._stop_timer()
        self._timer = self.loop.call_later(seconds, callback)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
