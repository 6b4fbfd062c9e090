"""The channels between processes, which the supervisor creates.

Device processes and front ends have a channel each; both ends report its number when it is open. If
photographs are kept, the process that keeps them has a channel to each other one that serves
HTTP.
"""

import socket
from collections.abc import Iterator, Sequence
from contextlib import suppress

from sopdeploy_service.devices import control
from sopdeploy_service.devices.processes import Process


class Channels:
    """Creates the channels between *device_processes* and *front_ends*, whose *numbers* are new ones."""

    def __init__(
        self,
        device_processes: Sequence[Process],
        front_ends: Sequence[Process],
        numbers: Iterator[int],
    ) -> None:
        self.device_processes = device_processes
        self.front_ends = front_ends
        self._numbers = numbers

    def connect(self, device_process: Process, front_end: Process) -> None:
        """Send *device_process* and *front_end* the ends of a new channel, which they report when open.

        *front_end* notes that it expects the channel, which is missing until both report it.
        """
        number = next(self._numbers)
        front_end.expected[device_process.name] = number

        with suppress(OSError):  # too many files: the channel stays missing
            for end, process, other in zip(
                socket.socketpair(),
                (device_process, front_end),
                (front_end, device_process),
                strict=True,
            ):
                with end:
                    description = f"{number} {other.name}".encode()
                    process.send(control.CHANNEL, description, end.fileno())

    def connect_front_ends(self, device_process: Process) -> None:
        """Create channels between *device_process* and all front ends that run."""
        for front_end in self.front_ends:
            if front_end.control is not None:
                self.connect(device_process, front_end)

    def connect_devices(self, front_end: Process) -> None:
        """Create channels between *front_end* and all device processes that are ready."""
        for device_process in self.device_processes:
            if device_process.is_ready:
                self.connect(device_process, front_end)

    def forget(self, process: Process) -> None:
        """Expect no channel of *process*, which has ended, any more."""
        for front_end in self.front_ends:
            front_end.expected.pop(process.name, None)

    def are_missing(self, process: Process) -> bool:
        """Tell whether *process* lacks channels that it needs.

        A channel that was sent is missing until both ends report it. Of its channels,

        - a device process needs one at least,
        - a front end that starts needs one at least,
        - a front end that is ready needs all.
        """
        # Only front ends note which channels they expect, by device process.
        if process in self.device_processes:
            front_ends = [each for each in self.front_ends if process.name in each.expected]
            are_missing = [self._is_missing(each, process) for each in front_ends]
            return bool(are_missing) and all(are_missing)

        devices = [
            device for device in self.device_processes if device.name in process.expected
        ]
        are_missing = [self._is_missing(process, device) for device in devices]
        if process.is_ready:
            return any(are_missing)
        return bool(are_missing) and all(are_missing)

    @staticmethod
    def _is_missing(front_end: Process, device_process: Process) -> bool:
        number = front_end.expected[device_process.name]
        return number not in front_end.has or number not in device_process.has


def connect_keeper(servers: Sequence[Process], process: Process) -> None:
    """Connect *process* to the keeper of photographs, the first of *servers*, by a channel.

    If *process* is the keeper, connect all others to it. No process is connected before both it
    and the keeper are ready.
    """
    keeper, *others = servers
    senders = others if process is keeper else [process]
    for sender in senders:
        if not keeper.is_ready or not sender.is_ready:
            continue

        with suppress(OSError):  # too many files: no photograph is kept
            for end, receiver in zip(control.socket_pair(), (keeper, sender), strict=True):
                with end:
                    receiver.send(control.PHOTOS, b"", end.fileno())
