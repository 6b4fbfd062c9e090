"""The channels between processes, which the supervisor creates.

Device processes and front ends have a channel each. A front end reports which it has lost, or could
not open. These, and those that could not be sent, are sent again every `RETRY_SECONDS`. If
photographs are kept, the process that keeps them has a channel to each other one that serves HTTP.
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
        self._unsent: set[tuple[Process, Process]] = set()  # device process, front end

    async def send_again(self) -> None:
        """Send, every `RETRY_SECONDS`, the channels that front ends have lost or were not sent."""
        while True:
            await asyncio.sleep(RETRY_SECONDS)

            for front_end in self.front_ends:
                for device_process in self.device_processes:
                    is_lost = device_process.name in front_end.lost
                    if is_lost or (device_process, front_end) in self._unsent:
                        self._connect_if_ready(device_process, front_end)

    def connect(self, device_process: Process, front_end: Process) -> None:
        """Send *device_process* and *front_end* the ends of a new channel.

        If only *front_end* gets its end, it finds that the channel has ended, and reports that.
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

        if is_sent:
            self._unsent.discard((device_process, front_end))
        else:
            self._unsent.add((device_process, front_end))

    def connect_front_ends(self, device_process: Process) -> None:
        """Create channels between *device_process* and all front ends that run."""
        for front_end in self.front_ends:
            self._connect_if_ready(device_process, front_end)

    def connect_devices(self, front_end: Process) -> None:
        """Create channels between *front_end* and all device processes that are ready."""
        for device_process in self.device_processes:
            self._connect_if_ready(device_process, front_end)

    def _connect_if_ready(self, device_process: Process, front_end: Process) -> None:
        """Create a channel unless one of both has left; a process that starts is connected then."""
        is_ready = device_process.is_ready and device_process.control is not None
        if is_ready and front_end.control is not None:
            self.connect(device_process, front_end)
