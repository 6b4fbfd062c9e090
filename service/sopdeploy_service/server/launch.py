"""Start a server process from another process of sopdeploy, or be such a process.

The new process gets its `LaunchConfig` as JSON in an environment variable.
"""

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

import pydantic

from sopdeploy.errors import SopdeployError
from sopdeploy_service.settings import Settings

WORKER_VARIABLE = "SOPDEPLOY_WORKER"  # has the launch config
STDERR, USER_ERROR = 2, 2
HAS_TERMINAL = os.isatty(STDERR)  # at the start
BEAT_SECONDS = 0.1  # interval of uvicorn's ticks


class LaunchConfig(pydantic.BaseModel):
    """What a new server process gets: its *name*, bundles and settings, and inherited file descriptors.

    The process ends when the pipe *lifeline* closes.
    """

    name: str
    sources: tuple[str, ...]
    settings: Settings
    lifeline: int


Config = TypeVar("Config", bound=LaunchConfig)


def terminal_is_closed() -> bool:
    """Tell whether the terminal of this process is gone: its SIGHUP ends a server, another one reloads it."""
    return HAS_TERMINAL and not os.isatty(STDERR)


def start_process(
    module: str,
    config: LaunchConfig,
    files: Sequence[int],
    variables: Mapping[str, str] | None = None,
    **output: Any,
) -> subprocess.Popen[str]:
    """Start *module* with *config*, the inherited *files* and additional environment *variables*.

    *output* says where its output goes, as for `subprocess.Popen`.
    """
    return subprocess.Popen(
        [sys.executable, "-m", module],
        text=True,
        **output,
        start_new_session=True,  # Ctrl-C reaches the parent only, which forwards it
        pass_fds=files,
        env={**os.environ, **(variables or {}), WORKER_VARIABLE: config.model_dump_json()},
    )


def run_program(serve: Callable[[Config], int], config_type: type[Config]) -> int:
    """Call *serve* with the launch config of this process; return the exit code.

    The process gets SIGTERM when the parent ends. An error is printed as one line.
    """
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a server reloads on it when it is ready
    config = config_type.model_validate_json(os.environ.pop(WORKER_VARIABLE))

    def stop_with_parent() -> None:
        os.read(config.lifeline, 1)  # returns when the parent closes the pipe, or dies
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_with_parent, name="lifeline", daemon=True).start()
    try:
        return serve(config)
    except SopdeployError as problem:
        sys.stderr.write(f"error: device {config.name}: {problem} [{problem.code}]\n")
        return USER_ERROR


def start_task(tasks: set[asyncio.Task[None]], work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """Start *work* on the running event loop; *tasks* keeps it until it ends, as the loop alone does not."""
    task = asyncio.get_running_loop().create_task(work)
    tasks.add(task)
    task.add_done_callback(tasks.discard)
    return task
