"""One call of the client: its requests, when they are repeated, and what its errors say.

Every call computes and changes nothing at the server, so a request can be repeated whatever became of it.
"""

import math
import random
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import httpx
import pydantic

from sopdeploy.bundle.http_api import Problem
from sopdeploy.errors import ConfigError, OverloadedError, ServiceError, UnreachableError

REQUEST_ID = "X-Request-ID"  # a server returns that of the request
# A host that is lost does not answer; the next attempt may reach another one
CONNECT_SECONDS = 2.0
# httpx keeps 20 connections, and a server may have more callers
LIMITS = httpx.Limits(max_connections=100, max_keepalive_connections=100, keepalive_expiry=5.0)
# Of the time that is left, what the server is told. In the rest, the response arrives: of a list, the
# images that are ready in time, and otherwise the reason.
SERVER_SHARE = 0.95
FIRST_PAUSE = 0.1  # seconds before the second attempt; then doubled
MAX_PAUSE = 2.0
# The server refuses, or a proxy does not reach it
REPEATED_STATUSES = {408, 429, 502, 503, 504}
# The request, or its response, did not arrive
REPEATED_FAILURES = (httpx.NetworkError, httpx.RemoteProtocolError, httpx.ConnectTimeout)


def http_options(url: str, api_key: str | None, options: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of httpx for a client of *url*; *options* replace its defaults.

    Raises `ConfigError` for a URL or key that cannot be used.
    """
    advice = "write it as http://host:8000"
    try:
        base = httpx.URL(url)
        _ = urlsplit(str(base)).port  # raises `ValueError` for a port that no socket has
    except (httpx.InvalidURL, ValueError) as error:
        raise ConfigError(f"{url!r}: not a URL ({error}); {advice}") from error
    if base.scheme not in {"http", "https"} or not base.host:
        raise ConfigError(f"{url!r}: not a URL with a scheme and a host; {advice}")

    headers = httpx.Headers(options.get("headers"))
    if api_key is not None:
        if not (api_key.isascii() and api_key.isprintable()):
            raise ConfigError(
                "the API key has characters that no header may have; copy the key again"
            )
        headers["Authorization"] = f"Bearer {api_key}"

    # Certificates take 60 ms to load.
    defaults = {"limits": LIMITS, "verify": base.scheme == "https"}
    return {**defaults, **options, "base_url": base, "headers": headers}


@contextmanager
def configuring() -> Iterator[None]:
    """Convert what httpx raises for the proxy or the certificates of the environment to `ConfigError`."""
    try:
        yield
    except (httpx.InvalidURL, ImportError, OSError, ValueError) as error:
        advice = "correct HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, SSL_CERT_FILE or SSL_CERT_DIR"
        raise ConfigError(f"no client can be made ({error}); {advice}") from error


def check_timeout(timeout: float) -> float:
    """Return *timeout*; raises `ConfigError` unless it is a positive number of seconds."""
    is_number = isinstance(timeout, int | float) and not isinstance(timeout, bool)
    if not is_number or not 0 < timeout < math.inf:
        raise ConfigError(
            f"is {timeout!r}; give a positive number of seconds", setting="timeout"
        )
    return timeout


class Attempts:
    """The attempts of one call, which end *seconds* after it began, or after *retries* repetitions.

    Both clients send the requests that `next_request` builds, and hand over the response or the failure. They
    wait for the pause that this returns, and try again.
    """

    def __init__(
        self,
        http: httpx.Client | httpx.AsyncClient,
        seconds: float,
        retries: int | None,
        method: str,
        path: str,
        content: dict[str, Any],
    ) -> None:
        self._http = http
        self._seconds = seconds
        self._retries = retries
        self._request = method, path, content
        self._end = time.monotonic() + seconds
        self._number = 0

    def next_request(self) -> httpx.Request:
        """Build the request of the next attempt, which gets the time that is left."""
        method, path, content = self._request
        self._number += 1
        left = max(0.001, self._end - time.monotonic())
        timeout = httpx.Timeout(left, connect=min(left, CONNECT_SECONDS))

        request = self._http.build_request(method, path, timeout=timeout, **content)
        milliseconds = max(1, int(left * SERVER_SHARE * 1000))
        request.headers["X-Request-Timeout-Ms"] = str(milliseconds)
        request.headers["X-Request-Attempt"] = str(self._number)
        request.headers[REQUEST_ID] = uuid4().hex
        return request

    def are_answered_by(self, response: httpx.Response) -> bool:
        """Tell whether *response* is a result.

        Raises `UnreachableError` if it belongs to another request, as on a connection that two
        processes share after a fork. Other servers and proxies send no such number.
        """
        own = response.request.headers[REQUEST_ID]
        if response.is_success and response.headers.get(REQUEST_ID, own) != own:
            problem = "the response belongs to another request; make a client in each process"
            raise UnreachableError(f"{_address(response.request)}: {problem}", status=0)
        return response.is_success

    def pause_after(self, response: httpx.Response) -> float:
        """Return the seconds until the next attempt; raise `ServiceError` if none follows this *response*."""
        error = _response_error(response)
        if response.status_code not in REPEATED_STATUSES:
            raise error
        return self._pause(error, retry_after(response))

    def pause_after_failure(self, failure: httpx.RequestError) -> float:
        """Return the seconds until the next attempt; raise `UnreachableError` if none follows *failure*."""
        error = self._failure_error(failure)
        # A certificate stays as it is.
        is_lasting = any(
            isinstance(one, ssl.SSLCertVerificationError) for one in _causes(failure)
        )
        if not isinstance(failure, REPEATED_FAILURES) or is_lasting:
            raise error from failure
        return self._pause(error, 0.0)

    def _pause(self, error: ServiceError, asked: float) -> float:
        """Return *asked* seconds and a random part of a pause that doubles; raise *error* if that is too late."""
        # The exponent is limited, because many attempts would overflow.
        longest = min(MAX_PAUSE, FIRST_PAUSE * 2.0 ** min(self._number - 1, 10))
        pause = asked + random.uniform(0.5, 1.0) * longest  # noqa: S311 - jitter is not a secret

        is_last = self._retries is not None and self._number > self._retries
        if is_last or pause >= self._end - time.monotonic():
            raise error
        return pause

    def _failure_error(self, failure: httpx.RequestError) -> ServiceError:
        """Build the exception for a request without a response."""
        if isinstance(failure, httpx.TimeoutException):
            text = f"no response within {self._seconds:.3g} s"
            code = "timeout"
        else:
            reason = str(failure) or type(failure).__name__
            text = f"no response ({reason}); is a server running there?"
            code = "unreachable"
        return UnreachableError(f"{_address(failure.request)}: {text}", code=code, status=0)


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


def foreign_answer_error(response: httpx.Response) -> ServiceError:
    """Build the exception for a *response* that no server of ours sends."""
    status = response.status_code
    problem = f"status {status}, but not a sopdeploy response; check the URL"
    message = f"{_address(response.request)}: {problem}"
    return ServiceError(message, code="foreign_answer", status=status)


def _response_error(response: httpx.Response) -> ServiceError:
    """Build the exception for an error response, whose body may be anything, such as a proxy's HTML page."""
    status = response.status_code
    try:
        problem = Problem.model_validate_json(response.content, extra="ignore")
    except pydantic.ValidationError:
        detail = response.reason_phrase or "no explanation"
        if response.has_redirect_location:  # not followed: images go to this server only
            where = response.headers["Location"][:200]
            detail = f"redirects to {where}; give the URL of the server itself"
        problem = Problem(code="http_error", status=status, detail=detail)

    said = f"{status} {problem.code}: {problem.detail}"
    printable = "".join(character if character.isprintable() else " " for character in said)
    message = f"{_address(response.request)}: {printable}"

    if status in REPEATED_STATUSES:
        return OverloadedError(
            message, code=problem.code, status=status, retry_after=retry_after(response)
        )
    return ServiceError(message, code=problem.code, status=status)


def _causes(failure: BaseException | None) -> Iterator[BaseException]:
    """Yield *failure* and the errors below it."""
    while failure is not None:
        yield failure
        failure = failure.__cause__ or failure.__context__


def _address(request: httpx.Request) -> str:
    """Describe where *request* goes, for a message, which may end in a log: without user and password."""
    return str(request.url.copy_with(userinfo=b""))
