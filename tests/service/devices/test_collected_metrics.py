"""Pages of metrics between processes: what cannot be collected, or comes too late, stays nowhere."""

import asyncio
import errno
import gc
import os
import socket
from pathlib import Path

import pytest

from sopdeploy.bundle.sealed import create_memory
from sopdeploy_service.devices import control, supervisor
from sopdeploy_service.devices.processes import Process
from sopdeploy_service.settings import load_settings
from tests.service.devices.test_supervisor import make_device_server
from tests.support.children import num_open_files


def test_a_page_of_metrics_that_comes_too_late_is_closed() -> None:
    ours, theirs = control.socket_pair()
    with ours, theirs:
        server = make_device_server(theirs)
        file = create_memory("late page", [b"page"])
        assert control.send_message(ours, control.PAGE, b"", file)

        os.close(file)
        server._receive()
        open_files = map(os.path.realpath, Path("/proc/self/fd").iterdir())

        assert not [path for path in open_files if "late page" in path]


@pytest.mark.parametrize("function", ["socketpair", "merge_metrics"])
def test_metrics_that_cannot_be_collected_leave_no_file_open(monkeypatch, function) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    async def scenario() -> bool:
        settings = load_settings(front_ends=0)
        process = Process("cpu", {}, settings, "cpu", 0)
        ours, theirs = control.socket_pair()
        with ours, theirs, socket.socket() as listener:
            server = supervisor.Supervisor([], settings, [process], listener)
            process.reset(ours)
            assert control.send_message(theirs, control.METRICS)
            gc.collect()  # closes what earlier tests left
            before = num_open_files()

            module = control.socket if function == "socketpair" else supervisor
            monkeypatch.setattr(module, function, refuse)
            server._receive(process)
            await asyncio.wait(server._tasks)
            return num_open_files() <= before

    assert asyncio.run(scenario())
