"""Health on a port of its own: true while the service answers, and while it cannot."""

import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack

import httpx
import pytest

from sopdeploy_service.health_port import LoopWatch, answering, health_app
from sopdeploy_service.listening import bind, url
from tests.service.children import line_of

BLOCKING = """
import sys, time
from pathlib import Path
from sopdeploy_service import server
from sopdeploy_service.settings import load_settings
from sopdeploy_service.upload import ImageForm
ImageForm.images = lambda self: time.sleep(2.5) or []  # a mistake: work on the event loop
sys.exit(server.serve([Path(sys.argv[1])], load_settings(
    port=0, health_port=0, threads=1, max_loop_lag_seconds=0.5)))
"""


@pytest.fixture
def health():
    """`health(state)` answers for *state* on a port; gives a client and the watch."""
    with ExitStack() as stack:

        def start(state: str, *, max_lag: float = 0.4) -> tuple[httpx.Client, LoopWatch]:
            watch = LoopWatch()
            listener = stack.enter_context(bind("127.0.0.1", 0))
            app = health_app(lambda: state, lambda: b"metric 1\n", watch, max_lag)
            stack.enter_context(answering(app, listener))
            return stack.enter_context(httpx.Client(base_url=url(listener), timeout=10)), watch

        yield start


@pytest.mark.parametrize(
    ("state", "live", "ready"),
    [("ok", 200, 200), ("draining", 200, 503), ("no_model", 200, 503), ("engine_dead", 503, 503)],
)
def test_the_states_of_the_service_have_their_statuses(health, state, live, ready):
    client, _ = health(state, max_lag=60)
    for path, status in (("/livez", live), ("/readyz", ready)):
        reply = client.get(path)
        assert (reply.status_code, reply.json()) == (status, {"status": state})
    assert client.get("/metrics").text == "metric 1\n"
    assert client.get("/").status_code == 404


def test_a_loop_that_does_not_beat_is_not_alive_until_it_beats_again(health, until):
    client, watch = health("ok")
    until(lambda: client.get("/livez").json() == {"status": "loop_blocked"})
    assert client.get("/livez").status_code == client.get("/readyz").status_code == 503
    watch.beat()
    assert client.get("/livez").status_code == 200
    assert watch.worst() > 0.3


def test_a_lag_is_forgotten_after_ten_seconds_of_beats():
    watch = LoopWatch()
    time.sleep(0.2)
    watch.beat()
    assert 0.05 < watch.worst() < 0.2
    for _ in range(100):
        watch.beat()
    assert watch.worst() == watch.lag() == 0


def test_the_health_port_answers_while_the_event_loop_is_blocked(bundle_path):
    child = subprocess.Popen(
        [sys.executable, "-c", BLOCKING, str(bundle_path)], stdout=subprocess.PIPE, text=True
    )
    with child:
        try:
            health = re.fullmatch(r"health: (\S+)\n", line_of(child))[1]
            service = re.match(r"ready: (\S+)  ", line_of(child))[1]
            with httpx.Client(timeout=10) as client:
                assert client.get(f"{health}/livez").json() == {"status": "ok"}
                form = {"files": [("image", b"x")]}
                threading.Thread(target=httpx.post, args=[f"{service}/v1/classify"], kwargs=form).start()
                statuses = [status for _ in range(40) if (status := probe(client, health))]
            assert 503 in statuses
            assert statuses[0] == statuses[-1] == 200
        finally:
            child.send_signal(signal.SIGTERM)
        assert child.wait(10) == 0


def probe(client: httpx.Client, health: str) -> int:
    """The status of /livez, asked for in less than a second however the service is."""
    started = time.monotonic()
    status = client.get(f"{health}/livez").status_code
    assert time.monotonic() - started < 1
    if status == 503:
        lag = re.search(
            r"^sopdeploy_event_loop_lag_seconds (\S+)$", client.get(f"{health}/metrics").text, re.M
        )
        assert float(lag[1]) > 0.4
    time.sleep(0.1)
    return status
