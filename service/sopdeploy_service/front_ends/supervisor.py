"""`serve --devices 0,1 --front-ends 4`: processes behind one port, restarted when they die.

A runtime belongs to one process, so several GPUs need several processes: one per device, or an inference
process and several front ends per device. `balancing` distributes the connections over the processes that
serve HTTP and opens those over which their metrics are collected.

A front end and its inference process share a channel and memory for pixels. When an inference process dies,
its front ends answer what they can, end, and are started again with the new one.
"""

import contextlib
import itertools
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, TextIO, cast

from sopdeploy.errors import ConfigError
from sopdeploy_service.front_ends.balancing import Group, inherited_files
from sopdeploy_service.front_ends.limits import count_front_ends, share_limits
from sopdeploy_service.front_ends.memory import create_memory_file
from sopdeploy_service.front_ends.monitoring import group_health_app
from sopdeploy_service.front_ends.rate_limits import SharedSpending
from sopdeploy_service.observability import logs
from sopdeploy_service.server.health_port import run_in_thread
from sopdeploy_service.server.launch import USER_ERROR, start_process
from sopdeploy_service.server.sockets import bind, bind_group, url
from sopdeploy_service.settings import Settings

STABLE_SECONDS = 60.0  # a process that ran this long is restarted without delay
MAX_RESTART_DELAY_SECONDS = 30.0
RELAY_SECONDS = 0.05  # how long a connection to a process that is not running waits at most
DEFAULT = "default"  # name of the only device, if the settings name none
VISIBLE, ORDER = "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"

log = logging.getLogger("sopdeploy.supervisor")


def serve(sources: Sequence[str | Path], settings: Settings) -> int | None:
    """Serve the bundles at *sources* with several processes; return None if *settings* need only one."""
    count = count_front_ends(settings) * max(1, len(settings.devices))
    if not settings.devices and count == 1:
        return None
    with ExitStack() as stack:
        listeners = bind_group(settings.host, settings.port, count)
        for listener in listeners:
            stack.enter_context(listener)
        stack.enter_context(logs.configured(settings))
        return Supervisor(sources, settings, listeners).run()


@dataclass(slots=True)
class Worker:
    """A process; *name* is unique even if several processes share a device.

    *variables* are its additional environment variables, *settings* the settings in which it differs from
    other processes.
    """

    name: str
    variables: Mapping[str, str]
    settings: Mapping[str, str | int]
    child: subprocess.Popen[str] | None = None
    bundles: str | None = None  # printed by the process when it is ready
    early_deaths: int = 0
    thread: threading.Thread | None = field(default=None, repr=False)


@dataclass(slots=True)
class InferenceWorker(Worker):
    """An inference process. The supervisor sends it channels over *broker*, and gets heartbeats."""

    module: ClassVar[str] = "sopdeploy_service.front_ends.inference_process"
    kind: ClassVar[str] = "inference process"
    broker: socket.socket | None = None
    beat: float = 0.0  # of `time.monotonic`; 0 before the process is ready

    def open_broker(self) -> socket.socket:
        """Create the broker of a process that is about to start; return the end that it inherits."""
        self.close_broker()
        self.broker, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.broker.setblocking(False)
        return theirs

    def connect(self, name: str) -> tuple[socket.socket, int]:
        """Connect the front end *name*, which is about to start; return its channel and memory file.

        If this process has just died, the channel is at its end.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        memory = create_memory_file()
        with ours, contextlib.suppress(OSError):
            if self.broker is not None:
                socket.send_fds(self.broker, [name.encode()], [ours.fileno(), memory])
        return theirs, memory

    def last_beat(self) -> float:
        """Return when the event loop of the process ran last."""
        if self.broker is not None:
            with contextlib.suppress(OSError):  # no more heartbeats
                while self.broker.recv(16):
                    self.beat = time.monotonic()
        return self.beat

    def close_broker(self) -> None:
        """Close the broker, which ends the process."""
        self.beat = 0.0
        if self.broker is not None:
            self.broker.close()
            self.broker = None


@dataclass(slots=True)
class HttpWorker(Worker):
    """A process that serves HTTP on *listener*: with *inference*, a front end.

    *index* is its position among the processes that serve HTTP.
    """

    module: ClassVar[str] = "sopdeploy_service.front_ends.worker"
    kind: ClassVar[str] = "server"
    index: int = field(kw_only=True)
    listener: socket.socket = field(kw_only=True)
    inference: InferenceWorker | None = field(kw_only=True)


class Supervisor:
    """Runs the processes of all devices until a signal arrives."""

    def __init__(
        self, sources: Sequence[str | Path], settings: Settings, listeners: Sequence[socket.socket]
    ) -> None:
        """Prepare one process for each of *listeners*, and inference processes if these are front ends."""
        self._sources = [str(source) for source in sources]
        self._settings = settings
        self._listeners = listeners
        self._url = url(listeners[0])
        self._group = Group(len(listeners))
        self._balancer = self._group.member(len(listeners))
        self._spending = SharedSpending.create(len(listeners))
        self._stopping = threading.Event()
        self._starting = threading.RLock()  # a signal sees every process, or prevents its start
        self._changed = threading.Condition()
        self._announced = False
        self._code = 0
        self._output_error: OSError | None = None
        self._servers: list[HttpWorker] = []
        self._inference: list[InferenceWorker] = []

    def run(self) -> int:
        """Serve until SIGTERM or SIGINT; return 0 after a drain, 2 if a process cannot start at all.

        Raises `ConfigError` for a device that this process cannot use, and for too many front ends.
        """
        with ExitStack() as stack:
            stack.callback(self._group.close)
            stack.callback(os.close, self._spending)
            devices = self._settings.devices or (DEFAULT,)
            for position, device in enumerate(devices):
                name = device if devices.count(device) == 1 else f"{device}-{position}"
                self._add_device(name, device, len(self._listeners) // len(devices))
            if self._settings.health_port is not None:
                health = stack.enter_context(bind(self._settings.host, self._settings.health_port))
                sys.stdout.write(f"health: {url(health)}\n")
                connects = {worker.name: partial(self._connect, worker.index) for worker in self._servers}
                stack.enter_context(run_in_thread(group_health_app(connects), health))
            for number in (signal.SIGTERM, signal.SIGINT):
                stack.callback(signal.signal, number, signal.signal(number, self._stop))
            reading, writing = os.pipe()  # closed when this process ends, however it ends
            stack.callback(os.close, writing)
            for worker in (*self._inference, *self._servers):
                worker.thread = threading.Thread(target=self._supervise, args=(worker, reading), daemon=True)
                worker.thread.start()
            watch = threading.Thread(target=self._watch, daemon=True)
            watch.start()
            self._join(self._servers)
            for inference in self._inference:
                if inference.beat == 0 and inference.child is not None:  # it loads models
                    inference.child.kill()
                inference.close_broker()
            self._join(self._inference)
            self._stopping.set()
            watch.join()
            os.close(reading)
        if self._output_error is not None:
            raise self._output_error
        return self._code

    def _add_device(self, name: str, device: str, processes: int) -> None:
        """Add the process of *device*; for several *processes*, front ends and an inference process."""
        variables = {} if device == DEFAULT else visible_devices(device)
        settings: dict[str, str | int] = {"runtime": "onnxruntime-cpu"} if device == "cpu" else {}
        names, inference = [name], None
        if processes > 1:
            names = [f"{name}:{number}" for number in range(processes)]
            inference = InferenceWorker(name, variables, settings)
            self._inference.append(inference)
            settings = {**settings, **share_limits(self._settings, len(self._listeners))}
        for title in names:
            index = len(self._servers)
            listener = self._listeners[index]
            self._servers.append(
                HttpWorker(title, variables, settings, index=index, listener=listener, inference=inference)
            )

    @staticmethod
    def _join(workers: Sequence[Worker]) -> None:
        for worker in workers:
            while worker.thread is not None and worker.thread.is_alive():
                worker.thread.join(0.2)  # wake up often enough to handle signals

    def _stop(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self._stopping.set()
        with self._starting:
            for listener in self._listeners:
                listener.close()  # each process closes its own, after accepting pending connections
            for worker in self._servers:  # inference processes end after them
                if worker.child is not None and worker.child.poll() is None:
                    worker.child.send_signal(signal.SIGTERM)

    def _connect(self, index: int) -> socket.socket:
        """Connect to process *index*; raises `ConnectionRefusedError` if it accepts no connections."""
        if not self._balancer.accepts(index):
            raise ConnectionRefusedError
        return self._balancer.connect(index)

    def _watch(self) -> None:
        """Pass on connections of processes that accept none to the others, and kill processes that hang."""
        last = awake = time.monotonic()
        while not self._stopping.wait(RELAY_SECONDS):
            now = time.monotonic()
            if now - last > 1.0:  # this process was paused, so the others may have been, too
                awake = now
            last = now
            with self._starting:
                if self._stopping.is_set():
                    return
                for worker in self._servers:
                    if worker.bundles is None:
                        continue
                    if not self._balancer.accepts(worker.index):
                        inbox = self._group.inboxes[worker.index].reads
                        self._balancer.relay(worker.index, worker.listener, inbox)
                    if self._kill_if_silent(worker, self._balancer.last_beat(worker.index), awake):
                        self._balancer.leave(worker.index)
                for inference in self._inference:
                    if self._kill_if_silent(inference, inference.last_beat(), awake):
                        inference.close_broker()

    def _kill_if_silent(self, worker: HttpWorker | InferenceWorker, beat: float, awake: float) -> bool:
        """Kill *worker* if its last *beat* (0: it does not run) is too old; return whether it was."""
        silent = time.monotonic() - max(awake, beat) if beat else 0.0
        if silent <= self._settings.max_loop_lag_seconds or worker.child is None:
            return False
        log.error("%s %s: hangs for %.0f s; it is killed", worker.kind, worker.name, silent)
        worker.child.kill()
        return True

    def _supervise(self, worker: HttpWorker | InferenceWorker, lifeline: int) -> None:
        while True:
            if isinstance(worker, HttpWorker) and worker.inference is not None:
                self._wait_for(worker.inference)
            started = time.monotonic()
            with self._starting:
                if self._stopping.is_set():
                    return
                worker.child = self._spawn(worker, lifeline)
            with worker.child as child, cast(TextIO, child.stdout) as output:
                for line in output:  # a front end may print anything
                    if line.startswith("ready: "):
                        self._ready(worker, line.partition("  ")[2].strip())
            code = child.wait()
            if isinstance(worker, HttpWorker):
                self._balancer.leave(worker.index)
            else:
                worker.close_broker()
            if self._stopping.is_set():
                return
            if code == USER_ERROR and not self._announced:
                self._code = USER_ERROR
                self._stop(signal.SIGTERM, None)
                return
            early = time.monotonic() - started < STABLE_SECONDS
            worker.early_deaths = worker.early_deaths + 1 if early else 0
            delay = min(MAX_RESTART_DELAY_SECONDS, 2.0 ** max(0, worker.early_deaths - 1) - 1)
            log.error("%s %s: exited with code %d; restart in %.0f s", worker.kind, worker.name, code, delay)
            self._stopping.wait(delay)

    def _wait_for(self, inference: InferenceWorker) -> None:
        """Wait until the process of *inference* was started."""
        while inference.child is None or inference.child.poll() is not None:
            if self._stopping.wait(RELAY_SECONDS):
                return

    def _spawn(self, worker: HttpWorker | InferenceWorker, lifeline: int) -> subprocess.Popen[str]:
        settings = self._settings.model_dump(mode="json")
        config: dict[str, Any] = {
            "sources": self._sources,
            "settings": {**settings, **worker.settings, "health_port": None, "devices": ()},
            "name": worker.name,
            "lifeline": lifeline,
        }
        if isinstance(worker, InferenceWorker):
            with worker.open_broker() as broker:
                config["broker"] = broker.fileno()
                return start_process(worker.module, config, (lifeline, broker.fileno()), worker.variables)
        config |= {
            "listener": worker.listener.fileno(),
            "siblings": {other.name: other.index for other in self._servers},
            "group": self._group.launch_config(worker.index),
            "spending": (self._spending, worker.index, len(self._listeners)),
        }
        files = [lifeline, worker.listener.fileno(), self._spending, *inherited_files(config["group"])]
        if worker.inference is None:
            return start_process(worker.module, config, files, worker.variables)
        channel, memory = worker.inference.connect(worker.name)
        with channel:
            config |= {"channel": channel.fileno(), "memory": memory}
            files += (channel.fileno(), memory)
            child = start_process(worker.module, config, files, worker.variables)
        os.close(memory)
        return child

    def _ready(self, worker: HttpWorker | InferenceWorker, bundles: str) -> None:
        with self._changed:
            worker.bundles = bundles
            if self._announced or any(other.bundles is None for other in (*self._inference, *self._servers)):
                log.info("%s %s: ready", worker.kind, worker.name)
                return
            self._announced = True
            try:
                sys.stdout.write(f"ready: {self._url}  {bundles}\n")
                sys.stdout.flush()
            except OSError as problem:  # raised by `run`
                self._output_error = problem
                self._stop(signal.SIGTERM, None)


def visible_devices(device: str, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Compute the CUDA variables of a process that may use *device* only.

    An inherited CUDA_VISIBLE_DEVICES is the list to choose from: 0 is its first GPU. Without it, numbers are
    those of nvidia-smi. Raises `ConfigError` for a GPU that is not in the list.
    """
    if device == "cpu":
        return {VISIBLE: ""}
    if VISIBLE in environment:
        listed = [name.strip() for name in environment[VISIBLE].split(",")]
        allowed = list(itertools.takewhile(lambda name: name and name != "-1", listed))  # as CUDA does
        chosen = allowed[int(device) : int(device) + 1] if device.isdecimal() else {device} & set(allowed)
        if not chosen:
            raise ConfigError(
                f"devices: {device} is not among the {len(allowed)} GPUs of "
                f"CUDA_VISIBLE_DEVICES={environment[VISIBLE]}; choose a position, from 0, or a listed UUID"
            )
        return {VISIBLE: next(iter(chosen))}
    order = environment.get(ORDER, "PCI_BUS_ID")  # CUDA's own default is the fastest GPU first
    return {VISIBLE: device, ORDER: order}
