"""How processes of a server are forked: what they have, and what the end of the template changes."""

import json
import os
import subprocess
import sys

import pytest

from sopdeploy_service.devices.processes import UNKNOWN_CODE, Child
from sopdeploy_service.http.middleware import request_id
from tests.support.children import kills_itself


@pytest.mark.slow
def test_a_template_forks_processes_which_outlive_it_and_is_replaced() -> None:
    command = [sys.executable, "-m", "tests.service.devices.launched"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)

    assert json.loads(done.stdout) == {
        "facts": {
            "name": "front-0", "gpus": "7", "is_child": True, "is_imported": True,
            "sockets": 1,  # its own to the supervisor, not that of the template
            "threads": 1, "runtimes": [],  # a fork with threads or CUDA would not be safe
        },
        "code after the end of the template": -9, "is replaced": True, "still runs": True, "code": 3,
        "error without a subreaper": "ENOSYS", "error without a template": "EPIPE",
    }  # fmt: skip
    assert "launched_nowhere" in done.stderr


@pytest.mark.slow
def test_a_process_that_was_reaped_before_it_was_known_has_ended() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    child = Child(process.pid)

    assert child.poll() == UNKNOWN_CODE

    child.kill()  # sends no signal to a process that may have its id by now
    assert process.pid not in Child._running


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_requests_of_forks_have_different_ids() -> None:
    reading, writing = os.pipe()
    assert not kills_itself(lambda: os.write(writing, request_id({}).encode()))
    assert len({request_id({}), os.read(reading, 100).decode()}) == 2

    for file in (reading, writing):
        os.close(file)
