"""Front ends that share a device process, as processes: failures of each kind, the queue limit, the drain."""

import asyncio
import os
import re
import resource
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sopdeploy_service.devices import control, device_server, processes, supervisor
from sopdeploy_service.devices.processes import LaunchConfig, Process
from sopdeploy_service.devices.shared_keys import SharedKeys
from sopdeploy_service.http.api_keys import STATE_BYTES, Key
from sopdeploy_service.runtime.onnxruntime import CudaOnnxRuntime
from sopdeploy_service.server.process import choose_front_ends
from sopdeploy_service.settings import Settings, load_settings
from tests.service.devices import gated_device
from tests.support.children import (
    FRONT_ENDS,
    START_SECONDS,
    WAYS,
    ServerClient,
    is_alive,
    num_open_files,
    processes_of,
    serving,
    spawn,
)
from tests.support.service import wait_for, write_bundle


def process_of(client: ServerClient, name: str) -> int:
    """Return the id of the process with the *name* that the supervisor gave it, 0 while there is none."""
    return next(
        (child for child, one in processes_of(client.child.pid).items() if one == name), 0
    )


def num_admitted(client: ServerClient, process: str = "") -> float:
    """Return how many images all processes, or *process*, have admitted and not answered."""
    of_process = f'process="{process}"' if process else ""
    pattern = rf"^sopdeploy_queue_depth{{.*{of_process}.*}} (\S+)"
    return sum(map(float, re.findall(pattern, client.get("/metrics").text, re.M)))


def num_memories(process: int) -> int:
    """Count the files in memory that *process* has open: slots of channels, limits."""
    found = 0
    for file in Path(f"/proc/{process}/fd").iterdir():
        with suppress(OSError):  # it was closed meanwhile
            found += str(file.readlink()).startswith("/memfd:")
    return found


def status_of(client: ServerClient, jpeg: bytes) -> int:
    return client.post("/v1/classify", content=jpeg).status_code


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_an_engine_that_ends_or_hangs_is_replaced_behind_front_ends(
    bundle_path, tmp_path, jpeg, monkeypatch, number
) -> None:
    gate = tmp_path / "gate"
    monkeypatch.setenv("GATE", str(gate))
    options = WAYS[FRONT_ENDS]

    with (
        serving(str(bundle_path), *options, program=gated_device.SERVE) as client,
        ThreadPoolExecutor(8) as pool,
    ):
        servers = {process_of(client, f"front-{number}") for number in range(2)}
        sent = [pool.submit(client.post, "/v1/classify", content=jpeg) for _ in range(8)]
        wait_for(lambda: num_admitted(client) == 8)
        device_process = process_of(client, "engine")
        os.kill(device_process, number)

        for reply in sent:
            refused = reply.result()
            assert (refused.status_code, refused.json()["code"]) == (503, "runtime_dead")
            assert int(refused.headers["retry-after"]) >= 1
        wait_for(lambda: not is_alive(device_process))
        gate.touch()
        # Of both front ends
        wait_for(lambda: [status_of(client, jpeg) for _ in range(8)] == [200] * 8)

        assert {
            client.get(path).status_code for path in ("/livez", "/readyz") for _ in range(2)
        } == {200}
        assert {process_of(client, f"front-{number}") for number in range(2)} == servers

        client.child.send_signal(signal.SIGTERM)
        assert client.child.wait(START_SECONDS) == 0


def test_a_front_end_is_alive_but_not_ready_while_its_engine_starts(tmp_path, jpeg) -> None:
    bundle = write_bundle(tmp_path / "bundles")
    with serving(str(bundle), *WAYS[FRONT_ENDS]) as client:
        assert status_of(client, jpeg) == 200

        kept = [
            client.child.pid,
            *(process_of(client, f"front-{number}") for number in range(2)),
        ]
        files = [num_memories(process) for process in kept]
        device_process = process_of(client, "engine")
        gone = bundle.rename(tmp_path / "gone")  # so that no later device process is ready
        os.kill(device_process, signal.SIGSTOP)
        os.kill(device_process, signal.SIGKILL)
        wait_for(lambda: client.get("/readyz").json()["status"] == "engine_starting")

        assert client.get("/livez").status_code == 200

        reply = client.post("/v1/classify", content=jpeg)
        assert (reply.status_code, reply.json()["code"]) == (503, "runtime_dead")

        gone.rename(bundle)
        wait_for(lambda: [status_of(client, jpeg) for _ in range(8)] == [200] * 8)
        wait_for(lambda: [num_memories(process) for process in kept] == files)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_front_end_that_ends_or_hangs_is_replaced(
    bundle_path, tmp_path, jpeg, monkeypatch, number
) -> None:
    gate = tmp_path / "gate"
    monkeypatch.setenv("GATE", str(gate))
    options = [*WAYS[FRONT_ENDS], "--setting=queue_size=4", "--setting=max_images=4"]

    with (
        serving(str(bundle_path), *options, program=gated_device.SERVE) as client,
        ThreadPoolExecutor(9) as pool,
    ):
        # The limit is that of both front ends together; each may admit its half, whatever the
        # other has.
        sent = [pool.submit(status_of, client, jpeg) for _ in range(9)]
        wait_for(lambda: num_admitted(client) + sum(one.done() for one in sent) == 9)
        refused = [one for one in sent if one.done()]
        waiting = [one for one in sent if not one.done()]

        assert {one.result() for one in refused} == {429}
        assert 4 <= len(waiting) <= 7

        # Both accept from one socket, so either may have admitted all that wait.
        by_name = {name: num_admitted(client, name) for name in ("front-0", "front-1")}
        assert sum(by_name.values()) == len(waiting)
        name = max(by_name, key=lambda one: by_name[one])
        victim = process_of(client, name)
        device_process = process_of(client, "engine")
        os.kill(victim, number)
        wait_for(lambda: not is_alive(victim))
        wait_for(lambda: process_of(client, name) not in {0, victim})
        gate.touch()
        statuses = [one.exception() or one.result() for one in waiting]

        # Those of the other front end
        assert statuses.count(200) == len(waiting) - by_name[name]
        wait_for(lambda: status_of(client, jpeg) == 200)
        files = [("image", jpeg)] * 4
        # Nothing is left
        wait_for(lambda: client.post("/v1/classify", files=files).status_code == 200)

        assert process_of(client, "engine") == device_process


def test_a_signal_to_every_process_completes_the_admitted_requests(
    bundle_path, tmp_path, jpeg, monkeypatch
) -> None:
    gate = tmp_path / "gate"
    monkeypatch.setenv("GATE", str(gate))
    options = (*WAYS[FRONT_ENDS], "--setting", "drain_seconds=60")

    with (
        serving(str(bundle_path), *options, program=gated_device.SERVE) as client,
        ThreadPoolExecutor(16) as pool,
    ):
        sent = [pool.submit(status_of, client, jpeg) for _ in range(16)]
        wait_for(lambda: num_admitted(client) == 16)
        processes = [process_of(client, name) for name in ("engine", "front-0", "front-1")]
        for process in (client.child.pid, *processes):  # as systemd does
            os.kill(process, signal.SIGTERM)
        wait_for(lambda: client.get("/readyz").status_code == 503)
        gate.touch()

        assert [one.result() for one in sent] == [200] * 16
        assert client.child.wait(START_SECONDS) == 0
        assert not any(map(is_alive, processes))


@pytest.mark.slow
def test_front_ends_serve_the_models_before_until_the_supervisor_can_send_channels(
    tmp_path, jpeg
) -> None:
    names = ("front-0", "front-1")
    link = tmp_path / "latest"
    link.symlink_to(write_bundle(tmp_path / "first"))

    def digest(client: ServerClient) -> str:
        return client.post("/v1/classify", content=jpeg).headers["x-model-digest"]

    with serving(str(link), *WAYS[FRONT_ENDS], "--log", "json") as client:
        first = digest(client)
        before = {name: process_of(client, name) for name in names}
        supervisor = client.child.pid
        soft, hard = resource.prlimit(supervisor, resource.RLIMIT_NOFILE)

        # After the reload, the supervisor has no free descriptor for the channels to the device process.
        link.unlink()
        link.symlink_to(write_bundle(tmp_path / "second", seed=1))
        resource.prlimit(supervisor, resource.RLIMIT_NOFILE, (3, hard))
        client.child.send_signal(signal.SIGHUP)
        assert any('"reloaded"' in line for line in client.child.stderr)

        # Later there is one, so both front ends get their channel.
        resource.prlimit(supervisor, resource.RLIMIT_NOFILE, (soft, hard))
        wait_for(lambda: first not in {digest(client) for _ in range(8)})
        assert {name: process_of(client, name) for name in names} == before


@pytest.mark.slow
def test_no_process_survives_the_supervisor_also_if_it_is_stopped(bundle_path, jpeg) -> None:
    with serving(str(bundle_path), *WAYS[FRONT_ENDS]) as client:
        assert status_of(client, jpeg) == 200

        processes = [process_of(client, name) for name in ("engine", "front-0", "front-1")]
        for process in processes[:2]:
            os.kill(process, signal.SIGSTOP)
        client.child.kill()
        wait_for(lambda: not any(map(is_alive, processes)))


# Settings, cores, whether a GPU can be used -> front ends
NUMBERS: dict[str, tuple[dict[str, Any], int, bool, int]] = {
    "a GPU": ({}, 16, True, 8),
    "few cores": ({}, 3, True, 2),
    "many cores": ({}, 64, True, 32),
    "a CPU": ({}, 16, False, 0),
    "a runtime of a CPU beside a GPU": ({"runtime": "onnxruntime-cpu"}, 16, True, 0),
    "a device that is a CPU": ({"devices": ("0", "cpu")}, 16, True, 0),
    "a number": ({"front_ends": 3}, 16, False, 3),
    "one process": ({"front_ends": 0}, 16, True, 0),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_the_number_of_front_ends_follows_the_cores(monkeypatch, name) -> None:
    settings, cores, has_gpu, expected = NUMBERS[name]
    monkeypatch.setattr("sopdeploy_service.server.process.usable_cores", lambda: cores)
    monkeypatch.setattr(CudaOnnxRuntime, "is_set_up", lambda: has_gpu)

    assert choose_front_ends(Settings(**settings)) == expected


def test_each_process_is_counted_once_in_the_memory_at_rest(monkeypatch) -> None:
    sizes = {os.getppid(): 1, "self": 10, 71: 100, 72: 1_000}
    monkeypatch.setattr(device_server, "resident_bytes", lambda process="self": sizes[process])
    config = LaunchConfig(
        name="front-0", device=None, variables={}, sources=(), settings=Settings(), supervisor=1,
        front_ends=3, position=0, num_servers=3, device_processes=(71, 72),
    )  # fmt: skip

    assert device_server.bytes_at_rest(config) == 1 + 3 * 10 + 100 + 1_000


def test_a_front_end_keeps_the_keys_that_come_before_its_first_channel(monkeypatch) -> None:
    monkeypatch.setattr(device_server, "DeviceChannel", lambda *arguments: arguments)
    monkeypatch.setattr(
        device_server,
        "RemoteRegistry",
        lambda channels, _: SimpleNamespace(channels=channels, lost=set()),
    )

    # The keys of the start, and of two reloads while the front end waits for a device process.
    first, *later = [
        SharedKeys([Key(name=name, sha256="0" * 64)])
        for name in ("start", "reload", "last-reload")
    ]
    config = LaunchConfig(
        name="front-0", device=None, variables={}, sources=(), settings=Settings(), supervisor=1,
        front_ends=1, position=0, num_servers=1, device_processes=(), keys=first.files[0], limits=first.files[1],
    )  # fmt: skip
    ours, theirs = control.socket_pair()

    with ours, theirs, socket.socket() as connection:
        for keys in later:
            assert control.send_message(ours, control.KEYS, b"", *keys.files)
            keys.close()
        assert control.send_message(ours, control.CHANNEL, b"engine", connection.fileno())

        num_open = num_open_files()
        registry, config = device_server.wait_for_device(config, theirs)
        [(device_process, end)] = registry.channels
        end.close()
        assert num_open_files() == num_open  # it has closed those of the earlier keys

    assert device_process == "engine"
    assert device_server.read_shared_keys(config.keys) == tuple(later[-1].ring.keys)
    assert device_server.map_states(config.limits).nbytes == STATE_BYTES


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--set", "front_ends=2")])
def test_a_gpu_that_cannot_be_used_here_is_an_error(bundle_path, monkeypatch, options) -> None:
    monkeypatch.setenv("SOPDEPLOY_RUNTIME", "auto")
    with spawn(str(bundle_path), "--devices", "0", *options) as child:
        out, err = child.communicate(timeout=START_SECONDS)

    assert (child.returncode, out) == (2, "")
    assert "devices: 0: " in err


def test_a_front_end_knows_the_device_processes_that_were_started_before_it(
    monkeypatch,
) -> None:
    device_processes: list[tuple[int, ...]] = []

    async def start(config: processes.LaunchConfig, *_files: int) -> SimpleNamespace:
        device_processes.append(config.device_processes)
        await asyncio.sleep(0)  # the other processes wait to be started
        return SimpleNamespace(pid=len(device_processes), poll=lambda: None)

    async def scenario() -> None:
        settings = load_settings(front_ends=2)
        devices = [Process(str(number), {}, settings, "cpu", number) for number in range(2)]
        with socket.socket() as listener:
            server = supervisor.Supervisor([], settings, devices, listener)
            server._loop = asyncio.get_running_loop()
            server._shared = -1
            server._keys = SharedKeys(())
            monkeypatch.setattr(server._template, "start", start)
            started = [*devices, *server._front_ends]
            tasks = [asyncio.create_task(server._supervise(process)) for process in started]
            while not all(process.child for process in started):
                await asyncio.sleep(0)
                assert not any(task.done() for task in tasks)
            for process, task in zip(started, tasks, strict=True):
                task.cancel()
                server._close_control(process)
            server._keys.close()

    asyncio.run(scenario())
    assert device_processes == [(), (), (1, 2), (1, 2)]
