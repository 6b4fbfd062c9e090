"""The channels between processes, which the supervisor creates.

Device processes and front ends have a channel each. A front end that has lost one, or could not
open it, asks for another, and a channel that could not be sent is sent again. If photographs are
kept, the process that keeps them has a channel to each other one that serves HTTP.
"""

import asyncio
import socket
from collections.abc import Sequence
from contextlib import suppress

from sopdeploy_service.devices import control
from sopdeploy_service.devices.processes import Process

RETRY_SECONDS = 2.0


class Channels:
    """Creates the channels between *device_processes* and *front_ends*."""

    def __init__(
        self, device_processes: Sequence[Process], front_ends: Sequence[Process]
    ) -> None:
        self.device_processes = device_processes
        self.front_ends = front_ends

    def connect(self, device_process: Process, front_end: Process) -> None:
        """Send *device_process* and *front_end* the ends of a new channel.

        If only *front_end* gets its end, it finds that the channel has ended, and asks again.
        """
        is_sent = False
        with suppress(OSError):  # too many files
            to_front_end, to_device_process = socket.socketpair()
            with to_front_end, to_device_process:
                is_sent = front_end.send(
                    control.CHANNEL, device_process.name.encode(), to_front_end.fileno()
                )
                device_process.send(
                    control.CHANNEL, front_end.name.encode(), to_device_process.fileno()
                )

        if not is_sent and front_end.control is not None:
            loop = asyncio.get_running_loop()
            loop.call_later(RETRY_SECONDS, self.connect_devices, front_end, device_process.name)

    def connect_front_ends(self, device_process: Process) -> None:
        """Create channels between *device_process* and all front ends that run."""
        for front_end in self.front_ends:
            if front_end.control is not None:
                self.connect(device_process, front_end)

    def connect_devices(self, front_end: Process, name: str | None = None) -> None:
        """Create channels between *front_end* and all device processes that are ready, or the one with *name*."""
        for device_process in self.device_processes:
            works = device_process.is_ready and device_process.control is not None
            if works and name in {None, device_process.name}:
                self.connect(device_process, front_end)


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
