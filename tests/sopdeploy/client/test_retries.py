"""Retries, deadlines and errors, the same for both clients."""

import httpx
import pytest

from sopdeploy.client.requests import MAX_DELAY, backoff, retry_after
from sopdeploy.errors import OverloadedError, ServiceError, UnreachableError

BROKEN = [httpx.ConnectError("refused"), httpx.ConnectTimeout("slow"), httpx.RemoteProtocolError("closed")]


@pytest.mark.parametrize(("status", "code"), [(429, "queue_full"), (503, "draining")])
def test_overload_is_retried_no_sooner_than_retry_after(call, script, problem, success, delays, status, code):
    server = script(problem(status, code, **{"Retry-After": "3"}), success)
    assert call(server, "classify", b"x").classes[0].label == "cat"
    assert (len(server.requests), len(delays)) == (2, 1)
    assert 3 <= delays[0] < 4


@pytest.mark.parametrize("broken", BROKEN, ids=lambda error: type(error).__name__)
def test_a_connection_that_broke_before_a_response_is_retried(call, script, success, delays, broken):
    server = script(broken, broken, success)
    assert call(server, "classify", b"x").classes[0].probability == 0.75
    assert delays == [0.2, 0.4]


@pytest.mark.parametrize(("status", "code"), [(401, "no_key"), (422, "truncated_image"), (504, "deadline")])
def test_other_errors_are_not_retried(call, script, problem, delays, status, code):
    server = script(problem(status, code))
    with pytest.raises(ServiceError, match="because") as caught:
        call(server, "classify", b"x")
    assert type(caught.value) is ServiceError
    assert (caught.value.status, caught.value.code) == (status, code)
    assert (len(server.requests), delays) == (1, [])


def test_a_timeout_is_not_retried(call, script, delays):
    server = script(httpx.ReadTimeout("slow"))
    with pytest.raises(UnreachableError, match="no response within") as caught:
        call(server, "classify", b"x", timeout=0.5)
    assert (caught.value.code, caught.value.status, len(server.requests), delays) == ("timeout", 0, 1, [])


def test_the_number_of_retries_is_limited(call, script, problem, delays):
    server = script(problem(429, "queue_full"))
    with pytest.raises(OverloadedError, match="queue_full") as caught:
        call(server, "classify", b"x", retries=3)
    assert (caught.value.status, len(server.requests)) == (429, 4)
    assert delays == [0.2, 0.4, 0.8]
    server = script(httpx.ConnectError("connection refused"))
    with pytest.raises(UnreachableError, match="connection refused") as caught:
        call(server, "classify", b"x", retries=1)
    assert (caught.value.code, len(server.requests)) == ("unreachable", 2)


def test_a_delay_beyond_the_deadline_is_not_started(call, script, problem, delays):
    server = script(problem(503, "draining", **{"Retry-After": "60"}))
    with pytest.raises(OverloadedError) as caught:
        call(server, "classify", b"x", timeout=10)
    assert caught.value.retry_after == 60
    assert (len(server.requests), delays) == (1, [])


def test_the_server_is_told_the_remaining_time(call, script, success, delays):
    server = script(httpx.ConnectError("no"), success)
    call(server, "classify", b"x", timeout=10)
    first, second = (int(request.headers["X-Request-Timeout-Ms"]) for request in server.requests)
    assert 0 < second <= first <= 10_000


@pytest.mark.parametrize(("header", "seconds"), [("", 0), ("7", 7), ("soon", 0)])
def test_retry_after_is_a_number_and_zero_otherwise(header, seconds):
    assert retry_after(httpx.Response(429, headers={"Retry-After": header})) == seconds


def test_delays_are_bounded_and_jittered():
    assert all(backoff(attempt) <= MAX_DELAY for attempt in range(2000))
    assert len({backoff(3) for _ in range(20)}) > 10
