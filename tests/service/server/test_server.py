"""The server process: startup, graceful shutdown, logs, exit codes, and freed memory."""

import asyncio
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from sopdeploy.base.files import move_link
from sopdeploy.errors import ConfigError
from sopdeploy_commands.promote import promote
from sopdeploy_service.app import create_app
from sopdeploy_service.server import draining_server
from sopdeploy_service.server.process import run_server
from sopdeploy_service.server.sockets import bind
from sopdeploy_service.settings import Settings
from tests.support.children import EACH_WAY, TWO_DEVICES, WAYS, ServerClient, serving, spawn
from tests.support.raw import GET, POST, connect, post_of, read
from tests.support.service import wait_for, write_bundle
from tests.support.slow import mostly_slow

PATIENCE = 90  # seconds; usually a few are enough

# `{before}` runs before each batch.
# The time after which a batch counts as hung
HANG_AFTER = """
from sopdeploy_service.inference import model_worker
model_worker.MIN_HANG_SECONDS = {seconds}
"""
BATCH = """
import threading, time
from pathlib import Path
from sopdeploy_service.runtime.onnxruntime import (OnnxRuntime)
original = OnnxRuntime.run
def changed(self, images):
    {before}
    return original(self, images)
OnnxRuntime.run = changed
"""

WAITS = """while threading.current_thread().name == 'model_worker' and not Path({gate!r}).exists():
        time.sleep(0.01)"""

HANGS = BATCH.format(
    before="time.sleep(1000 if threading.current_thread().name == 'model_worker' else 0)"
)

HALTS = """
import os, signal
from sopdeploy_service.server.draining_server import (DrainingServer)
original = DrainingServer.on_tick
async def halt(self, counter):
    ends = await original(self, counter)
    if ends:
        os.kill(os.getpid(), signal.SIGSTOP)  # the test connects now, just before the port closes
    return ends
DrainingServer.on_tick = halt
"""


def faulty(code: str) -> tuple[str, ...]:
    """A program that runs `serve` after *code*; warnings are errors."""
    run = "import sys; from sopdeploy_commands.app import main; sys.argv.insert(1, 'serve'); main()"
    return "-W", "error", "-c", f"{code}\n{run}"


PATIENT = ("drain_seconds", "request_timeout")


@pytest.mark.parametrize(
    ("options", "number", "silent", "logged"),
    [
        (
            [f"--setting={name}=3600" for name in PATIENT],
            signal.SIGINT,
            (b"", b"GET /li", GET),
            [],
        ),
        (["--log", "json"], signal.SIGTERM, (), ["started", "request", "draining", "stopped"]),
    ],
)
def test_an_idle_server_prints_ready_exits_with_0_and_logs_on_demand(
    bundle_path, jpeg, options, number, silent, logged
) -> None:
    """Clients that send nothing more do not delay the end."""
    with (
        serving(str(bundle_path), *options, program=faulty("")) as client,
        ExitStack() as stack,
    ):
        for said in (*silent, GET + b"\r\n") * 5:
            stack.enter_context(connect(client)).sendall(said)
        assert client.post("/v1/classify", content=jpeg).status_code == 200
        client.child.send_signal(number)
        out, err = client.child.communicate(timeout=PATIENCE)

    assert client.child.returncode == 0
    assert all(": http" in line for line in out.splitlines())  # of its pages
    assert [json.loads(line)["event"] for line in err.splitlines()] == logged


@pytest.mark.parametrize(
    "end", mostly_slow(["all complete", "time", "a second signal"], "all complete")
)
def test_sigterm_completes_admitted_requests_unless_the_drain_ends(
    bundle_path, jpeg, tmp_path, end
) -> None:
    gate = tmp_path / "gate"  # the first batch waits for this file
    program = faulty(
        HANG_AFTER.format(seconds=60) + BATCH.format(before=WAITS.format(gate=str(gate)))
    )
    seconds = 0.5 if end == "time" else 60
    settings = f"max_batch=1 drain_seconds={seconds}".split()
    options = [f"--setting={setting}" for setting in settings]

    with (
        serving(str(bundle_path), *options, program=program) as client,
        ThreadPoolExecutor(16) as pool,
    ):
        sent = [pool.submit(client.post, "/v1/classify", content=jpeg) for _ in range(16)]
        wait_for(lambda: "sopdeploy_queue_depth 16.0" in client.get("/metrics").text, PATIENCE)
        client.child.send_signal(signal.SIGTERM)
        if end != "time":
            wait_for(lambda: client.get("/readyz").status_code == 503, PATIENCE)
        if end == "a second signal":
            client.child.send_signal(signal.SIGTERM)

        if end == "all complete":
            late = client.post("/v1/classify", content=jpeg)
            assert (late.status_code, late.json()["code"]) == (503, "draining")
            assert late.headers["connection"] == "close"
            gate.touch()

        codes = {reply.result().json().get("code") for reply in sent}
        assert codes == {None if end == "all complete" else "draining"}
        gate.touch()
        assert client.child.wait(PATIENCE) == 0


@pytest.mark.parametrize("way", EACH_WAY)
def test_after_sigterm_a_lame_duck_serves_and_every_response_closes_its_connection(
    bundle_path, jpeg, way
) -> None:
    request = post_of(jpeg)
    options = ["--setting=lame_duck_seconds=3600", *WAYS[way]]

    with serving(str(bundle_path), *options) as client, ExitStack() as stack:
        kept = stack.enter_context(connect(client))
        kept.sendall(request)
        before = read(kept, to_the_end=False)

        client.child.send_signal(signal.SIGTERM)
        wait_for(lambda: client.get("/readyz").status_code == 503, PATIENCE)

        # A kept connection and a new one: both are served, and closed.
        new = stack.enter_context(connect(client))
        replies = []
        for wire in (kept, new):
            wire.sendall(request)
            replies.append(read(wire))

        # Another signal ends the time in which it serves.
        client.child.send_signal(signal.SIGTERM)
        assert client.child.wait(PATIENCE) == 0

    assert "connection" not in before.headers
    assert [reply.status for reply in replies] == [200, 200]
    assert [reply.headers["connection"] for reply in replies] == ["close", "close"]


@pytest.mark.slow
def test_an_interrupt_from_the_keyboard_waits_for_no_proxy(bundle_path) -> None:
    with serving(str(bundle_path), "--setting=lame_duck_seconds=3600") as client:
        client.child.send_signal(signal.SIGINT)
        assert client.child.wait(PATIENCE) == 0


@pytest.mark.parametrize(
    ("age", "closes"),
    [
        (1e-300, True),
        pytest.param(None, False, marks=pytest.mark.slow),
        pytest.param(3600.0, False, marks=pytest.mark.slow),
    ],
)
def test_a_response_closes_a_connection_of_the_largest_age(bundle_path, age, closes) -> None:
    options = () if age is None else (f"--setting=max_connection_age={age}",)
    with serving(str(bundle_path), *options) as client, connect(client) as wire:
        wire.sendall(GET + b"\r\n")
        reply = read(wire, to_the_end=closes)

    assert reply.status == 200
    assert (reply.headers.get("connection") == "close") == closes


@pytest.mark.slow
def test_connections_opened_before_the_port_closes_get_a_response(bundle_path, jpeg) -> None:
    request = post_of(jpeg)
    with serving(str(bundle_path), program=faulty(HALTS)) as client, ExitStack() as stack:
        known = [
            (stack.enter_context(connect(client)), said) for said in (b"", POST[:11], POST) * 7
        ]

        for wire, said in known:
            wire.sendall(request)
            assert read(wire, to_the_end=False).status == 200
            wire.sendall(said)
        client.child.send_signal(signal.SIGTERM)
        stopped = os.P_PID, client.child.pid, os.WSTOPPED | os.WNOHANG
        wait_for(lambda: os.waitid(*stopped) is not None, PATIENCE)
        pending = [stack.enter_context(connect(client)) for _ in range(40)]
        for wire in pending:
            wire.sendall(request)
        for wire, said in known:
            wire.sendall(request.removeprefix(said))
        client.child.send_signal(signal.SIGCONT)
        replies = [read(wire) for wire in [*(wire for wire, _ in known), *pending]]

        assert [(reply.status, reply.code) for reply in replies] == [(503, "draining")] * 61
        assert client.child.wait(PATIENCE) == 0


@pytest.mark.slow
def test_a_hanging_runtime_exits_with_70(bundle_path, jpeg) -> None:
    program = faulty(HANG_AFTER.format(seconds=0.5) + HANGS)
    with serving(str(bundle_path), program=program) as client:
        reply = client.post("/v1/classify", content=jpeg)
        assert (reply.status_code, reply.json()["code"]) == (503, "runtime_dead")
        err = client.child.communicate(timeout=PATIENCE)[1]

    assert client.child.returncode == 70
    assert [json.loads(line)["level"] for line in err.splitlines()] == ["critical"]


# A reload never finds its bundles, as on a hung disk.
STUCK = """
import threading
from pathlib import Path
from sopdeploy_service.inference import model_registry
def find(*given):
    Path({begun!r}).touch()
    threading.Event().wait()
model_registry.find_bundles = find
"""


@pytest.mark.slow
def test_sigterm_ends_a_server_whose_reload_is_stuck(bundle_path, jpeg, tmp_path) -> None:
    begun = tmp_path / "begun"
    program = faulty(STUCK.format(begun=str(begun)))
    with serving(str(bundle_path), program=program) as client:
        client.child.send_signal(signal.SIGHUP)
        wait_for(begun.exists)
        assert client.post("/v1/classify", content=jpeg).status_code == 200
        client.child.send_signal(signal.SIGTERM)
        assert client.child.wait(PATIENCE) == 0


@contextmanager
def traffic(client: ServerClient, jpeg: bytes) -> Iterator[Callable[[Path], bool]]:
    """Four clients send requests until the block ends, and all succeed.

    The callable says whether the last requests, which reached all processes, were served by a
    bundle.
    """
    replies = []
    stopped = threading.Event()

    def send() -> None:
        while not stopped.is_set():
            replies.append(client.post("/v1/classify", content=jpeg))

    def serves(bundle: Path) -> bool:
        found = {reply.headers["x-model-digest"] for reply in replies[-8:]}
        return len(replies) > 20 and found == {bundle.name.rpartition("-")[2]}

    with ThreadPoolExecutor(4) as pool:
        sending = [pool.submit(send) for _ in range(4)]
        try:
            yield serves
        finally:
            stopped.set()
        for each in sending:
            each.result()
    assert {reply.status_code for reply in replies} == {200}


def wait_for_refusals(child: subprocess.Popen[str], way: str, reason: str) -> None:
    """Read the log until every process has not reloaded the bundles for *reason*."""
    left = 2 if way == TWO_DEVICES else 1
    while left:
        event = json.loads(child.stderr.readline())["event"]
        left -= event.startswith("not reloaded, the bundles in use stay: ") and reason in event


@pytest.mark.parametrize("way", EACH_WAY)
def test_sighup_serves_the_latest_bundles_and_loses_no_request(tmp_path, jpeg, way) -> None:
    folder = tmp_path / "bundles"
    first = write_bundle(folder)
    with serving(str(folder), *WAYS[way]) as client:
        with traffic(client, jpeg) as serves:
            client.child.send_signal(signal.SIGUSR1)  # of a program that rotates logs
            wait_for(lambda: serves(first))
            second = write_bundle(folder, seed=1)
            client.child.send_signal(signal.SIGHUP)
            wait_for(lambda: serves(second))
            write_bundle(folder, seed=2, wrong_by=1.0)
            client.child.send_signal(signal.SIGHUP)
            wait_for_refusals(client.child, way, "reference outputs")

        shutil.rmtree(folder)
        client.child.send_signal(signal.SIGHUP)
        wait_for_refusals(client.child, way, "no such folder")

        assert client.post("/v1/classify", content=jpeg).status_code == 200


@pytest.mark.parametrize("way", EACH_WAY)
def test_a_server_that_follows_a_link_loses_no_request(tmp_path, jpeg, way) -> None:
    live = tmp_path / "live"
    first, second = (write_bundle(tmp_path, seed=seed) for seed in (0, 1))
    wrong = write_bundle(tmp_path, seed=2, wrong_by=1.0)
    promote(first, live, None)

    with (
        serving(str(live), *WAYS[way], "--setting", "follow=true") as client,
        traffic(client, jpeg) as serves,
    ):
        wait_for(lambda: serves(first))
        promote(second, live, None, force="newer")
        wait_for(lambda: serves(second))
        move_link(live, wrong.name)  # `promote` would refuse it
        wait_for_refusals(client.child, way, "reference outputs")
        move_link(live, second.name)
        promote(back=live)
        wait_for(lambda: serves(first))

        # One whose files are copied after the link has moved
        late = write_bundle(tmp_path / "elsewhere", seed=3)
        move_link(live, late.name)
        wait_for_refusals(client.child, way, late.name)
        late.rename(tmp_path / late.name)
        wait_for(lambda: serves(tmp_path / late.name))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="terminals differ")
@pytest.mark.parametrize("redirected", [False, True], ids=["plain", "standard error in a file"])
def test_a_server_ends_with_its_terminal(tmp_path, redirected) -> None:
    bundle = write_bundle(tmp_path)
    terminal, side = os.openpty()

    def take_terminal() -> None:
        # A server that was started by `nohup`, as these tests may be, outlives its terminal.
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        fcntl.ioctl(side, termios.TIOCSCTTY, 0)

    # The leader of a session, whose terminal is the new one: the kernel sends it a SIGHUP.
    options = {"start_new_session": True, "preexec_fn": take_terminal, "pass_fds": [side]}
    with (
        (tmp_path / "log").open("w") as log,
        serving(str(bundle), stderr=log if redirected else side, **options) as client,
    ):
        os.close(side)
        os.close(terminal)
        assert client.child.wait(PATIENCE) == 0


FAILS = """
from sopdeploy.errors import ConfigError
from sopdeploy_service.inference.service import Service
async def fail(self):
    raise {error}
Service.start = fail
"""


@pytest.mark.parametrize(
    ("error", "line"),
    [
        ("ConfigError('sandbox=required: no seccomp')", "sandbox=required: no seccomp"),
        ("RuntimeError('no thread')", "RuntimeError: no thread"),
        ("BlockingIOError(11, 'Try again')", "BlockingIOError: [Errno 11] Try again"),
    ],
)
def test_an_error_of_the_start_is_one_line_with_exit_code_2(bundle_path, error, line) -> None:
    with spawn(str(bundle_path), program=faulty(FAILS.format(error=error))) as child:
        out, err = child.communicate(timeout=PATIENCE)

    assert (child.returncode, out, len(err.splitlines())) == (2, "", 1), err
    assert line in err


@pytest.mark.parametrize(("is_stopped", "state"), [(False, "ok"), (True, "draining")])
def test_a_signal_during_the_start_begins_a_drain_that_stays(
    monkeypatch, is_stopped, state
) -> None:
    app = create_app({}, Settings())
    server = draining_server.DrainingServer(app, Settings())
    service = app.state.service

    async def start() -> None:
        if is_stopped:
            server.handle_exit(signal.SIGTERM, None)

    monkeypatch.setattr(service.decoders, "start", start)
    asyncio.run(service.start())
    assert service.state == state


@pytest.mark.slow
@pytest.mark.parametrize("way", EACH_WAY)
def test_a_stopped_reader_of_the_log_stops_no_request(bundle_path, jpeg, way) -> None:
    with serving(str(bundle_path), "--log", "json", *WAYS[way]) as client:
        fcntl.fcntl(client.child.stderr, fcntl.F_SETPIPE_SZ, 4096)  # full after ten requests
        statuses = {client.post("/v1/classify", content=jpeg).status_code for _ in range(60)}
        assert statuses == {200}
        assert client.get("/livez").status_code == 200

        client.child.send_signal(signal.SIGTERM)
        assert client.child.wait(60) == 0


def test_a_port_in_use_and_other_wrong_arguments_are_errors(bundle_path: Path) -> None:
    no_link = "bundles/live"
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        for settings, message in (
            ({"port": port}, f"127.0.0.1:{port}: cannot listen .*another"),
            ({"port": 0, "host": "host.invalid"}, "cannot listen"),
            ({"port": 0, "host": "a..b"}, "cannot listen"),
            ({"port": 0, "follow": True}, no_link),
            ({"port": 0, "follow": True, "devices": "cpu"}, no_link),
        ):
            with pytest.raises(ConfigError, match=message):
                run_server([bundle_path], Settings(**settings))


@pytest.mark.nightly  # needs an idle machine
def test_eight_seconds_of_soak_meet_every_bound(bundle_path: Path, tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/soak.py", "--seconds", "8", "--warm-up", "4"]
    command += ["--bundles", str(bundle_path), str(write_bundle(tmp_path, seed=1))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = [line for line in done.stderr.splitlines() if "keep the key" not in line]

    assert done.returncode == 0
    assert said == []
