"""Several worker processes behind one port: restarts, shutdown and joint metrics."""

import contextlib
import http.client
import os
import re
import shutil
import signal
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import httpx
import pytest

from sopdeploy.errors import ConfigError
from sopdeploy_service import settings as usable
from sopdeploy_service.front_ends import processes
from sopdeploy_service.front_ends.control import merge_metrics
from sopdeploy_service.front_ends.processes import SERVER, list_processes, visible_devices
from sopdeploy_service.settings import load_settings
from tests.service.children import children_of, is_alive, line_of, module_of, spawn


def test_two_processes_share_a_port_and_dead_or_hanging_ones_are_replaced(
    bundle_path: Path, jpeg, until
) -> None:
    options = ("--devices", "cpu,cpu", "--threads", "1")
    with spawn(str(bundle_path), *options) as child, ExitStack() as stack:
        stack.callback(child.kill)
        found = re.fullmatch(r"ready: (\S+)  (\S+)\n", line_of(child))
        assert found, child.communicate(timeout=20)
        url = found[1]
        for pid in children_of(child.pid):
            assert b"CUDA_VISIBLE_DEVICES=" in Path(f"/proc/{pid}/environ").read_bytes().split(
                b"\0"
            )  # no GPU
        clients = [stack.enter_context(httpx.Client(base_url=url, timeout=60)) for _ in range(8)]
        for client in clients * 2:  # each keeps its connection
            assert client.post("/v1/classify", content=jpeg).status_code == 200
        page = clients[0].get("/metrics").text
        answered = r'sopdeploy_requests_total\{code="200",.*process="\S+",route="/v1/classify"\} (\S+)'
        assert re.findall(answered, page) == ["8.0", "8.0"]

        def send_to_the_oldest(number: signal.Signals) -> None:
            before = children_of(child.pid)
            os.kill(before[0], number)
            until(lambda: not is_alive(before[0]))
            # A connection that the supervisor passes on before it notices the death is reset.
            until(lambda: len(set(children_of(child.pid)) - set(before)) == 1)
            codes = {httpx.post(f"{url}/v1/classify", content=jpeg).status_code for _ in range(5)}
            assert codes == {200}

        send_to_the_oldest(signal.SIGKILL)
        up = re.compile(r"^sopdeploy_worker_up\{.*\} 1\.0$", re.MULTILINE)
        until(lambda: len(up.findall(httpx.get(f"{url}/metrics").text)) == 2)
        send_to_the_oldest(signal.SIGSTOP)
        orphans = children_of(child.pid)
        child.kill()
        until(lambda: not any(is_alive(process) for process in orphans))


def classify_on(jpeg: bytes, connection: http.client.HTTPConnection) -> tuple[int, str | None]:
    """Return the status and `Retry-After` of a request on *connection*."""
    connection.request("POST", "/v1/classify", jpeg)
    response = connection.getresponse()
    response.read()
    return response.status, response.headers["retry-after"]


def test_front_ends_and_their_inference_process_are_replaced_one_by_one(
    bundle_path: Path, tmp_path: Path, jpeg, until
) -> None:
    bundle = shutil.copytree(bundle_path, tmp_path / bundle_path.name)
    options = (
        "--front-ends",
        "2",
        "--threads",
        "1",
        "--setting",
        "sandbox=required",
    )
    with spawn(str(bundle), *options) as child, ExitStack() as stack:
        stack.callback(child.kill)
        found = re.fullmatch(r"ready: http://(\S+)  (\S+)\n", line_of(child))
        assert found, child.communicate(timeout=20)

        def connect() -> http.client.HTTPConnection:
            return stack.enter_context(contextlib.closing(http.client.HTTPConnection(found[1], timeout=60)))

        classify = partial(classify_on, jpeg)
        connections = [connect() for _ in range(8)]
        assert {classify(connection) for connection in connections} == {(200, None)}
        for path in ("/", "/docs", "/errors", "/openapi.json", "/info", "/v2", "/v2/models/tiny", "/livez"):
            assert httpx.get(f"http://{found[1]}{path}").status_code == 200  # no file is read for it
        url = f"http://{found[1]}"
        page = httpx.get(f"{url}/metrics").text
        assert (
            re.findall(
                r'sopdeploy_requests_total\{code="200",.*process="default:\d",.*classify"\} (\S+)', page
            )
            == ["4.0"] * 2
        )
        first = children_of(child.pid)
        fronts = [pid for pid in first if module_of(pid).endswith("front_ends.worker")]
        (inference,) = set(first) - set(fronts)
        os.kill(fronts[0], signal.SIGKILL)
        until(lambda: not is_alive(fronts[0]))
        kept = []
        for connection in connections:
            with contextlib.suppress(ConnectionError):
                assert classify(connection) == (200, None)
                kept.append(connection)
        assert len(kept) == 4  # the others were connected to the killed process
        until(lambda: len(set(children_of(child.pid)) - set(first)) == 1)
        moved = bundle.rename(tmp_path / "moved")
        os.kill(inference, signal.SIGKILL)
        answers = [classify(connection) for connection in [*kept, connect(), connect()]]
        assert set(answers) <= {(503, "5"), (200, None)}  # and no connection is lost
        until(lambda: (503, "5") in {classify(connection) for connection in kept})
        reason = f"{bundle}: no bundle here; a bundle is a folder with a manifest.json"
        expected = {"status": "runtime_restarting", "reason": reason}  # of either front end, in time
        until(lambda: httpx.get(f"{url}/readyz").json() == expected)
        assert httpx.get(f"{url}/livez").status_code == 200
        moved.rename(bundle)
        for process in children_of(child.pid):
            os.kill(process, signal.SIGHUP)  # of a program that signals all processes
        until(lambda: httpx.get(f"{url}/readyz").json() == {"status": "ok"})
        assert {classify(connection) for connection in kept} == {(200, None)}
        assert len(set(children_of(child.pid)) & set(fronts)) == 1  # the other one had been killed
        child.send_signal(signal.SIGTERM)
        assert child.wait(60) == 0


# Cores, content of cpu.max, settings -> number of front ends of each device.
AUTO: dict[str, tuple[int, str | None, dict[str, object], int]] = {
    "16 cores": (16, None, {}, 4),
    "a quota of 8 cores": (16, "800000 100000\n", {}, 2),
    "a quota of half a core": (16, "50000 100000\n", {}, 1),
    "many cores and two devices": (128, None, {"devices": "0,1"}, 4),
}


@pytest.mark.parametrize("case", AUTO)
def test_auto_is_a_front_end_per_four_cores(case: str, monkeypatch, tmp_path) -> None:
    cores, quota, given, expected = AUTO[case]
    file = tmp_path / "cpu.max"
    if quota is not None:
        file.write_text(quota)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setattr(usable, "CPU_QUOTA", file)
    assert processes.count_front_ends(load_settings(front_ends="auto", **given)) == expected
    required = load_settings(front_ends="auto", sandbox="required", **given)
    if expected == 1:
        with pytest.raises(ConfigError, match="set front_ends=2 or more"):
            processes.count_front_ends(required)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"front_ends": 4}, [4, 4, 4, 4]),
        ({"front_ends": 2, "devices": "0,1"}, [4, 4, 4, 4]),
        ({"front_ends": 2, "decoders": 3}, [3, 3]),
        ({"devices": "0,cpu"}, [8, "auto"]),
    ],
)
def test_front_ends_and_devices_divide_the_cores_among_their_decoders(given, expected, monkeypatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    settings = load_settings(**given)
    processes = [process for process in list_processes(settings) if process.kind == SERVER]
    assert [process.settings.get("decoders", settings.decoders) for process in processes] == expected


# Settings, front ends -> shares, or the end of the error message.
SHARES: dict[str, tuple[dict[str, object], int, dict[str, int] | str]] = {
    "two": ({}, 2, {"queue_size": 128, "max_upload_bytes": 128_000_000}),
    "nine": ({}, 9, "set queue_size=288 or start fewer front ends"),
    "twelve": ({}, 12, "set queue_size=384, max_upload_bytes=274285716 or start fewer front ends"),
    "twelve for small requests": (
        {"max_images": 8, "max_body_bytes": 8_000_000},
        12,
        {"queue_size": 21, "max_upload_bytes": 21_333_333},
    ),
}


@pytest.mark.parametrize("case", SHARES)
def test_the_share_of_a_front_end_holds_the_largest_request(case: str) -> None:
    given, count, expected = SHARES[case]
    settings = load_settings(**given)
    if isinstance(expected, str):
        with pytest.raises(ConfigError, match=f"{count} front ends share .* {expected}$"):
            processes.share_limits(settings, count)
        return
    assert processes.share_limits(settings, count) == expected
    load_settings(**given, **expected)  # a front end accepts its settings


IDS = "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", "MIG-b5a4e0c9-1c2d-5a30-9b0a-3a3b8a3f5c11"
VISIBLE: dict[str, tuple[str, str | None, dict[str, str] | None]] = {
    "a number": ("1", None, {"CUDA_VISIBLE_DEVICES": "1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}),
    "a UUID": (IDS[0], None, {"CUDA_VISIBLE_DEVICES": IDS[0], "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}),
    "the cpu": ("cpu", "2,3", {"CUDA_VISIBLE_DEVICES": ""}),
    "a position": ("1", "2,3", {"CUDA_VISIBLE_DEVICES": "3"}),
    "a listed UUID": (IDS[0], f"{IDS[1]}, {IDS[0]}", {"CUDA_VISIBLE_DEVICES": IDS[0]}),
    "a number, not a position": ("2", "2,3", None),
    "a UUID that is not listed": (IDS[0], IDS[1], None),
    "a position after an invalid entry": ("1", "0,-1,1", None),
}


@pytest.mark.parametrize("case", VISIBLE)
def test_a_process_sees_its_device_only_and_chooses_from_an_inherited_list(case: str) -> None:
    device, inherited, expected = VISIBLE[case]
    assert load_settings(devices=device).devices == (device,)
    environment = {} if inherited is None else {"CUDA_VISIBLE_DEVICES": inherited}
    if expected is not None:
        assert visible_devices(device, environment) == expected
        return
    with pytest.raises(ConfigError, match=rf"devices: {device} is not among the \d GPUs of CUDA_VISIBLE_DEV"):
        visible_devices(device, environment)


def test_a_missing_bundle_is_a_one_line_error_with_exit_code_2(tmp_path) -> None:
    child = spawn(str(tmp_path), "--setting", "devices=cpu")
    out, err = child.communicate(timeout=60)
    assert (child.returncode, out) == (2, "")
    assert err.count("no bundle here") >= 1
    assert "Traceback" not in err


def test_joint_metrics_have_every_sample_and_the_workers_that_are_down() -> None:
    page = (
        b"# HELP a_total x\n# TYPE a_total counter\n"
        b'a_total{route="/"} 2.0\n# TYPE b histogram\n# HELP b y\nb_bucket{le="1.0"} 1.0\n'
        b'b_bucket{le="+Inf"} 3.0\nb_count 3.0\nb_sum 4.5\n'
    )
    text = merge_metrics({"0": page, "1": page, "2": b""}, {}).decode()
    for line in (
        'a_total{process="0",route="/"} 2.0',
        'a_total{process="1",route="/"} 2.0',
        'b_bucket{le="+Inf",process="1"} 3.0',
        'b_sum{process="0"} 4.5',
        'sopdeploy_worker_up{process="1"} 1.0',
        'sopdeploy_worker_up{process="2"} 0.0',
    ):
        assert line in text, text
    assert text.count("# TYPE a_total counter") == 1
