"""How processes of a server are forked: what they have, and what the end of the template changes."""

import json
import subprocess
import sys


def test_a_template_forks_processes_which_outlive_it_and_is_replaced() -> None:
    command = [sys.executable, "-m", "tests.service.devices.launched"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert json.loads(done.stdout) == {
        "facts": {
            "name": "front-0", "gpus": "7", "is_child": True, "is_imported": True,
            "sockets": 1,  # its own to the supervisor, not that of the template
            "threads": 1, "runtimes": [],  # a fork with threads or CUDA would not be safe
        },
        "code after SIGKILL": -9, "code after SIGSTOP": -9, "templates": 3, "still runs": True, "code": 3,
        "error without a subreaper": "ENOSYS", "error without a template": "EPIPE",
    }  # fmt: skip
    assert "launched_nowhere" in done.stderr
