"""What is sent again, when, and what is not: the same for both clients."""

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import httpx
import pytest

from sopdeploy.client.retry import LONGEST_PAUSE_SECONDS, Patience, Pause, Send, ask, pause, retry_after
from sopdeploy.errors import ConfigError, OverloadedError, ServiceError, UnreachableError

BROKEN = [
    httpx.ConnectError("refused"),
    httpx.ConnectTimeout("slow"),
    httpx.ReadError("reset"),
    httpx.WriteError("reset"),
    httpx.RemoteProtocolError("closed before an answer"),
]


@pytest.mark.parametrize(("status", "code"), [(429, "queue_full"), (503, "draining")])
def test_a_refusal_for_now_is_sent_again_no_sooner_than_the_server_asks(
    call, script, refusal, answer, pauses, status, code
):
    server = script(refusal(status, code, **{"Retry-After": "3"}), answer)
    assert call(server, "classify", b"x").classes[0].label == "cat"
    assert len(server.requests) == 2
    assert len(pauses) == 1
    assert 3 <= pauses[0] < 4


@pytest.mark.parametrize("broken", BROKEN, ids=lambda problem: type(problem).__name__)
def test_a_connection_that_broke_before_an_answer_is_tried_again(call, script, answer, pauses, broken):
    server = script(broken, broken, answer)
    assert call(server, "classify", b"x").classes[0].probability == 0.75
    assert pauses == [0.2, 0.4]


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (400, "empty_body"),
        (401, "no_key"),
        (413, "too_large"),
        (422, "truncated_image"),
        (500, "engine_failed"),
        (504, "deadline"),
    ],
)
def test_what_would_be_answered_the_same_is_sent_once(call, script, refusal, pauses, status, code):
    server = script(refusal(status, code))
    with pytest.raises(ServiceError, match="because") as caught:
        call(server, "classify", b"x")
    assert type(caught.value) is ServiceError
    assert (caught.value.status, caught.value.code) == (status, code)
    assert (len(server.requests), pauses) == (1, [])


def test_a_timeout_is_not_tried_again_as_no_time_is_left(call, script, pauses):
    server = script(httpx.ReadTimeout("slow"))
    with pytest.raises(UnreachableError, match="no answer within") as caught:
        call(server, "classify", b"x", timeout=0.5)
    assert (caught.value.code, caught.value.status) == ("timeout", 0)
    assert (len(server.requests), pauses) == (1, [])


def test_the_attempts_end(call, script, refusal, pauses):
    server = script(refusal(429, "queue_full"))
    with pytest.raises(OverloadedError, match="queue_full") as caught:
        call(server, "classify", b"x", retries=3)
    assert caught.value.status == 429
    assert len(server.requests) == 4
    assert pauses == [0.2, 0.4, 0.8]


def test_no_server_at_all_is_unreachable_after_the_attempts(call, script, pauses):
    server = script(httpx.ConnectError("connection refused"))
    with pytest.raises(UnreachableError, match="connection refused") as caught:
        call(server, "classify", b"x", retries=1)
    assert (caught.value.code, len(server.requests)) == ("unreachable", 2)


def test_a_pause_that_the_deadline_does_not_leave_is_not_begun(call, script, refusal, pauses):
    server = script(refusal(503, "draining", **{"Retry-After": "60"}))
    with pytest.raises(OverloadedError) as caught:
        call(server, "classify", b"x", timeout=10)
    assert caught.value.retry_after == 60
    assert (len(server.requests), pauses) == (1, [])


def test_the_server_is_told_how_long_the_client_still_waits(monkeypatch):
    now = 100.0
    monkeypatch.setattr("sopdeploy.client.retry.time.monotonic", lambda: now)
    steps = ask(Send(method="GET", path="/", seconds=10), Patience(seconds=10, retries=1, started=100.0))
    first = next(steps)
    assert (first.seconds, first.headers["X-Request-Timeout-Ms"]) == (10.0, "10000")
    now = 102.0
    assert isinstance(steps.send(httpx.ConnectError("no")), Pause)
    second = steps.send(None)
    assert (second.seconds, second.headers["X-Request-Timeout-Ms"]) == (8.0, "8000")


@pytest.mark.parametrize(
    ("header", "seconds"), [("", 0), ("7", 7), ("-1", 0), ("soon", 0), ("9" * 40, 999_999_999), ("²", 0)]
)
def test_a_retry_after_is_a_number_or_nothing(header, seconds):
    assert retry_after(httpx.Response(429, headers={"Retry-After": header.encode()})) == seconds


def test_a_retry_after_may_be_a_date():
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    assert 28 <= retry_after(httpx.Response(429, headers={"Retry-After": soon})) <= 30
    past = "Wed, 21 Oct 2015 07:28:00 -0000"
    assert retry_after(httpx.Response(429, headers={"Retry-After": past})) == 0


def test_pauses_grow_to_a_limit_and_are_never_the_same_for_all():
    broken = httpx.ConnectError("no")
    assert all(pause(attempt, broken) <= LONGEST_PAUSE_SECONDS for attempt in range(2000))
    assert len({pause(3, broken) for _ in range(20)}) > 10


@pytest.mark.parametrize(
    "options", [{"timeout": 0}, {"timeout": -1}, {"timeout": float("nan")}, {"timeout": 1e9}]
)
def test_a_timeout_is_a_number_of_seconds(call, script, answer, options):
    with pytest.raises(ConfigError, match="timeout"):
        call(script(answer), "classify", b"x", **options)


def test_a_negative_number_of_retries_is_refused(call, script, answer):
    with pytest.raises(ConfigError, match="retries"):
        call(script(answer), "info", retries=-1)
