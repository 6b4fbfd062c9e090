"""The processes of a server with several devices, and what the supervisor knows of each."""

import itertools
import os
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

import pydantic

from sopdeploy.errors import ConfigError
from sopdeploy_service.devices import control
from sopdeploy_service.settings import Settings, decoders_per_process

MAX_ON_THE_WAY = 16  # connections that a process has not received
CONFIG_VARIABLE = "SOPDEPLOY_WORKER"  # has the launch config of a process
VISIBLE, ORDER = "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"


class LaunchConfig(pydantic.BaseModel):
    """What each of *num_processes* gets: its *name*, *sources* of bundles, *settings*, file descriptors.

    These are its end of the socket *control*, the file *buckets* of rate limits, and *lifeline*, a pipe: the
    process ends when the supervisor closes the other end.
    """

    name: str
    sources: tuple[str, ...]
    settings: Settings
    lifeline: int
    control: int
    buckets: int
    num_processes: int


@dataclass(eq=False)
class Process:
    """The process of one device; *name* is unique among them.

    *variables* are its additional environment variables, *settings* those of this process.
    """

    name: str
    variables: Mapping[str, str]
    settings: Settings
    child: subprocess.Popen[str] | None = None
    control: socket.socket | None = None  # until the process has ended or left
    sent: int = 0  # connections
    received: int = 0  # this and the following: reported by the child
    open: int = 0
    bundles: str | None = None
    silent_beats: int = 0  # since the last report

    @property
    def accepts(self) -> bool:
        """Whether the process gets more connections."""
        on_the_way = self.sent - self.received
        return self.control is not None and self.bundles is not None and on_the_way < MAX_ON_THE_WAY

    @property
    def load(self) -> int:
        """The number of open connections, with those that the process has not received."""
        return self.sent - self.received + self.open

    def reset(self, control_socket: socket.socket) -> None:
        """Reset what the previous child reported; the other end of *control_socket* is in a new child."""
        self.control, self.bundles = control_socket, None
        self.sent = self.received = self.open = self.silent_beats = 0

    def report(self, status: bytes) -> None:
        """Record a *status* of the child."""
        self.received, self.open = control.STATUS.unpack_from(status)
        self.bundles = status[control.STATUS.size :].decode()
        self.silent_beats = 0

    def send(self, message: bytes, *files: int) -> bool:
        """Send *message* with *files*; return whether the child gets it."""
        return self.control is not None and control.send_files(self.control, message, *files)


def list_processes(settings: Settings) -> list[Process]:
    """List the processes of all devices; raises `ConfigError` for a device that this process cannot use."""
    devices = settings.devices
    decoders = decoders_per_process(len(devices))
    processes: list[Process] = []
    for position, device in enumerate(devices):
        name = f"{device}-{position}" if devices.count(device) > 1 else device
        changed: dict[str, object] = {"devices": ()}  # the process itself starts no others
        if device == "cpu" and settings.runtime == "auto":  # "auto" chooses CUDA wherever it is installed
            changed["runtime"] = "onnxruntime-cpu"
        if device != "cpu" and settings.decoders == "auto":  # "auto" would take all cores for one GPU
            changed["decoders"] = decoders
        if settings.keep is not None:  # one process writes to a folder
            changed["keep"] = settings.keep / name.replace("/", "_")
            changed["keep_bytes"] = settings.keep_bytes // len(devices)
        processes.append(Process(name, visible_devices(device), settings.model_copy(update=changed)))
    return processes


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
