"""One process per device behind one port: restarts, drain, joint metrics, rate limits, kept photographs."""

import asyncio
import contextlib
import errno
import http.client
import itertools
import json
import os
import re
import signal
import socket
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import httpx
import pytest

from sopdeploy.bundle.decision import Decision, Rejection
from sopdeploy.bundle.sealed import read_memory
from sopdeploy.errors import ConfigError
from sopdeploy_service.devices import control, device_server, processes, supervisor, template
from sopdeploy_service.devices.control import Status
from sopdeploy_service.devices.device_server import DeviceServer
from sopdeploy_service.devices.processes import LaunchConfig, Process, visible_devices
from sopdeploy_service.devices.remote import RemoteRegistry
from sopdeploy_service.http.api_keys import new_key
from sopdeploy_service.http.problems import describe_error
from sopdeploy_service.inference import load_time
from sopdeploy_service.inference.results import RUNTIME_DEAD
from sopdeploy_service.settings import load_settings
from sopdeploy_service.tasks import start_task
from tests.service.devices import gated_device
from tests.service.test_keep import photos, read_records, results
from tests.support.children import (
    FRONT_ENDS,
    START_SECONDS,
    TWO_DEVICES,
    WAYS,
    are_replaced,
    is_alive,
    num_open_files,
    processes_of,
    serving,
)
from tests.support.raw import GET, connect, post_of, read
from tests.support.service import wait_for, write_bundle


def open_connections(
    client: httpx.Client, count: int, stack: ExitStack
) -> list[http.client.HTTPConnection]:
    """Make *count* connections, which *stack* closes; half of them reach each process if all stay open."""
    host = client.base_url.netloc.decode()
    return [
        stack.enter_context(contextlib.closing(http.client.HTTPConnection(host, timeout=60)))
        for _ in range(count)
    ]


def classify_on(jpeg: bytes, connection: http.client.HTTPConnection, **headers: str) -> int:
    """Return the status of a request on *connection*."""
    connection.request("POST", "/v1/classify", jpeg, headers)
    response = connection.getresponse()
    response.read()
    return response.status


def files_of(process: int) -> list[str]:
    """List what the open files of *process* are, without the numbers by which two of a kind differ."""
    targets: list[str] = []
    for file in Path(f"/proc/{process}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            targets.append(re.sub(r"\d+", "", str(file.readlink())))
    return sorted(targets)


def num_threads(process: int) -> int:
    """Count the threads of *process*."""
    return len(list(Path(f"/proc/{process}/task").iterdir()))


def starts_of(page: str) -> set[str]:
    """Return when the processes on a *page* of metrics, which may be seconds old, were started."""
    return set(re.findall(r"^process_start_time_seconds{.*} (\S+)$", page, re.M))


@pytest.mark.slow
def test_a_dead_or_hanging_process_loses_its_own_connections_and_is_replaced(
    bundle_path: Path, jpeg
) -> None:
    with serving(str(bundle_path), *WAYS[TWO_DEVICES]) as client, ExitStack() as stack:
        child = client.child
        connections = open_connections(client, 8, stack)
        assert [classify_on(jpeg, connection) for connection in connections] == [200] * 8
        page = client.get("/metrics").text
        answered = r'sopdeploy_requests_total\{process="\S+?",code="200",.*route="/v1/classify"\} (\S+)'
        assert re.findall(answered, page) == ["4.0", "4.0"]
        names = {"cpu-0", "cpu-1", "supervisor"}
        assert (
            set(re.findall(r'^process_cpu_seconds_total{process="(.*?)"}', page, re.M)) == names
        )
        # It closes the page just after the client has got it.
        files = [file for file in files_of(child.pid) if "sopdeploy-metrics" not in file]

        def send_to_the_oldest(number: signal.Signals) -> None:
            oldest, name = next(iter(processes_of(child.pid).items()))
            os.kill(oldest, number)
            # A connection that the supervisor passes on before it notices the death is reset.
            wait_for(lambda: are_replaced(child.pid, {oldest: name}))
            codes = {client.post("/v1/classify", content=jpeg).status_code for _ in range(5)}
            assert codes == {200}

        send_to_the_oldest(signal.SIGKILL)
        kept = []
        for connection in connections:
            with contextlib.suppress(ConnectionError):
                kept.append(classify_on(jpeg, connection))
        assert kept == [200] * 4  # the others were connected to the killed process
        up = re.compile(r"^sopdeploy_worker_up\{.*\} 1\.0$", re.MULTILINE)
        wait_for(lambda: starts_of(client.get("/metrics").text) - starts_of(page))
        wait_for(lambda: len(up.findall(client.get("/metrics").text)) == 2)

        # The supervisor keeps nothing of the dead process. Its pool of threads grows with the load.
        wait_for(lambda: files_of(child.pid) == files)
        largest_pool = min(32, (os.cpu_count() or 1) + 4)  # of `ThreadPoolExecutor`
        assert num_threads(child.pid) <= 1 + largest_pool

        send_to_the_oldest(signal.SIGSTOP)
        orphans = processes_of(child.pid)
        child.kill()
        wait_for(lambda: not any(is_alive(process) for process in orphans))


# what a process does that sends no report -> seconds until it is replaced
SILENT_WHILE = {"it serves": 5, "it loads": 7, "it replaces one and loads": 7, "it ends": 8}


@pytest.mark.parametrize("phase", SILENT_WHILE)
def test_a_silent_process_is_replaced_in_every_phase(monkeypatch, phase) -> None:
    killed: list[int] = []
    beats = itertools.count(1)

    async def next_beat(_seconds: float) -> None:
        if killed or (beat := next(beats)) > 200:
            raise asyncio.CancelledError
        now.append(beat)

    now: list[int] = []
    monkeypatch.setattr(processes, "START_SECONDS", 6.0)
    monkeypatch.setattr(load_time, "LOAD_SECONDS_ON_CPU", 1.0)
    settings = load_settings(front_ends=0)
    process = Process("cpu", {}, settings, "cpu", 0)
    process.child = SimpleNamespace(
        pid=1,
        poll=lambda: None,
        kill=lambda: killed.append(now[-1]),
        send_signal=lambda _: None,
    )
    monkeypatch.setattr(supervisor.asyncio, "sleep", next_beat)
    with socket.socket() as listener:
        server = supervisor.Supervisor([], settings, [process], listener)
        server._announced = True
        server._loop = SimpleNamespace(remove_reader=lambda _: None, add_reader=lambda *_: None)
        process.reset(SimpleNamespace(close=lambda: None))
        if phase != "it loads":
            process.record_status(Status(0, 0, ""))
        if phase == "it replaces one and loads":
            process.reset(SimpleNamespace(close=lambda: None))
        if phase == "it ends":
            process.control = None

        with pytest.raises(asyncio.CancelledError):
            asyncio.run(server._replace_failing())

    assert killed == [pytest.approx(10 * SILENT_WHILE[phase], abs=5)]


def test_several_processes_are_refused_where_the_system_lacks_what_they_share(
    monkeypatch,
) -> None:
    monkeypatch.delattr(os, "memfd_create")  # as on macOS
    with pytest.raises(ConfigError, match=r"front_ends: .*Linux"):
        supervisor.run_supervisor(["bundles"], load_settings(devices="cpu,cpu", port=0))


def test_a_process_that_dies_early_for_days_is_still_restarted(monkeypatch) -> None:
    monkeypatch.setattr(supervisor, "MAX_RESTART_DELAY_SECONDS", 0.0)
    starts = itertools.count(1)
    with socket.socket() as listener:
        settings = load_settings()
        process = Process("cpu", {}, settings, "cpu", 0)
        server = supervisor.Supervisor([], settings, [process], listener)

        async def start(_: Process) -> None:
            if next(starts) == 1100:
                server._stopping.set()
            process.bundles = "flowers"  # it was ready
            process.child = SimpleNamespace(poll=lambda: 1, kill=lambda: None)

        monkeypatch.setattr(server, "_start", start)
        assert asyncio.run(server.run()) == 0
    assert next(starts) == 1101


@pytest.mark.parametrize(
    ("stable_seconds", "delays"),
    [(60.0, [0, 1, 3, 7, 7]), (0.0, [0, 0, 0, 0, 0])],
    ids=["dies early", "ran long enough"],
)
def test_only_a_process_that_dies_early_is_restarted_later_each_time(
    monkeypatch, stable_seconds: float, delays: list[int]
) -> None:
    monkeypatch.setattr(supervisor, "STABLE_SECONDS", stable_seconds)
    settings = load_settings()
    process = Process("cpu", {}, settings, "cpu", 0)
    waited = []

    with socket.socket() as listener:
        server = supervisor.Supervisor([], settings, [process], listener)

        async def start(_: Process) -> None:
            process.bundles = "flowers"  # it was ready
            process.child = SimpleNamespace(poll=lambda: 1, kill=lambda: None)

        async def note_delay(stopping: Coroutine[object, object, bool], delay: float) -> None:
            stopping.close()
            waited.append(delay)
            if len(waited) == len(delays):
                server._stopping.set()
            raise TimeoutError

        monkeypatch.setattr(server, "_start", start)
        monkeypatch.setattr(supervisor.asyncio, "wait_for", note_delay)
        assert asyncio.run(server.run()) == 0

    assert waited == delays


def test_a_system_without_room_for_a_process_is_asked_again(monkeypatch, caplog) -> None:
    monkeypatch.setattr(supervisor, "MAX_RESTART_DELAY_SECONDS", 0.0)
    monkeypatch.setattr(supervisor, "BEAT_SECONDS", 60.0)  # the log has one line of a beat
    num_open: list[int] = []
    with socket.socket() as listener:
        settings = load_settings()
        server = supervisor.Supervisor(
            [], settings, [Process("cpu", {}, settings, "cpu", 0)], listener
        )
        server._announced = True  # else the command ends

        def refuse(*_: object, **__: object) -> None:
            num_open.append(num_open_files())
            if len(num_open) == 5:
                server._stopping.set()
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

        monkeypatch.setattr(template.subprocess, "Popen", refuse)
        assert asyncio.run(server.run()) == 0
    assert len(num_open) == 5
    assert len(set(num_open)) == 1
    (record,) = caplog.records
    assert record.message.startswith("device cpu: ")
    assert "Resource temporarily unavailable" in record.message


@pytest.mark.parametrize(("other_is_ready", "ends"), [(False, True), (True, False)])
def test_a_server_ends_if_its_last_device_cannot_be_started_again(
    monkeypatch, other_is_ready: bool, ends: bool
) -> None:
    monkeypatch.setattr(supervisor, "MAX_RESTART_DELAY_SECONDS", 0.0)
    settings = load_settings()
    failing, other = (Process(name, {}, settings, name, 0) for name in ("0", "1"))
    starts = 0

    with socket.socket() as listener:
        server = supervisor.Supervisor([], settings, [failing, other], listener)
        server._announced = True
        server._admitted = memoryview(bytearray(16)).cast("q")

        async def fail(process: Process) -> tuple[str, int | None]:
            nonlocal starts
            starts += 1
            if starts == 3 * supervisor.MAX_FAILED_STARTS:
                server._stopping.set()
            return "exited with code 1", 1

        async def supervise() -> None:
            server._loop = asyncio.get_running_loop()
            if other_is_ready:
                other.bundles = "flowers"
            await server._supervise(failing)

        monkeypatch.setattr(server, "_run_child", fail)
        asyncio.run(supervise())

    assert (starts == supervisor.MAX_FAILED_STARTS) is ends
    assert server._code == (70 if ends else 0)


def make_device_server(end: socket.socket) -> DeviceServer:
    """Build a process without an app, whose supervisor is at the other end of *end*."""
    server = DeviceServer.__new__(DeviceServer)
    registry = RemoteRegistry([], load_settings())
    server._service = SimpleNamespace(registry=registry)
    server._page = None
    server._has_keys = True
    server._supervisor = end
    server._num_received = 0
    server.bundles = ""
    server.server_state = SimpleNamespace(connections=())
    server._tasks = set()
    return server


def test_a_connection_for_which_a_process_has_no_file_counts_as_received() -> None:
    ours, theirs = control.socket_pair()
    with ours, theirs:
        server = make_device_server(theirs)
        assert control.send_message(ours, control.CLIENT)  # the kernel drops the file
        server._receive()
        assert Status.from_bytes(control.receive_message(ours).rest) == Status(1, 0, "")


@pytest.mark.parametrize(("problem", "works"), [(None, True), ("engine_starting", False)])
def test_a_process_reports_whether_it_works(problem, works: bool) -> None:
    ours, theirs = control.socket_pair()
    with ours, theirs:
        server = make_device_server(theirs)
        server._service.registry = SimpleNamespace(problem=problem)
        server._report()
        assert Status.from_bytes(control.receive_message(ours).rest).works == works


# A message without its files -> what the process then lacks, in its report
LACKS = {
    "keys": (control.KEYS, b"", {"has_keys": False}),
    "a channel": (control.CHANNEL, b"engine", {"lost": frozenset({"engine"})}),
}


@pytest.mark.parametrize("name", LACKS)
@pytest.mark.parametrize("supervisor_reads", [True, False])
def test_a_process_without_a_free_file_reports_what_it_lacks(
    name, supervisor_reads: bool
) -> None:
    kind, rest, expected = LACKS[name]
    ours, theirs = control.socket_pair()
    with ours, theirs:
        # Reports of the time in which the supervisor reads none are lost.
        server = make_device_server(theirs)
        while not supervisor_reads and control.send_message(theirs, control.STATUS):
            pass
        assert control.send_message(ours, kind, rest)  # the kernel drops the files
        server._receive()
        while control.receive_message(ours).kind:
            pass

        server._report()
        assert Status.from_bytes(control.receive_message(ours).rest) == Status(
            0, 0, "", **expected
        )


@pytest.mark.parametrize("name", LACKS)
def test_a_front_end_that_waits_for_a_device_process_reports_it(monkeypatch, name) -> None:
    kind, rest, lacks = LACKS[name]
    config = LaunchConfig(
        name="front-0", device=None, variables={}, sources=(), settings=load_settings(),
        supervisor=1, front_ends=1, position=0, num_servers=1, device_processes=(),
    )  # fmt: skip
    monkeypatch.setattr(device_server, "DeviceChannel", lambda *arguments: arguments[1])
    registry = SimpleNamespace(lost=set())
    monkeypatch.setattr(
        device_server, "RemoteRegistry", lambda ends, _: ends[0].close() or registry
    )

    # The message is without its files; then comes a channel to another device process.
    ours, theirs = control.socket_pair()
    with ours, theirs, socket.socket() as connection:
        assert control.send_message(ours, kind, rest)
        assert control.send_message(ours, control.CHANNEL, b"other", connection.fileno())

        ours.shutdown(socket.SHUT_WR)
        waits = pytest.raises(SystemExit) if kind == control.KEYS else contextlib.nullcontext()
        with waits:
            assert device_server.wait_for_device(config, theirs) == (registry, config)

        sent = []
        while (message := control.receive_message(ours)).kind:
            sent.append(Status.from_bytes(message.rest))

    assert sent[:2] == [Status(0, 0, None), Status(0, 0, None, **lacks)]
    assert registry.lost == lacks.get("lost", set())


class TimelessLoop(asyncio.SelectorEventLoop):
    """An event loop whose timers are due as soon as nothing else happens."""

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0
        select = self._selector.select

        def select_at_once(timeout: float | None) -> list[object]:
            events = select(0 if timeout else timeout)
            self._now += 0.0 if events or timeout is None else timeout
            return events

        self._selector.select = select_at_once

    def time(self) -> float:
        return self._now


async def in_this_thread(work: Callable[[], bytes]) -> bytes:
    return work()


def test_a_process_that_hangs_is_down_in_the_metrics_of_others(monkeypatch) -> None:
    monkeypatch.setattr(supervisor.asyncio, "to_thread", in_this_thread)  # a thread needs time

    async def scenario() -> tuple[bytes, bytes]:
        settings = load_settings(front_ends=0)
        loop = asyncio.get_running_loop()
        names = ("answers", "hangs", "loads")
        processes = [
            Process(name, {}, settings, name, number) for number, name in enumerate(names)
        ]
        with socket.socket() as listener, ExitStack() as stack:
            server = supervisor.Supervisor([], settings, processes, listener)
            theirs: list[socket.socket] = []
            for process in processes:
                pair = control.socket_pair()
                ours, their_end = map(stack.enter_context, pair)
                process.reset(ours)
                theirs.append(their_end)
            for process in processes[:2]:
                process.record_status(Status(0, 0, ""))
            answers, _, loads = theirs

            def answer() -> None:
                kind, _, (file,) = control.receive_message(answers)
                if kind == control.PAGE:
                    page.set_result(read_memory(file))
                else:
                    own = b"# HELP a b\n# TYPE a gauge\na 1.0\n"
                    start_task(server._tasks, control.send_metrics(file, own))

            loop.add_reader(answers, answer)
            loop.add_reader(processes[0].control, server._receive, processes[0])
            page = loop.create_future()
            control.send_message(answers, control.METRICS)
            await page
            loop.remove_reader(answers)
            loop.remove_reader(processes[0].control)
            with contextlib.suppress(BlockingIOError):
                return page.result(), loads.recv(100)
            return page.result(), b""

    with asyncio.Runner(loop_factory=TimelessLoop) as runner:
        page, asked = runner.run(scenario())
    assert b'a{process="answers"} 1.0\n' in page

    up = dict(re.findall(rb'^sopdeploy_worker_up{process="(.*?)"} (\S+)$', page, re.M))
    assert up == {b"answers": b"1.0", b"hangs": b"0.0", b"loads": b"0.0"}
    assert asked == b""


def test_a_drain_completes_the_requests_of_both_processes(
    bundle_path, tmp_path, jpeg, monkeypatch
) -> None:
    gate = tmp_path / "gate"
    monkeypatch.setenv("GATE", str(gate))
    options = (*WAYS[TWO_DEVICES], "--log=json", "--setting=drain_seconds=60")

    with (
        serving(str(bundle_path), *options, program=gated_device.SERVE) as client,
        ExitStack() as stack,
        ThreadPoolExecutor(16) as pool,
    ):
        late = [stack.enter_context(connect(client)) for _ in range(8)]
        for wire in late:
            wire.sendall(GET + b"\r\n")
            assert read(wire, to_the_end=False).status == 200

        sent = [pool.submit(client.post, "/v1/classify", content=jpeg) for _ in range(16)]
        depth = r"^sopdeploy_queue_depth{.*} (\S+)"
        wait_for(
            lambda: sum(map(float, re.findall(depth, client.get("/metrics").text, re.M))) == 16
        )
        client.child.send_signal(signal.SIGTERM)
        num_draining = 0
        while num_draining < 2:  # a signal reaches one process later than the other
            event = json.loads(client.child.stderr.readline())["event"]
            num_draining += event == "draining"

        assert client.get("/readyz").status_code == 503

        late.append(stack.enter_context(connect(client)))
        for wire in late:
            wire.sendall(post_of(jpeg))
            reply = read(wire)
            assert (reply.status, reply.code) == (503, "draining")

        gate.touch()

        assert [reply.result().status_code for reply in sent] == [200] * 16
        assert client.child.wait(START_SECONDS) == 0


IDS = "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", "MIG-b5a4e0c9-1c2d-5a30-9b0a-3a3b8a3f5c11"

VISIBLE: dict[str, tuple[str, str | None, dict[str, str] | None]] = {
    "a number": ("1", None, {"CUDA_VISIBLE_DEVICES": "1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}),
    "a UUID": (
        IDS[0],
        None,
        {"CUDA_VISIBLE_DEVICES": IDS[0], "CUDA_DEVICE_ORDER": "PCI_BUS_ID"},
    ),
    "the cpu": ("cpu", "2,3", {"CUDA_VISIBLE_DEVICES": ""}),
    "a position": ("1", "2,3", {"CUDA_VISIBLE_DEVICES": "3"}),
    "a listed UUID": (IDS[0], f"{IDS[1]}, {IDS[0]}", {"CUDA_VISIBLE_DEVICES": IDS[0]}),
    "a number, not a position": ("2", "2,3", None),
    "a UUID that is not listed": (IDS[0], IDS[1], None),
    "a position after an invalid entry": ("1", "0,-1,1", None),
}


@pytest.mark.parametrize(("device", "inherited", "expected"), VISIBLE.values(), ids=VISIBLE)
def test_a_process_sees_its_device_only_and_chooses_from_an_inherited_list(
    device, inherited, expected
) -> None:
    assert load_settings(devices=device, runtime="auto").devices == (device,)

    environment = {} if inherited is None else {"CUDA_VISIBLE_DEVICES": inherited}
    if expected is not None:
        assert visible_devices(device, environment) == expected
        return
    with pytest.raises(ConfigError, match=rf"devices: {device}.*\d GPUs"):
        visible_devices(device, environment)


class KeysOfServer(NamedTuple):
    """A file with many keys, of which `limited` has a rate of five requests."""

    file: Path
    free: str
    limited: str

    def replace_free(self, folder: Path) -> str:
        """Write another key in the place of `free`; return it."""
        new = new_key(folder / "new.toml", "new")
        text = self.file.read_text()
        begin = text.index('[[key]]\nname = "free"')
        end = text.index('[[key]]\nname = "limited"')
        self.file.write_text(text[:begin] + text[end:] + (folder / "new.toml").read_text())
        return new


@pytest.fixture
def keys(tmp_path: Path) -> KeysOfServer:
    file = tmp_path / "keys.toml"
    free = new_key(file, "free")
    limited = new_key(file, "limited", 1e-6)
    others = (
        f'[[key]]\nname = "{number}"\nsha256 = "{number:064}"\nrate = 1.0\n'
        for number in range(4100)
    )
    file.write_text("".join(others) + file.read_text().replace("burst = 64", "burst = 5"))
    return KeysOfServer(file, free, limited)


def statuses(client: httpx.Client, key: str, body: bytes, requests: int) -> list[int]:
    client.headers["x-api-key"] = key
    replies = [client.post("/v1/classify", content=body) for _ in range(requests)]
    return [reply.status_code for reply in replies]


@pytest.mark.slow
@pytest.mark.parametrize("way", [TWO_DEVICES, FRONT_ENDS])
def test_processes_share_a_folder_of_photos_and_its_limit(tmp_path, way) -> None:
    decision = Decision(rejection=Rejection(threshold=1e9))
    bundle = write_bundle(tmp_path / "bundle", decision=decision)
    kept = tmp_path / "kept"
    settings = (f"keep={kept}", "keep_bytes=65536", "keep_sample=1")
    options = [f"--setting={setting}" for setting in settings]

    with serving(str(bundle), *options, *WAYS[way]) as client, ExitStack() as stack:
        connections = open_connections(client, 12, stack)  # which reach all processes
        for body, connection in zip(photos(12), connections, strict=True):
            assert classify_on(body, connection) == 200
        wait_for(lambda: results(client) == {"kept": 12})

    files = [file for file in kept.glob("*/*") if file.is_file()]
    assert 4096 * len(files) <= 65_536
    assert 7 <= len(read_records(kept)) == len(files) / 2


@pytest.mark.slow
@pytest.mark.parametrize("way", [TWO_DEVICES, FRONT_ENDS])
def test_processes_share_a_rate_limit_and_read_new_keys(
    bundle_path, tmp_path, jpeg, keys, way
) -> None:
    with serving(str(bundle_path), "--keys", str(keys.file), *WAYS[way]) as client:
        # The requests of a key are counted together.
        client.headers["x-api-key"] = keys.limited
        replies = [client.post("/v1/classify", content=jpeg) for _ in range(7)]
        assert [reply.status_code for reply in replies] == [200] * 5 + [429] * 2
        remaining = [reply.headers["ratelimit-remaining"] for reply in replies]
        assert remaining == ["4", "3", "2", "1", "0", "0", "0"]

        # All processes read other keys after a signal, and keep the count of those that stay.
        assert set(statuses(client, keys.free, jpeg, 6)) == {200}
        new = keys.replace_free(tmp_path)
        client.child.send_signal(signal.SIGHUP)
        wait_for(lambda: set(statuses(client, keys.free, jpeg, 6)) == {401})
        wait_for(lambda: set(statuses(client, new, jpeg, 6)) == {200})
        assert statuses(client, keys.limited, jpeg, 1) == [429]


@pytest.mark.slow
@pytest.mark.parametrize("way", [TWO_DEVICES, FRONT_ENDS])
def test_the_keys_in_use_stay_if_the_file_is_empty(bundle_path, jpeg, keys, way) -> None:
    """Also in processes that start now."""
    with serving(str(bundle_path), "--keys", str(keys.file), *WAYS[way]) as client:
        assert statuses(client, keys.limited, jpeg, 6)[-1] == 429
        keys.file.write_text("")
        client.child.send_signal(signal.SIGHUP)

        # On a busy machine, a later process can be ready before the request.
        refused = client.get("/livez")
        while refused.status_code in (200, 429):
            before = processes_of(client.child.pid)
            for process in before:
                os.kill(process, signal.SIGKILL)
            wait_for(lambda before=before: are_replaced(client.child.pid, before))
            body = bytes(5_000_000)  # nobody is left to read it
            refused = client.post("/v1/classify", content=body)

        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert refused.json() == describe_error(RUNTIME_DEAD).model_dump()
        wait_for(lambda: statuses(client, keys.limited, jpeg, 1) == [429])
