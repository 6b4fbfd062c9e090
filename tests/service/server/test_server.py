"""The server as a process: its first line, its last answer and its exit code."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from sopdeploy.errors import BundleError, ConfigError, ParityError
from sopdeploy_service.server.process import serve
from sopdeploy_service.server.sockets import bind, take_in
from sopdeploy_service.settings import Settings
from tests.service.children import line_of
from tests.service.raw import GET, connect, read

PATIENCE = 90  # seconds; only a machine that has no time for it takes more than a few
SERVE = """
import sys
from pathlib import Path
from sopdeploy.errors import (SopdeployError)
from sopdeploy_service.server import process as server
from sopdeploy_service.settings import (load_settings)

{faults}

try:
    sys.exit(server.serve([sys.argv[1]], load_settings(port=0, threads=1, {settings})))
except SopdeployError as problem:
    sys.exit(f"error: {{problem}}")
"""

SLOW = """
import time
from sopdeploy_service.runtime.onnxruntime import (OnnxRuntime)
whole = OnnxRuntime.run
def slow(self, images):
    time.sleep(0.15)
    return whole(self, images)
OnnxRuntime.run = slow
"""

HANGS = """
import time
from sopdeploy_service.runtime.onnxruntime import (OnnxRuntime)
whole = OnnxRuntime.run
def hang(self, images):
    if images.max() == 0:
        time.sleep(1000)
    return whole(self, images)
OnnxRuntime.run = hang
"""

HALTS = """
import os, signal
from sopdeploy_service.server.process import (DrainingServer)
whole = DrainingServer.on_tick
async def halt(self, counter):
    ends = await whole(self, counter)
    if ends:
        os.kill(os.getpid(), signal.SIGSTOP)  # what comes now comes just before the port is closed
    return ends
DrainingServer.on_tick = halt
"""


@contextmanager
def process(
    bundle: Path, faults: str = "", settings: str = "", ordered: str = ""
) -> Iterator[subprocess.Popen[str]]:
    code = SERVE.format(faults=faults, settings=settings)
    child = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", code, str(bundle)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"SOPDEPLOY_FAULTS": ordered},
    )
    with child:  # whose end waits for the process, so that must be over by then
        try:
            yield child
            child.wait(PATIENCE)
        finally:
            child.kill()


@pytest.fixture
def start(bundle_path: Path) -> Iterator[Callable[..., tuple[subprocess.Popen[str], httpx.Client]]]:
    with ExitStack() as stack:

        def started(**options: str) -> tuple[subprocess.Popen[str], httpx.Client]:
            child = stack.enter_context(process(bundle_path, **options))
            found = re.fullmatch(r"ready: (\S+)  (\S+)\n", line_of(child))
            assert found, child.communicate(timeout=PATIENCE)
            assert found[2] == bundle_path.name
            return child, stack.enter_context(httpx.Client(base_url=found[1], timeout=PATIENCE))

        yield started


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_server_says_when_it_is_ready_and_ends_with_0(start, jpeg, stop) -> None:
    child, client = start()
    assert client.get("/readyz").status_code == 200
    assert client.post("/v1/classify", content=jpeg).status_code == 200
    child.send_signal(stop)
    out, err = child.communicate(timeout=PATIENCE)
    assert (child.returncode, out, err) == (0, "", "")


def test_sigterm_under_load_answers_every_request_that_was_admitted(start, jpeg) -> None:
    child, client = start(faults=SLOW, settings="max_batch=1")
    replies: list[httpx.Response] = []
    with ThreadPoolExecutor(16) as pool:
        sent = [pool.submit(client.post, "/v1/classify", content=jpeg) for _ in range(16)]
        wait_until(lambda: arrived(client) == 16)
        child.send_signal(signal.SIGTERM)
        wait_until(lambda: client.get("/readyz").status_code == 503)
        late = client.post("/v1/classify", content=jpeg)
        replies = [reply.result() for reply in sent]
    assert [reply.status_code for reply in replies] == [200] * 16
    assert (late.status_code, late.json()["code"]) == (503, "draining")
    assert late.headers["connection"] == "close"
    assert child.wait(PATIENCE) == 0


@pytest.mark.parametrize("said", [b"", b"POST /v1/cl", b"POST /v1/classify HTTP/1.1\r\nHost: x\r\n"])
def test_who_is_connected_before_the_port_closes_is_answered(start, jpeg, said) -> None:
    child, client = start(faults=HALTS)
    whole = b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(jpeg) + jpeg
    with ExitStack() as stack:
        known = [stack.enter_context(connect(client)) for _ in range(20)]
        for wire in known:
            wire.sendall(whole)
            assert read(wire, to_the_end=False).status == 200
            wire.sendall(said)
        child.send_signal(signal.SIGTERM)
        wait_until(lambda: os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WNOHANG) is not None)
        strangers = [stack.enter_context(connect(client)) for _ in range(40)]
        for wire in strangers:
            wire.sendall(whole)
        for wire in known:
            wire.sendall(whole.removeprefix(said))
        child.send_signal(signal.SIGCONT)
        replies = [read(wire) for wire in known + strangers]
    assert [(reply.status, reply.code) for reply in replies] == [(503, "draining")] * 60
    assert child.wait(PATIENCE) == 0


def test_connections_that_say_nothing_do_not_keep_the_server_from_its_end(start) -> None:
    child, client = start()
    with ExitStack() as stack:
        for said in (b"", b"GET /li", GET, GET + b"\r\n") * 5:
            stack.enter_context(connect(client)).sendall(said)
        assert client.get("/livez").status_code == 200
        child.send_signal(signal.SIGTERM)
        assert child.wait(20) == 0


def test_a_port_is_asked_for_all_who_wait_at_it() -> None:
    with ExitStack() as stack:
        listener = stack.enter_context(bind("127.0.0.1", 0))
        listener.listen()
        listener.setblocking(False)
        wires = [stack.enter_context(socket.create_connection(listener.getsockname())) for _ in range(3)]
        found = [stack.enter_context(one).getpeername() for one in take_in(listener)]
        assert found == [wire.getsockname() for wire in wires]
        assert take_in(listener) == []


def test_what_cannot_be_answered_within_the_drain_is_refused_and_not_cut_off(start, jpeg) -> None:
    child, client = start(faults=SLOW, settings="max_batch=1, drain_seconds=0.5")
    with ThreadPoolExecutor(16) as pool:
        sent = [pool.submit(client.post, "/v1/classify", content=jpeg) for _ in range(16)]
        wait_until(lambda: arrived(client) == 16)
        child.send_signal(signal.SIGTERM)
        replies = [reply.result() for reply in sent]
    assert {reply.status_code for reply in replies} == {200, 503}
    assert all(reply.json()["code"] == "draining" for reply in replies if reply.status_code == 503)
    assert child.wait(PATIENCE) == 0


def test_a_second_signal_ends_the_drain(start, jpeg) -> None:
    child, client = start(faults=SLOW, settings="max_batch=1")
    with ThreadPoolExecutor(16) as pool:
        sent = [pool.submit(client.post, "/v1/classify", content=jpeg) for _ in range(16)]
        wait_until(lambda: arrived(client) == 16)
        for _ in range(2):
            child.send_signal(signal.SIGTERM)
            time.sleep(0.2)
        statuses = [reply.result().status_code for reply in sent]
    assert set(statuses) == {200, 503}
    assert child.wait(PATIENCE) == 0


def test_a_hung_engine_ends_the_process_with_70(start, make_picture) -> None:
    child, client = start(faults=HANGS, settings="engine_timeout_seconds=0.5")
    reply = client.post("/v1/classify", content=make_picture((0, 0, 0), kind="PNG"))
    assert (reply.status_code, reply.json()["code"]) == (503, "engine_dead")
    assert child.wait(PATIENCE) == 70


def test_ordered_faults_are_warned_of_and_a_hung_engine_ends_the_process_with_70(start, jpeg) -> None:
    child, client = start(ordered="engine=nan@1,engine=hang@2")
    first = client.post("/v1/classify", content=jpeg)
    assert (first.status_code, first.json()["code"]) == (500, "nonfinite_output")
    assert client.post("/v1/classify", content=jpeg).json()["code"] == "engine_dead"
    err = child.communicate(timeout=PATIENCE)[1]
    assert child.returncode == 70
    events = [json.loads(line) for line in err.splitlines()]
    assert [event["level"] for event in events] == ["warning", "critical"]
    assert "fail on purpose" in events[0]["event"]
    assert events[0]["faults"] == "engine=nan@1,engine=hang@2"


def test_the_log_tells_of_start_requests_drain_and_end(start, jpeg) -> None:
    child, client = start(settings="log='json'")
    assert client.post("/v1/classify", content=jpeg).status_code == 200
    child.send_signal(signal.SIGTERM)
    out, err = child.communicate(timeout=PATIENCE)
    events = [json.loads(line) for line in err.splitlines()]
    assert (child.returncode, out) == (0, "")
    assert [event["event"] for event in events] == ["started", "request", "draining", "stopped"]
    steps = events[0]["steps_ms"]
    assert list(steps) == ["imports", "hashes", "session", "probes", "listen"]
    assert events[0]["ms"] == pytest.approx(sum(steps.values()), abs=0.2)


def test_the_timeline_alone_is_printed_where_it_is_asked_for(start, jpeg) -> None:
    child, client = start(settings="startup_timeline=True")
    assert client.post("/v1/classify", content=jpeg).status_code == 200
    child.send_signal(signal.SIGTERM)
    (line,) = child.communicate(timeout=PATIENCE)[1].splitlines()
    assert json.loads(line)["event"] == "started"


def test_wrong_faults_or_keys_are_one_clear_line(bundle_path: Path, tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(ConfigError, match="sopdeploy key"):
        serve([bundle_path], Settings(port=0, keys=tmp_path / "keys.toml"))
    monkeypatch.setenv("SOPDEPLOY_FAULTS", "engine=explode@1")
    with pytest.raises(ConfigError, match="SOPDEPLOY_FAULTS: 'engine=explode@1' is no fault"):
        serve([bundle_path], Settings(port=0))


def arrived(client: httpx.Client) -> int:
    """How many requests have been admitted so far; some of them may be answered already."""
    for line in client.get("/metrics").text.splitlines():
        if line.startswith('sopdeploy_stage_duration_seconds_count{stage="receive"} '):
            return int(float(line.split()[1]))
    return 0


def wait_until(condition: Callable[[], bool], seconds: float = PATIENCE) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def test_a_port_in_use_is_one_clear_line(bundle_path: Path) -> None:
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}: cannot listen .*another"):
            serve([bundle_path], Settings(port=port))


def test_a_host_that_is_not_here_is_one_clear_line(bundle_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot listen"):
        serve([bundle_path], Settings(host="host.invalid", port=0))


def test_a_damaged_bundle_is_never_served(bundle_path: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(bundle_path, tmp_path / bundle_path.name)
    (copy / "model.onnx").write_bytes(b"x")
    with pytest.raises(BundleError, match=r"model\.onnx"):
        serve([copy], Settings(port=0))


def test_a_network_that_gives_other_numbers_than_promised_is_never_served(
    wrong_bundle_path: Path,
) -> None:
    with pytest.raises(ParityError, match="deviates"):
        serve([wrong_bundle_path], Settings(port=0))


def test_the_server_and_the_app_never_load_torch_or_the_exporter() -> None:
    code = (
        "import sys, sopdeploy_service.app, sopdeploy_service.server.process, "
        "sopdeploy_service.commands.predict, "
        "sopdeploy_service.commands.verify; "
        "print([name for name in ('torch', 'onnx', 'sklearn', 'onnxruntime', 'sopdeploy_export') "
        "if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
