"""`serve --devices 0,1 --front-ends 4`: processes behind one port, restarted when they die.

A runtime belongs to one process, so several GPUs need several processes: one per device, or an engine process
and several front ends per device (`front_ends`). `balancing` distributes the connections over the processes
that serve HTTP and opens those over which they collect each other's metrics.
"""

import itertools
import json
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
from typing import Any, TextIO, cast

from sopdeploy.errors import ConfigError
from sopdeploy_service.http.rate_limits import SharedSpending
from sopdeploy_service.inference.engine_process.main import LOG
from sopdeploy_service.server.balancing import Group, inherited_files
from sopdeploy_service.server.front_ends import EngineGroup, Peer, share_limits
from sopdeploy_service.server.health_port import group_health_app, run_in_thread
from sopdeploy_service.server.sockets import bind, url
from sopdeploy_service.settings import WORKER_VARIABLE, Settings

USER_ERROR = 2
STABLE_SECONDS = 60.0  # a worker that ran this long is restarted without delay
MAX_RESTART_DELAY_SECONDS = 30.0
RELAY_SECONDS = 0.05  # how long a connection to a process that is not running waits at most
SERVER = "sopdeploy_service.server.process"
ENGINE = "sopdeploy_service.inference.engine_process.main"
OUTPUT: dict[str, Any] = {"stdout": subprocess.PIPE, "text": True, "errors": "replace"}
VISIBLE, ORDER = "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"

log = logging.getLogger("sopdeploy.supervisor")


@dataclass(slots=True)
class Worker:
    """A process for one device; *name* is unique even if several workers share a device.

    *variables* are its additional environment variables, *settings* the settings in which it differs from
    other processes. *place* is its position among the processes with a *listener*; an engine process has
    none.
    """

    name: str
    variables: Mapping[str, str]
    settings: Mapping[str, str | int]
    place: int = -1
    listener: socket.socket | None = None
    engine: EngineGroup | None = None
    peer: Peer | None = None  # the broker socket of this process, if it belongs to an engine group
    child: subprocess.Popen[str] | None = None
    bundles: str | None = None  # printed by the process when it is ready
    early_deaths: int = 0
    thread: threading.Thread | None = field(default=None, repr=False)

    @property
    def is_engine(self) -> bool:
        """Whether this is an engine process, which serves front ends only."""
        return self.listener is None

    @property
    def title(self) -> str:
        """Name of this process in log lines."""
        device, _, front_end = self.name.partition(":")
        parts = [f"device {device}"] if device else []
        parts += [f"front end {front_end}"] if front_end else ["engine"] if self.is_engine else []
        return ", ".join(parts)


class Supervisor:
    """Runs the processes of all devices until a signal arrives."""

    def __init__(
        self, sources: Sequence[str | Path], settings: Settings, listeners: Sequence[socket.socket]
    ) -> None:
        """Prepare one process for each of *listeners*, and engine processes if these are front ends."""
        self._sources = [str(source) for source in sources]
        self._settings = settings
        self._listeners = listeners
        self._url = url(listeners[0])
        self._group = Group(len(listeners))
        self._balancer = self._group.member(len(listeners))
        self._stopping = threading.Event()
        self._starting = threading.RLock()  # a signal sees every process, or prevents its start
        self._changed = threading.Condition()
        self._announced = False
        self._code = 0
        self._output_error: OSError | None = None
        self._workers: list[Worker] = []
        self._engines: list[EngineGroup] = []
        self._spending = -1  # memory of the front ends' rate limits

    def run(self) -> int:
        """Serve until SIGTERM or SIGINT; return 0 after a drain, 2 if a worker cannot start at all.

        Raises `ConfigError` for a device that this process cannot use, and for too many front ends.
        """
        with ExitStack() as stack:
            stack.callback(self._group.close)
            devices = self._settings.devices or ("",)
            for position, device in enumerate(devices):
                name = device if devices.count(device) == 1 else f"{device}-{position}"
                self._add_device(name, device, len(self._listeners) // len(devices))
            if len(self._listeners) > 1:
                self._spending = SharedSpending.create(len(self._listeners))
                stack.callback(os.close, self._spending)
            if self._settings.health_port is not None:
                health = stack.enter_context(bind(self._settings.host, self._settings.health_port))
                sys.stdout.write(f"health: {url(health)}\n")
                servers = [worker for worker in self._workers if not worker.is_engine]
                workers = {worker.name: partial(self._connect, worker.place) for worker in servers}
                stack.enter_context(run_in_thread(group_health_app(workers), health))
            for number in (signal.SIGTERM, signal.SIGINT):
                stack.callback(signal.signal, number, signal.signal(number, self._stop))
            reading, writing = os.pipe()  # closed when this process ends, however it ends
            stack.callback(os.close, writing)
            for worker in self._workers:
                worker.thread = threading.Thread(target=self._supervise, args=(worker, reading), daemon=True)
                worker.thread.start()
            relay = threading.Thread(target=self._relay, daemon=True)
            relay.start()
            for worker in sorted(self._workers, key=lambda worker: worker.is_engine):
                if worker.is_engine and worker.engine is not None:  # all front ends have ended
                    worker.engine.close()
                while worker.thread is not None and worker.thread.is_alive():
                    worker.thread.join(0.2)  # wake up often enough to handle signals
            self._stopping.set()
            relay.join()
            os.close(reading)
        if self._output_error is not None:
            raise self._output_error
        return self._code

    def _add_device(self, name: str, device: str, processes: int) -> None:
        """Add the process of *device*; for several *processes*, an engine and that many front ends."""
        variables = visible_devices(device) if device else {}
        settings: dict[str, str | int] = {"runtime": "onnxruntime-cpu"} if device == "cpu" else {}
        peers: list[Peer | None] = [None]
        group = None
        if processes > 1:
            front_ends = [Peer(f"{name}:{number}") for number in range(processes)]
            group, peers = EngineGroup(Peer(name), front_ends), [*front_ends]
            self._engines.append(group)
            self._workers.append(Worker(name, variables, settings, engine=group, peer=group.engine))
            settings = {**settings, **share_limits(self._settings, len(self._listeners))}
        for peer in peers:
            place = sum(not worker.is_engine for worker in self._workers)
            title, listener = name if peer is None else peer.name, self._listeners[place]
            self._workers.append(Worker(title, variables, settings, place, listener, group, peer))

    def _stop(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self._stopping.set()
        with self._starting:
            for listener in self._listeners:
                listener.close()  # each worker closes its own, after accepting pending connections
            for worker in self._workers:
                if worker.is_engine:  # ends after the front ends
                    continue
                if worker.child is not None and worker.child.poll() is None:
                    worker.child.send_signal(signal.SIGTERM)

    def _connect(self, place: int) -> socket.socket:
        """Connect to the process at *place*; raises `ConnectionRefusedError` if it accepts no connections."""
        if not self._balancer.accepts(place):
            raise ConnectionRefusedError
        return self._balancer.connect(place)

    def _relay(self) -> None:
        """Pass on connections of processes that accept none to the others, and kill processes that hang."""
        looked = awake = time.monotonic()
        while not self._stopping.wait(RELAY_SECONDS):
            now = time.monotonic()
            if now - looked > 1.0:  # this process was paused, so the others may have been, too
                awake = now
            looked = now
            with self._starting:
                if self._stopping.is_set():
                    return
                for worker in self._workers:
                    if worker.bundles is None or worker.listener is None:
                        continue
                    if not self._balancer.accepts(worker.place):
                        inbox = self._group.inboxes[worker.place].reads
                        self._balancer.relay(worker.place, worker.listener, inbox)
                    beat = self._balancer.last_beat(worker.place)
                    silent = now - max(awake, beat) if beat else 0.0
                    if silent > self._settings.max_loop_lag_seconds and worker.child is not None:
                        log.error("%s: hangs for %.0f s; it is killed", worker.title, silent)
                        self._balancer.leave(worker.place)
                        worker.child.kill()

    def _supervise(self, worker: Worker, lifeline: int) -> None:
        while True:
            started = time.monotonic()
            with self._starting:
                if self._stopping.is_set():
                    return
                worker.child = self._spawn(worker, lifeline)
            with worker.child as child, cast(TextIO, child.stdout) as output:
                for line in output:
                    if line.startswith("ready: "):
                        self._ready(worker, line.partition("  ")[2].strip())
                    elif worker.is_engine and line.startswith(LOG):  # a front end may print anything
                        name, level, text = json.loads(line.removeprefix(LOG))
                        logging.getLogger(name).log(level, text)
            code = child.wait()
            if not worker.is_engine:
                self._balancer.leave(worker.place)
            if self._stopping.is_set():
                return
            if code == USER_ERROR and not self._announced:
                self._code = USER_ERROR
                self._stop(signal.SIGTERM, None)
                return
            early = time.monotonic() - started < STABLE_SECONDS
            worker.early_deaths = worker.early_deaths + 1 if early else 0
            delay = min(MAX_RESTART_DELAY_SECONDS, 2.0 ** max(0, worker.early_deaths - 1) - 1)
            log.error("%s: process exited with code %d; restart in %.0f s", worker.title, code, delay)
            self._stopping.wait(delay)

    def _spawn(self, worker: Worker, lifeline: int) -> subprocess.Popen[str]:
        order: dict[str, Any] = {
            "sources": self._sources,
            "settings": {**self._settings.model_dump(mode="json"), **worker.settings, "health_port": None},
            "name": worker.name,
        }
        if worker.listener is not None:
            order |= {"listener": worker.listener.fileno(), "lifeline": lifeline}
            servers = [other for other in self._workers if not other.is_engine]
            order["siblings"] = {other.name: other.place for other in servers}
            order["elsewhere"] = [other.place for other in servers if other.engine is not worker.engine]
            order["group"] = self._group.order(worker.place)
            if len(self._listeners) > 1:
                order["spending"] = (self._spending, worker.place, len(self._listeners))
        if worker.engine is None or worker.peer is None:
            return start_process(order, worker.variables)
        with worker.engine.open_broker(worker.peer) as broker:
            order["broker"] = broker.fileno()
            child = start_process(order, worker.variables)
        worker.engine.started(worker.peer, child)
        return child

    def _ready(self, worker: Worker, bundles: str) -> None:
        if worker.is_engine and worker.engine is not None:
            worker.engine.engine_ready()
        with self._changed:
            worker.bundles = bundles
            if self._announced or any(other.bundles is None for other in self._workers):
                log.info("%s: ready", worker.title)
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


def start_process(
    order: Mapping[str, Any], variables: Mapping[str, str], *, stderr: int | None = None
) -> subprocess.Popen[str]:
    """Start a process that serves the bundles in *order*, until `lifeline` closes; see `process.main`.

    Without a listening socket in *order*, it is an engine process.
    """
    files = [order[name] for name in ("listener", "lifeline", "broker") if name in order]
    files += inherited_files(order["group"]) if order.get("group") else ()
    files += order["spending"][:1] if "spending" in order else ()
    return subprocess.Popen(
        [sys.executable, "-m", SERVER if "listener" in order else ENGINE],
        **OUTPUT,
        stderr=stderr,
        start_new_session=True,  # Ctrl-C reaches this process only, which forwards it
        pass_fds=files,
        env={**os.environ, **variables, WORKER_VARIABLE: json.dumps(order)},
    )
