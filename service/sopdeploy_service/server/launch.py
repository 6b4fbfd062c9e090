"""Start a server process from another process of sopdeploy, and be such a process.

The new process gets its launch config, JSON with the settings, the bundles and the inherited file
descriptors, in an environment variable.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sopdeploy.errors import SopdeployError
from sopdeploy_service.settings import WORKER_VARIABLE

STDERR, USER_ERROR = 2, 2
HAS_TERMINAL = os.isatty(STDERR)  # at the start
EXIT_RUNTIME_DEAD = 70  # EX_SOFTWARE; a supervisor should restart the process


def terminal_is_closed() -> bool:
    """Tell whether the terminal of this process is gone: its SIGHUP ends a server, another one reloads it."""
    return HAS_TERMINAL and not os.isatty(STDERR)


def start_process(
    module: str,
    launch_config: Mapping[str, Any],
    files: Sequence[int],
    variables: Mapping[str, str] | None = None,
    **output: Any,
) -> subprocess.Popen[str]:
    """Start *module* with *launch_config*, the inherited *files* and additional environment *variables*.

    *output* says where its output goes, as for `subprocess.Popen`. The process ends when the pipe `lifeline`
    of *launch_config* closes.
    """
    return subprocess.Popen(
        [sys.executable, "-m", module],
        text=True,
        **output,
        start_new_session=True,  # Ctrl-C reaches the parent only, which forwards it
        pass_fds=files,
        env={**os.environ, **(variables or {}), WORKER_VARIABLE: json.dumps(launch_config)},
    )


def run_program(serve: Callable[[Mapping[str, Any]], int]) -> int:
    """Call *serve* with the launch config of this process; return the exit code.

    The process gets SIGTERM when the parent ends. An error is printed as one line.
    """
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a server reloads on it when it is ready
    launch_config: dict[str, Any] = json.loads(os.environ.pop(WORKER_VARIABLE))

    def stop_with_parent() -> None:
        os.read(launch_config["lifeline"], 1)  # returns when the parent closes the pipe, or dies
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_with_parent, name="lifeline", daemon=True).start()
    try:
        return serve(launch_config)
    except ConnectionError:  # another process of the server has ended
        return 1
    except SopdeployError as problem:
        sys.stderr.write(f"error: device {launch_config['name']}: {problem} [{problem.code}]\n")
        return USER_ERROR
