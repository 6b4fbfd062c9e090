"""The processes of a server with several: which there are, their shares, and what the supervisor knows."""

import itertools
import logging
import math
import os
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from sopdeploy.errors import ConfigError
from sopdeploy_service.front_ends import control
from sopdeploy_service.settings import Settings, cores_within_quota, decoders_per_process

SERVER, INFERENCE = "server", "inference process"
MODULES = {
    SERVER: "sopdeploy_service.front_ends.worker",
    INFERENCE: "sopdeploy_service.front_ends.inference_process",
}
MAX_ON_THE_WAY = 16  # connections that a process has not received
MAX_AUTO, CORES_PER_FRONT_END = 8, 4
VISIBLE, ORDER = "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"

log = logging.getLogger("sopdeploy.supervisor")


@dataclass(eq=False)
class Process:
    """A process of a *kind* in `MODULES`; *name* is unique among them.

    *variables* are its additional environment variables, *settings* the settings in which it differs from
    other processes. A front end has the process of its device as *inference*.
    """

    name: str
    kind: str
    variables: Mapping[str, str]
    settings: Mapping[str, str | int]
    inference: "Process | None" = None
    child: subprocess.Popen[str] | None = None
    control: socket.socket | None = None  # until the process has ended or left
    sent: int = 0  # connections
    received: int = 0  # this and the following: reported by the child
    open: int = 0
    bundles: str | None = None
    silent_beats: int = 0  # since the last report

    def __str__(self) -> str:
        return f"{self.kind} {self.name}"

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
        """Record a *status* of the child; raises `struct.error` if it is too short."""
        self.received, self.open = control.STATUS.unpack_from(status)
        self.bundles = status[control.STATUS.size :].decode(errors="replace")
        self.silent_beats = 0

    def send(self, message: bytes, *files: int) -> bool:
        """Send *message* with *files*; return whether the child gets it."""
        return self.control is not None and control.send_files(self.control, message, *files)


def list_processes(settings: Settings) -> list[Process]:
    """List the processes of all devices; inference processes come before their front ends.

    Raises `ConfigError` for a device that this process cannot use, and for too many front ends.
    """
    devices = settings.devices or ("",)
    front_ends = count_front_ends(settings)
    processes: list[Process] = []
    for position, device in enumerate(devices):
        name = device or "default"
        if devices.count(device) > 1:
            name = f"{device}-{position}"
        variables = visible_devices(device) if device else {}
        changed: dict[str, str | int] = {}
        if device == "cpu" and settings.runtime == "auto":
            changed["runtime"] = "onnxruntime-cpu"
        if device != "cpu" and settings.decoders == "auto":
            changed["decoders"] = decoders_per_process(cores_within_quota(), front_ends * len(devices))
        if front_ends == 1:
            processes.append(Process(name, SERVER, variables, changed))
            continue
        inference = Process(name, INFERENCE, variables, changed)
        of_front_end = {**changed, **share_limits(settings, front_ends * len(devices))}
        processes.append(inference)
        processes += [
            Process(f"{name}:{number}", SERVER, variables, of_front_end, inference)
            for number in range(front_ends)
        ]
    return processes


def count_front_ends(settings: Settings) -> int:
    """Return the number of front ends per device.

    `auto` is a quarter of the cores, at most 8, divided by the number of devices. With a setting that needs a
    single process, `auto` is 1. Raises `ConfigError` if `auto` is 1 and a sandbox is required.
    """
    if settings.front_ends != "auto":
        return settings.front_ends
    cores = cores_within_quota()
    count = max(1, min(MAX_AUTO, cores // CORES_PER_FRONT_END) // max(1, len(settings.devices)))
    if settings.memory_budget is not None:
        count = 1
    if count == 1 and settings.sandbox == "required":
        raise ConfigError(
            f"sandbox=required: front_ends=auto is one process on {cores} cores; set front_ends=2 or more"
        )
    return count


def share_limits(settings: Settings, front_ends: int) -> dict[str, int]:
    """Divide the limits of the whole server among its *front_ends*.

    Raises `ConfigError` if the share of a front end is too small for the largest request.
    """
    needed = {
        "queue_size": settings.max_images * front_ends,
        # An eighth of the bytes is reserved for small bodies.
        "max_upload_bytes": math.ceil(settings.max_body_bytes * 8 / 7) * front_ends,
    }
    changes = [f"{name}={value}" for name, value in needed.items() if getattr(settings, name) < value]
    if changes:
        raise ConfigError(
            f"{front_ends} front ends share queue_size and max_upload_bytes, and the largest request "
            f"does not fit into a share; set {', '.join(changes)} or start fewer front ends"
        )
    return {name: getattr(settings, name) // front_ends for name in needed}


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
