"""One request of the client: its connection, its retries, its time limit and its errors."""

import asyncio
import math
import os
import random
import socket
import ssl
import sys
import time
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from uuid import uuid4

import httpx
import pydantic

from sopdeploy.errors import ConfigError, OverloadedError, ServiceError, UnreachableError
from sopdeploy.http_api import Problem
from sopdeploy.proxies import HTTPX_PROXIES, describe_route, find_proxy

REQUEST_ID = "X-Request-ID"  # a server returns that of the request
# For the connection, of the total: a host that is lost answers nothing, and another one may be free
CONNECT_SECONDS = 2.0
# A connection that was idle for longer is not used again; httpx asks the system about younger ones.
IDLE_SECONDS = 5.0
# A machine that is lost acknowledges nothing. Its connections break after so long, and their requests
# are sent again. The system asks in between whether it is there, because a response may take long.
# Linux also breaks the connection to a server that reads nothing of a large body for so long.
LOST_SECONDS = 10
ASK_SECONDS = 5
SOCKET_OPTIONS = (
    [
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, ASK_SECONDS),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, ASK_SECONDS),
        (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, LOST_SECONDS * 1000),
    ]
    if sys.platform == "linux"
    else []
)
LIMITS = httpx.Limits(
    max_connections=100, max_keepalive_connections=100, keepalive_expiry=IDLE_SECONDS
)
# Of the time that is left, what the server is told. In the rest, the response arrives: of a list, the
# images that are ready in time, and otherwise the reason.
SERVER_SHARE = 0.95
FIRST_DELAY = 0.2  # seconds before a retry
MAX_DELAY = 5.0
# Retries of a client: those at its start, a share of its successes, and how many it may save.
FIRST_RETRIES = 10.0
RETRY_SHARE = 0.1
MAX_SAVED_RETRIES = 100.0
MAX_RESPONSE_BYTES = 64_000_000  # after decompression
# 64 KiB of these, which httpx expands at once, are 64 MB
ENCODINGS = {"", "identity", "gzip", "deflate"}
RETRY_STATUSES = {408, 429, 503}  # the server did not process the request
UNAVAILABLE = 503  # another replica may answer
RATE_LIMITED = "rate_limited"  # the limit of a key, not of a server that has too much to do
FOREIGN = "foreign_answer"  # code of what another server sends
CLOSED = "the client is closed; make another one"
# Before a response
BROKEN = (httpx.NetworkError, httpx.RemoteProtocolError, httpx.ConnectTimeout)
# What OpenSSL says about a certificate for another host, and another address
WRONG_NAMES = {62, 64}


class TimeLimit(NamedTuple):
    """The *seconds* of a call, for messages, and its *end* by `time.monotonic`."""

    seconds: float
    end: float


class RetryBudget:
    """Limits the retries of a client to a share of its successes.

    Without it, a server that refuses much would get every refused request five times.
    """

    def __init__(self) -> None:
        self._left = FIRST_RETRIES

    def add_success(self) -> None:
        """Save a part of a retry."""
        self._left = min(MAX_SAVED_RETRIES, self._left + RETRY_SHARE)

    def take(self) -> bool:
        """Take one retry; false if none is left."""
        if self._left < 1:
            return False
        self._left -= 1
        return True


class Requests:
    """Sends requests to the server at *url*, all of them in one event loop.

    Raises `ConfigError` for a URL, key, timeout or proxy that cannot be used.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None,
        timeout: float,
        retries: int,
        transport: httpx.AsyncBaseTransport | None,
    ) -> None:
        if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
            raise ConfigError(
                "the API key has characters that no header may have; copy the key again"
            )

        # Few compressed bytes could fill the memory; `_receive` limits what a server compresses
        # anyway.
        self._headers = {"Accept-Encoding": "identity"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"

        try:
            self._url = httpx.URL(url)
            address = str(self._url.copy_with(userinfo=b""))
            # These raise `ValueError` for what a socket would refuse later.
            _ = (urlsplit(address).port, self._url.host.encode("idna"))
        except (httpx.InvalidURL, ValueError) as error:
            raise ConfigError(
                f"{url!r}: not a URL ({error}); write it as http://host:8000"
            ) from error
        if self._url.scheme not in {"http", "https"} or not self._url.host:
            raise ConfigError(
                f"{url!r}: not a URL with a scheme and a host; write it as http://host:8000"
            )

        self._transport = transport
        self._proxy = find_proxy(address, HTTPX_PROXIES) if transport is None else None
        self._timeout = check_timeout(timeout)
        self._retries = retries
        self._budget = RetryBudget()
        self._http: httpx.AsyncClient | None = None
        self._is_closed = False

    def limit(self, timeout: float | None) -> TimeLimit:
        """Return the end of a call that begins now."""
        seconds = self._timeout if timeout is None else check_timeout(timeout)
        return TimeLimit(seconds, time.monotonic() + seconds)

    async def send(
        self, method: str, path: str, limit: TimeLimit, **content: Any
    ) -> httpx.Response:
        """Send a request and return its successful response, with retries until *limit*.

        Retries follow 408, 429, 503 and connections that broke before a response, as long as
        the budget has some. The first one comes at once where another replica may answer. The
        others wait for `Retry-After`, at least.
        """
        http = self._connections()
        seconds, end = limit
        attempt = 0
        extensions = {"proxy": self._proxy}  # for messages

        # Each attempt gets what is left of the time, and tells the server when it ends.
        while True:
            left = max(0.001, end - time.monotonic())
            timeout = httpx.Timeout(None, connect=CONNECT_SECONDS)
            request = http.build_request(
                method, path, timeout=timeout, extensions=extensions, **content
            )
            milliseconds = max(1, int(left * SERVER_SHARE * 1000))
            request.headers["X-Request-Timeout-Ms"] = str(milliseconds)
            request.headers["X-Request-Attempt"] = str(attempt + 1)
            request.headers[REQUEST_ID] = uuid4().hex
            error: ServiceError

            try:
                async with asyncio.timeout(left):
                    response = await _receive(http, request)
            except (httpx.RequestError, TimeoutError) as failure:
                error = _no_response_error(request, failure, seconds)
                delay = backoff(attempt) if attempt else 0.0
                may_retry = isinstance(failure, BROKEN) and error.code != FOREIGN
            else:
                if response.is_success:
                    self._budget.add_success()
                    return response
                error = _response_error(response)
                is_of_replica = response.status_code == UNAVAILABLE and not attempt
                delay = 0.0 if is_of_replica else backoff(attempt) + retry_after(response)
                may_retry = response.status_code in RETRY_STATUSES

            is_last = attempt == self._retries or delay >= end - time.monotonic()
            if is_last or not may_retry:
                raise error
            if error.code != RATE_LIMITED and not self._budget.take():
                raise error

            await sleep(delay)
            attempt += 1

    async def close(self) -> None:
        """Close the connections; later requests are errors."""
        self._is_closed = True
        if self._http is not None:
            await self._http.aclose()

    def _connections(self) -> httpx.AsyncClient:
        """Return the connections, which the first request prepares: certificates take 60 ms to load."""
        if self._is_closed:
            raise ConfigError(CLOSED)
        if self._http is not None:
            return self._http

        try:
            own = self._transport or httpx.AsyncHTTPTransport(
                verify=self._url.scheme == "https",
                proxy=None if self._proxy is None else self._proxy.url,
                limits=LIMITS,
                socket_options=SOCKET_OPTIONS,
            )
        except httpx.InvalidURL as error:
            raise ConfigError(f"{self._proxy}: not a URL ({error})") from error
        except OSError as error:
            advice = "correct or unset SSL_CERT_FILE and SSL_CERT_DIR"
            raise ConfigError(f"no certificates ({error}); {advice}") from error

        self._http = httpx.AsyncClient(
            base_url=self._url,
            headers=self._headers,
            transport=own,
            event_hooks={"response": [_refuse_redirect]},
        )
        return self._http


async def sleep(seconds: float) -> None:
    """Pause before a retry; tests replace it."""
    await asyncio.sleep(seconds)


def check_timeout(timeout: float) -> float:
    """Return *timeout*; raises `ConfigError` unless it is a positive number of seconds."""
    is_number = isinstance(timeout, int | float) and not isinstance(timeout, bool)
    if not is_number or not 0 < timeout < math.inf:
        raise ConfigError(
            f"is {timeout!r}; give a positive number of seconds", setting="timeout"
        )
    return timeout


def backoff(attempt: int) -> float:
    """Compute the delay in seconds before the next attempt: exponential with jitter."""
    # The exponent is limited, because many attempts would overflow.
    longest = min(MAX_DELAY, FIRST_DELAY * 2.0 ** min(attempt, 10))
    return random.uniform(0.5, 1.0) * longest  # noqa: S311 - jitter needs no secure randomness


def retry_after(response: httpx.Response) -> float:
    """Parse `Retry-After` in seconds, which is a number or a date; 0 without a valid value."""
    text = response.headers.get("Retry-After", "")
    if text.isascii() and text.isdecimal():
        return float(text[:9])  # nine digits are more seconds than any timeout has

    try:
        date = parsedate_to_datetime(text)
    except ValueError:
        return 0.0
    if date.tzinfo is None:  # RFC 9110, section 5.6.7: dates are in GMT
        date = date.replace(tzinfo=UTC)
    return max(0.0, date.timestamp() - time.time())


async def _receive(client: httpx.AsyncClient, request: httpx.Request) -> httpx.Response:
    """Send *request*, read the response and decode its content.

    Raises `ServiceError` for a redirect and for a response that no server of ours sends,
    `UnreachableError` for one that breaks off, and `httpx.RequestError` if there is no response
    to this request.
    """
    response = await client.send(request, stream=True)

    # The response must be to this request. Errors before a request is read have an id of their
    # own, those of proxies none.
    own_id = request.headers[REQUEST_ID]
    if response.is_success and response.headers.get(REQUEST_ID, own_id) != own_id:
        await response.aclose()
        raise httpx.RemoteProtocolError(
            "the response belongs to another request", request=request
        )

    # A limited number of bytes, in an encoding that httpx decodes.
    try:
        if response.headers.get("Content-Encoding", "").lower() not in ENCODINGS:
            raise foreign_answer_error(response)
        content = bytearray()
        async for piece in response.aiter_bytes():
            content += piece
            if len(content) > MAX_RESPONSE_BYTES:
                raise foreign_answer_error(response)
    except httpx.DecodingError as error:
        raise foreign_answer_error(response) from error
    # Not tried again: the server has done the work.
    except (httpx.NetworkError, httpx.ProtocolError) as error:
        problem = f"status {response.status_code}, but the response breaks off ({error})"
        message = f"{_address(request)}: {problem}; send it again"
        raise UnreachableError(message, code="unreachable", status=0) from error
    finally:
        await response.aclose()

    headers = httpx.Headers(response.headers)
    # The content is decoded now, so these headers would be wrong.
    for name in ("Content-Encoding", "Content-Length", "Transfer-Encoding"):
        headers.pop(name, None)
    return httpx.Response(
        response.status_code, headers=headers, content=bytes(content), request=request
    )


async def _refuse_redirect(response: httpx.Response) -> None:
    """Raise `ServiceError` for a redirect, also to what is no URL: photographs go to the server only."""
    if response.has_redirect_location:
        where = f"redirects to {response.headers['Location'][:200]!a}"
        advice = "give the URL of the server itself, or log in to the network"
        status = response.status_code
        message = f"{_address(response.request)}: status {status}, which {where}; {advice}"
        raise ServiceError(message, code="http_error", status=status)


def _response_error(response: httpx.Response) -> ServiceError:
    """Build the exception for an error response, whose body may be anything, such as a proxy's HTML page."""
    status = response.status_code
    try:
        problem = Problem.model_validate_json(response.content, extra="ignore")
    except pydantic.ValidationError:
        problem = Problem(
            code="http_error", status=status, detail=response.reason_phrase or "no explanation"
        )

    said = f"{status} {problem.code}: {problem.detail}"
    printable = "".join(character if character.isprintable() else " " for character in said)
    message = f"{_address(response.request)}: {printable}"

    if status in RETRY_STATUSES:
        return OverloadedError(
            message, code=problem.code, status=status, retry_after=retry_after(response)
        )
    return ServiceError(message, code=problem.code, status=status)


def _no_response_error(
    request: httpx.Request, failure: Exception, seconds: float
) -> ServiceError:
    """Build the exception for a request without a response; *failure* is why, *seconds* its time limit."""
    reason = _first_cause(failure)
    kind: type[ServiceError] = UnreachableError
    code = "unreachable"

    if isinstance(failure, httpx.ConnectTimeout):
        code = "timeout"
        text = f"no connection within {CONNECT_SECONDS:.3g} s"
    elif isinstance(failure, httpx.TimeoutException | TimeoutError):
        code = "timeout"
        text = f"no response within {seconds:.3g} s"
    elif isinstance(failure, httpx.RemoteProtocolError) and getattr(
        failure.__cause__, "__context__", None
    ):
        # The parser of the response has failed. If the server has disconnected, the error has no
        # such cause.
        kind = ServiceError
        code = FOREIGN
        text = f"no HTTP response ({str(failure)[:200]}); check the URL"
    elif isinstance(reason, ssl.SSLError):
        text = _tls_problem(reason)
    else:
        direct = f"does it work? Without it: NO_PROXY={request.url.host}"
        advice = direct if request.extensions["proxy"] else "is a server running there?"
        # asyncio says "Connect call failed" and the address, whatever the cause.
        said = str(reason) or type(failure).__name__
        if isinstance(reason, ConnectionError) and reason.errno:
            said = os.strerror(reason.errno)
        text = f"no response ({said}); {advice}"

    error = kind(f"{_address(request)}: {text}", code=code, status=0)
    error.__cause__ = failure
    return error


def _first_cause(failure: BaseException) -> BaseException:
    """Return the error below *failure* that says most, such as the one of the socket or of TLS."""
    if isinstance(failure, BaseExceptionGroup):  # one error per address
        return _first_cause(failure.exceptions[0])
    below = failure.__cause__ or failure.__context__
    return _first_cause(below) if below is not None and str(below) else failure


def _tls_problem(error: ssl.SSLError) -> str:
    """Say what to do if no encrypted connection is possible."""
    if not isinstance(error, ssl.SSLCertVerificationError):
        return f"no TLS connection ({error}); does the server expect http://?"

    problem = f"its certificate is refused ({error.verify_message})"
    if error.verify_code in WRONG_NAMES:
        return f"{problem}; request it by a name in the certificate"
    advice = "to trust a private certificate authority, set SSL_CERT_FILE to its PEM file"
    return f"{problem}; {advice}"


def _address(request: httpx.Request) -> str:
    """Describe where *request* goes, for a message, which may end in a log: without user and password."""
    return describe_route(str(request.url.copy_with(userinfo=b"")), request.extensions["proxy"])


def foreign_answer_error(response: httpx.Response) -> ServiceError:
    """Build the exception for a *response* that no server of ours sends."""
    status = response.status_code
    message = f"{_address(response.request)}: status {status}, but not a sopdeploy response; check the URL"
    return ServiceError(message, code=FOREIGN, status=status)
