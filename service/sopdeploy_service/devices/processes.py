"""The processes of a server with several devices, and what the supervisor knows of each."""

import itertools
import os
import signal
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import ClassVar

import pydantic

from sopdeploy.errors import ConfigError
from sopdeploy_service.devices import control
from sopdeploy_service.devices.control import Status
from sopdeploy_service.runtime.choice import cpu_runtime
from sopdeploy_service.server.lifetime import BEAT_SECONDS
from sopdeploy_service.settings import Settings, decoders_per_process

ANY_DEVICE = ""
MAX_ON_THE_WAY = 16  # connections that a process has not received
# How long a process may go on before it is replaced:
START_SECONDS = 60.0  # without a report while it starts, beside the time of a load
HANG_SECONDS = 5.0  # without a report while it serves
LEAVE_SECONDS = 8.0  # after it has left
NOT_STARTED = "does not start"
UNKNOWN_CODE = 1  # of a process whose exit code nobody has
VISIBLE = "CUDA_VISIBLE_DEVICES"
ORDER = "CUDA_DEVICE_ORDER"


class LaunchConfig(pydantic.BaseModel):
    """What each process of a server gets: *name*, environment *variables*, *sources* of bundles, *settings*.

    The files that come with it are its end of the socket *control* and, for a process that
    serves HTTP, the memory *shared* of admitted images, the API *keys* as the supervisor has
    read them, and the memory of their rate *limits*. The first of the processes that serve HTTP
    keeps the photographs of all.

    A front end has no *device*. *front_ends* is their number; without them, devices serve HTTP.
    *position* counts the processes of a kind; *num_servers* of them serve HTTP. *supervisor*
    and, for a front end, *device_processes* are process ids.
    """

    name: str
    device: str | None
    variables: Mapping[str, str]
    sources: tuple[str, ...]
    settings: Settings
    supervisor: int
    front_ends: int
    position: int
    num_servers: int
    device_processes: tuple[int, ...]
    control: int = -1
    shared: int = -1
    keys: int = -1
    limits: int = -1


class Child:
    """The child process *pid* of this process."""

    _running: ClassVar[dict[int, "Child"]] = {}

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._code: int | None = None
        self._running[pid] = self

    def poll(self) -> int | None:
        """Return the exit code, None while the process runs; also collect all others that have ended.

        The code is `UNKNOWN_CODE` if the process was collected as an orphan before this object
        existed.
        """
        # Collect all children that have ended, also orphans that became children of this process.
        with suppress(ChildProcessError):  # there is no child
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:  # the others run
                    break
                child = self._running.pop(pid, None)
                if child is not None:
                    child._code = os.waitstatus_to_exitcode(status)

        # Without a code, it still runs, or somebody else has collected it.
        if self._code is None:
            try:
                os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                self._code = UNKNOWN_CODE
                self._running.pop(self.pid, None)

        return self._code

    def send_signal(self, number: signal.Signals) -> None:
        """Send the signal *number* unless the process has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End the process at once."""
        self.send_signal(signal.SIGKILL)


@dataclass(eq=False)
class Process:
    """The process of one device, or a front end; *name* is unique among them.

    *variables* are its additional environment variables, *settings* those of this process,
    *position* is its number among those of its kind. A front end has no *device*; that of ""
    may use every device.
    """

    name: str
    variables: Mapping[str, str]
    settings: Settings
    device: str | None
    position: int
    child: Child | None = None
    control: socket.socket | None = None  # until the process has ended or left
    sent: int = 0  # connections
    received: int = 0  # this and the following: reported by the child
    open: int = 0
    bundles: str | None = None  # names; None: starts
    works: bool = True
    lost: frozenset[str] = frozenset()  # see `Status`
    silent_beats: int = 0  # since the last report, or since the process has left

    @property
    def title(self) -> str:
        """What the log calls the process."""
        return (
            self.name
            if self.is_front_end or self.device == ANY_DEVICE
            else f"device {self.name}"
        )

    @property
    def is_front_end(self) -> bool:
        """Whether the process serves HTTP with the models of device processes."""
        return self.device is None

    @property
    def is_ready(self) -> bool:
        """Whether the child has reported that it serves."""
        return self.bundles is not None

    @property
    def is_running(self) -> bool:
        """Whether the child has not ended."""
        return self.child is not None and self.child.poll() is None

    @property
    def accepts(self) -> bool:
        """Whether the process gets more connections."""
        return (
            self.control is not None
            and self.is_ready
            and self.sent - self.received < MAX_ON_THE_WAY
        )

    @property
    def load(self) -> int:
        """The number of open connections, with those that the process has not received."""
        return self.sent - self.received + self.open

    def reset(self, control_socket: socket.socket) -> None:
        """Reset what the previous child reported; the other end of *control_socket* is in a new child."""
        self.control = control_socket
        self.bundles, self.works, self.lost = None, True, frozenset()
        self.sent = self.received = self.open = self.silent_beats = 0

    def record_status(self, status: Status) -> None:
        """Record a *status* of the child."""
        self.received, self.open, self.bundles = status.received, status.open, status.bundles
        self.works, self.lost = status.works, status.lost
        self.silent_beats = 0

    def count_beat(self, load_seconds: float) -> str:
        """Count a beat; return why the child is to be replaced.

        The reason is empty if the child can do its work, or may be able to soon. A step of its
        start may take *load_seconds*.
        """
        # Choose how long a child may be silent: while it leaves, serves or starts.
        self.silent_beats += 1
        has_left = self.control is None

        if has_left:
            limit = LEAVE_SECONDS
            reason = "does not end"
        elif self.is_ready:
            limit = HANG_SECONDS
            reason = "hangs"
        else:
            limit = load_seconds + START_SECONDS
            reason = NOT_STARTED

        return reason if self.silent_beats * BEAT_SECONDS > limit else ""

    def send(self, kind: bytes, rest: bytes = b"", *files: int) -> bool:
        """Send a message with *files*; return whether the child gets it."""
        return self.control is not None and control.send_message(
            self.control, kind, rest, *files
        )


def list_devices(settings: Settings) -> list[Process]:
    """Describe the process of each device, or of a single one that may use all devices.

    It starts none of them.
    Raises `ConfigError` for a GPU that an inherited CUDA_VISIBLE_DEVICES does not list.
    """
    devices = settings.devices or (ANY_DEVICE,)
    decoders = decoders_per_process(len(devices))

    processes: list[Process] = []
    for position, device in enumerate(devices):
        name = "engine" if device == ANY_DEVICE else device
        if devices.count(device) > 1:
            name = f"{device}-{position}"

        # Change the settings for this process.
        changed: dict[str, object] = {"devices": ()}  # the process itself starts no others
        # "auto" would choose CUDA wherever it is installed.
        if device == "cpu" and settings.runtime == "auto":
            changed["runtime"] = cpu_runtime()
        # With "auto", each GPU's decoders would take all cores, so the processes share them. A
        # process that computes on the CPU has few decoders anyway.
        if device != "cpu" and settings.decoders == "auto":
            changed["decoders"] = decoders

        process = Process(
            name=name,
            variables=visible_devices(device) if device != ANY_DEVICE else {},
            settings=settings.model_copy(update=changed),
            device=device,
            position=position,
        )
        processes.append(process)
    return processes


def list_front_ends(settings: Settings) -> list[Process]:
    """List the front ends; `auto`, which `run_server` replaces by a number, has none."""
    count = 0 if settings.front_ends == "auto" else settings.front_ends
    changed: dict[str, object] = {"devices": (), "follow": False}
    if count and settings.decoders == "auto":
        changed["decoders"] = decoders_per_process(count)

    own = settings.model_copy(update=changed)
    return [
        Process(
            name=f"front-{number}",
            variables={VISIBLE: ""},  # no GPU
            settings=own,
            device=None,
            position=number,
        )
        for number in range(count)
    ]


def visible_devices(device: str, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Compute the CUDA variables of a process that may use *device* only.

    An inherited CUDA_VISIBLE_DEVICES is the list to choose from: 0 is its first GPU. Raises
    `ConfigError` for a GPU that is not in it. Without it, every device is taken, and numbers are
    those of nvidia-smi unless CUDA_DEVICE_ORDER says otherwise.
    """
    if device == "cpu":
        return {VISIBLE: ""}

    # Take the device from those that this process may use.
    if VISIBLE in environment:
        listed = [name.strip() for name in environment[VISIBLE].split(",")]
        # Like CUDA, ignore what follows an empty name or -1.
        allowed = list(itertools.takewhile(lambda name: name and name != "-1", listed))

        is_position = device.isdecimal()  # in the list; anything else is the UUID of a GPU
        is_listed = int(device) < len(allowed) if is_position else device in allowed
        if not is_listed:
            raise ConfigError(
                f"devices: {device} is not among the {len(allowed)} GPUs of "
                f"CUDA_VISIBLE_DEVICES={environment[VISIBLE]}; choose a position, from 0, or a listed UUID"
            )

        return {VISIBLE: allowed[int(device)] if is_position else device}
    order = environment.get(ORDER, "PCI_BUS_ID")  # CUDA's own default is the fastest GPU first
    return {VISIBLE: device, ORDER: order}
