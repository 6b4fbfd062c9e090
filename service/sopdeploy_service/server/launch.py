"""Start a server process from another process of sopdeploy, or be such a process.

The new process gets its `LaunchConfig` as JSON in an environment variable.
"""

import asyncio
import os
import re
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO, TypeVar, cast

import pydantic

from sopdeploy.errors import SopdeployError
from sopdeploy_service.settings import Settings

SERVER_MODULE = "sopdeploy_service.server.process"
MAX_LOG_LINES = 1000
STOP_SECONDS = 10.0  # beyond the drain, before the process is killed
_ERROR = re.compile(r"error: device \S+: (.*) \[(\w+)\]")
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


class BackgroundServer:
    """A server in another process, which stops with this object, `stop`, or this process.

    Attributes:
        url: Address of the server, for example `http://127.0.0.1:8000`.
        bundles: Names of the served bundles.
    """

    def __init__(self, sources: Sequence[str | Path], settings: Settings) -> None:
        """Start the server and wait until its probes are verified and its port is open.

        Raises `ConfigError` if it cannot listen, and what `find_bundles`, `open_bundle` and `load_model`
        raise.
        """
        self.url, self.bundles = f"http://{settings.host}:{settings.port}", tuple[str, ...]()
        self._lines: deque[str] = deque(maxlen=MAX_LOG_LINES)
        self._has_started = threading.Event()  # or failed to
        self._drain_seconds = settings.drain_seconds
        lifeline, self._lifeline = os.pipe()  # closed when this process ends, however it ends
        config = LaunchConfig(
            name="background",
            sources=tuple(str(source) for source in sources),
            settings=settings,
            lifeline=lifeline,
        )
        output: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "errors": "replace"}
        try:
            self._process = start_process(SERVER_MODULE, config, [lifeline], **output)
        finally:
            os.close(lifeline)
        self._reader = threading.Thread(target=self._read_output, name="server log", daemon=True)
        self._reader.start()
        try:
            self._has_started.wait()
        except BaseException:  # Ctrl-C while the server starts
            self.stop()
            raise
        if not self.bundles:
            self.stop()
            raise self._error()

    def __enter__(self) -> "BackgroundServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def __repr__(self) -> str:
        state = "running" if self.running else "stopped"
        return f"<BackgroundServer {self.url}, {state}: {', '.join(self.bundles)}>"

    @property
    def running(self) -> bool:
        """Whether the process is alive."""
        return self._process.poll() is None

    @property
    def log(self) -> str:
        """The last lines that the server has printed and logged."""
        return "".join(self._lines)

    def stop(self) -> None:
        """Finish the requests in progress, close the port and end the process; later calls do nothing."""
        if self._lifeline < 0:
            return
        if self.running:
            self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(self._drain_seconds + STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._lifeline)
        self._lifeline = -1
        self._reader.join()

    def _read_output(self) -> None:
        with cast(TextIO, self._process.stdout) as output:
            for line in output:
                self._lines.append(line)
                if line.startswith("ready: "):
                    _, self.url, *bundles = line.split()
                    self.bundles = tuple(bundles)
                    self._has_started.set()
        self._has_started.set()

    def _error(self) -> SopdeployError:
        """Rebuild the error that ended the process from its log."""
        errors = [match for line in self._lines if (match := _ERROR.search(line))]
        if not errors:
            last = self._lines[-1].strip() if self._lines else "no message"
            return SopdeployError(f"{self.url}: the server ended with {self._process.returncode} ({last})")
        message, code = errors[-1].groups()
        kinds = {kind.code: kind for kind in SopdeployError.__subclasses__()}
        return kinds.get(code, SopdeployError)(message)
