"""`serve --devices 0,1`: one process for each GPU behind one port, started again when it dies.

An engine belongs to one process, so more GPUs are more processes. All accept from one listening socket: a
process that is free takes the next connection. Each has a second socket on the loopback, over which the
others ask it for its numbers.
"""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TextIO, cast

from sopdeploy_service.server.sockets import bind, url
from sopdeploy_service.settings import WORKER_VARIABLE, Settings

USER_ERROR = 2
STEADY_SECONDS = 60.0  # a worker that lived so long may be started again at once
LONGEST_PAUSE_SECONDS = 30.0

log = logging.getLogger("sopdeploy.supervisor")


@dataclass(slots=True)
class Worker:
    """One device, its process, and how often it died soon after its start; *name* is unlike the others'."""

    name: str
    device: str
    private: socket.socket
    child: subprocess.Popen[str] | None = None
    bundles: str | None = None  # what it said when it was ready
    early_deaths: int = 0
    thread: threading.Thread | None = field(default=None, repr=False)


class Supervisor:
    """Keeps one worker for each device alive until a signal comes."""

    def __init__(self, sources: Sequence[str | Path], settings: Settings, listener: socket.socket) -> None:
        self._sources = [str(source) for source in sources]
        self._settings = settings
        self._listener = listener
        self._url = url(listener)
        self._stopping = threading.Event()
        self._starting = threading.RLock()  # a process is born before a signal, which then finds it, or never
        self._changed = threading.Condition()
        self._announced = False
        self._code = 0
        self._workers: list[Worker] = []

    def run(self) -> int:
        """Serve until SIGTERM or SIGINT; return 0 after a drain and 2 where a worker cannot start at all."""
        with ExitStack() as stack:
            devices = self._settings.devices
            for place, device in enumerate(devices):
                name = device if devices.count(device) == 1 else f"{device}-{place}"
                self._workers.append(Worker(name, device, stack.enter_context(bind("127.0.0.1", 0))))
            for sign in (signal.SIGTERM, signal.SIGINT):
                stack.callback(signal.signal, sign, signal.signal(sign, self._stop))
            reading, writing = os.pipe()  # ends for the workers when this process does, however it ends
            stack.callback(os.close, writing)
            for worker in self._workers:
                worker.thread = threading.Thread(target=self._keep, args=(worker, reading), daemon=True)
                worker.thread.start()
            for worker in self._workers:
                while worker.thread is not None and worker.thread.is_alive():
                    worker.thread.join(0.2)  # in steps, so that signals are handled in between
            os.close(reading)
        return self._code

    def _stop(self, sign: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self._stopping.set()
        with self._starting:
            self._listener.close()  # the last process to end closes the port, after it has taken in who waits
            for worker in self._workers:
                if worker.child is not None and worker.child.poll() is None:
                    worker.child.send_signal(signal.SIGTERM)

    def _keep(self, worker: Worker, lifeline: int) -> None:
        while True:
            started = time.monotonic()
            with self._starting:
                if self._stopping.is_set():
                    return
                worker.child = self._spawn(worker, lifeline)
            code = self._live(worker.child, worker)
            if self._stopping.is_set():
                return
            if code == USER_ERROR and not self._announced:
                self._code = USER_ERROR
                self._stop(signal.SIGTERM, None)
                return
            early = time.monotonic() - started < STEADY_SECONDS
            worker.early_deaths = worker.early_deaths + 1 if early else 0
            pause = min(LONGEST_PAUSE_SECONDS, 2.0**worker.early_deaths - 1)
            log.error("device %s: its process ended with %d; again in %.0f s", worker.name, code, pause)
            self._stopping.wait(pause)

    def _spawn(self, worker: Worker, lifeline: int) -> subprocess.Popen[str]:
        order = {
            "sources": self._sources,
            "settings": self._settings.model_dump(mode="json"),
            "name": worker.name,
            "listener": self._listener.fileno(),
            "private": worker.private.fileno(),
            "lifeline": lifeline,
            "siblings": {other.name: url(other.private) for other in self._workers},
        }
        visible = {"CUDA_VISIBLE_DEVICES": worker.device} if worker.device.isdecimal() else {}
        return subprocess.Popen(
            [sys.executable, "-m", "sopdeploy_service.server.worker"],
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # a Ctrl-C at the terminal is ours to pass on
            pass_fds=(self._listener.fileno(), worker.private.fileno(), lifeline),
            env={**os.environ, **visible, WORKER_VARIABLE: json.dumps(order)},
        )

    def _live(self, child: subprocess.Popen[str], worker: Worker) -> int:
        with child, cast(TextIO, child.stdout) as said:
            for line in said:
                if line.startswith("ready: "):
                    self._ready(worker, line.split(maxsplit=2)[2].strip())
        return child.wait()

    def _ready(self, worker: Worker, bundles: str) -> None:
        with self._changed:
            worker.bundles = bundles
            if self._announced or any(other.bundles is None for other in self._workers):
                log.info("device %s: answers", worker.name)
                return
            self._announced = True
            sys.stdout.write(f"ready: {self._url}  {bundles}\n")
            sys.stdout.flush()
