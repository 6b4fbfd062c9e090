"""The health port: correct while the event loop of the service is running, and while it is blocked."""

import re
import signal
import subprocess
import sys
import threading
from contextlib import ExitStack, suppress
from types import SimpleNamespace

import httpx
import pytest

from sopdeploy_service.server import launch
from sopdeploy_service.server.health_port import serve_health
from sopdeploy_service.server.launch import LoopWatch
from sopdeploy_service.settings import Settings
from tests.service.children import START_SECONDS, line_of
from tests.service.raw import GET, connect, read

BLOCKING = """
import sys, time
from pathlib import Path
from sopdeploy_service.server import process as server
from sopdeploy_service.settings import (load_settings)
from sopdeploy_service.api.upload import (ImageForm)
def images(self):  # blocks the event loop until a file exists
    while not Path(sys.argv[2]).exists():
        time.sleep(0.01)
    return []
ImageForm.images = images
sys.exit(server.run_server([Path(sys.argv[1])], load_settings(
    port=0, health_port=0, threads=1, max_loop_lag_seconds=0.5)))
"""


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The clock of the health port; a test sets its time `now`."""
    clock = SimpleNamespace(now=100.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(launch, "time", clock)
    return clock


@pytest.fixture
def health():
    """`health(state)` starts a health port; gives a client and the watch."""
    with ExitStack() as stack:

        async def render() -> bytes:
            return b"metric 1\n"

        def start(state: str, *, max_lag: float = 0.4) -> tuple[httpx.Client, LoopWatch]:
            watch, settings = LoopWatch(), Settings(health_port=0, max_loop_lag_seconds=max_lag)
            url = stack.enter_context(serve_health(settings, lambda: (state, None), render, watch))
            return stack.enter_context(httpx.Client(base_url=url, timeout=60)), watch

        yield start


@pytest.mark.parametrize(
    ("state", "live", "ready"),
    [("ok", 200, 200), ("draining", 200, 503), ("no_model", 200, 503), ("runtime_dead", 503, 503)],
)
def test_every_state_has_its_status(health, state, live, ready):
    client, _ = health(state, max_lag=60)
    for path, status in (("/livez", live), ("/readyz", ready)):
        reply = client.get(path)
        assert (reply.status_code, reply.json()) == (status, {"status": state})
    assert client.get("/metrics").text == "metric 1\n"
    assert client.get("/").status_code == 404


def test_a_blocked_loop_is_not_live_until_it_beats_again(health, clock):
    client, watch = health("ok")
    clock.now += 0.45  # 0.35 after the next beat was due
    assert client.get("/livez").status_code == 200
    clock.now += 0.1
    assert client.get("/livez").json() == {"status": "loop_blocked"}
    assert client.get("/livez").status_code == client.get("/readyz").status_code == 503
    watch.beat()
    assert client.get("/livez").status_code == 200
    assert watch.worst() == pytest.approx(0.45)


def test_a_lag_expires_after_ten_seconds_of_beats(clock):
    watch = LoopWatch()
    clock.now += 0.3
    watch.beat()
    assert watch.worst() == pytest.approx(0.2)
    for _ in range(100):
        watch.beat()
    assert watch.worst() == watch.lag() == 0


@pytest.mark.parametrize("said", [b"", GET + b"\r\n"])
def test_probes_work_while_200_connections_are_open(health, said):
    client, _ = health("ok", max_lag=60)
    address = client.base_url
    with ExitStack() as stack:

        def hold(number: int) -> None:
            for _ in range(number):
                wire = stack.enter_context(connect(client))
                with suppress(OSError):  # it was closed to make room for others
                    wire.sendall(said)

        hold(200)
        for path in ("/livez", "/readyz", "/metrics") * 3:
            assert httpx.get(address.join(path), timeout=60).status_code == 200
            hold(20)


def test_an_incomplete_request_is_408_after_two_seconds_and_a_large_body_413(health):
    client, _ = health("ok", max_lag=60)
    with connect(client) as wire:
        wire.sendall(GET)
        reply = read(wire)
    assert (reply.status, reply.code) == (408, "slow_request")
    assert reply.seconds > 1.5
    large = client.request("GET", "/livez", content=bytes(1001))
    assert (large.status_code, large.json()["code"]) == (413, "too_large")
    assert client.get("/livez").status_code == 200


def test_the_health_port_works_while_the_event_loop_is_blocked(bundle_path, tmp_path, until):
    free = tmp_path / "free"
    child = subprocess.Popen(
        [sys.executable, "-c", BLOCKING, str(bundle_path), str(free)], stdout=subprocess.PIPE, text=True
    )
    with child:
        try:
            health = re.fullmatch(r"health: (\S+)\n", line_of(child))[1]
            service = re.match(r"ready: (\S+)  ", line_of(child))[1]
            with httpx.Client(timeout=60) as client:
                assert client.get(f"{health}/livez").json() == {"status": "ok"}
                form = {"files": [("image", b"x")], "timeout": START_SECONDS}
                asking = threading.Thread(target=httpx.post, args=[f"{service}/v1/classify"], kwargs=form)
                asking.start()
                until(lambda: client.get(f"{health}/livez").status_code == 503)
                numbers = client.get(f"{health}/metrics").text
                lag = re.search(r"^sopdeploy_event_loop_lag_seconds (\S+)$", numbers, re.M)
                assert float(lag[1]) > 0.4
                free.touch()
                until(lambda: client.get(f"{health}/livez").status_code == 200)
                asking.join()
        finally:
            free.touch()
            child.send_signal(signal.SIGTERM)
        assert child.wait(START_SECONDS) == 0
