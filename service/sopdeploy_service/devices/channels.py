"""The channels between processes, which the supervisor creates.

Engines and front ends have a channel each; both ends report its number when it is open. If
photographs are kept, the process that keeps them has a channel to each other one that serves
HTTP.
"""

import socket
from collections.abc import Iterator, Sequence
from contextlib import suppress

from sopdeploy_service.devices import control
from sopdeploy_service.devices.processes import Process


class Channels:
    """Creates the channels between *engines* and *front_ends*, whose *numbers* are new ones."""

    def __init__(
        self, engines: Sequence[Process], front_ends: Sequence[Process], numbers: Iterator[int]
    ) -> None:
        self.engines = engines
        self.front_ends = front_ends
        self._numbers = numbers

    def connect(self, engine: Process, front_end: Process) -> None:
        """Send *engine* and *front_end* the ends of a new channel, which they report when open.

        *front_end* notes that it expects the channel, which is missing until both report it.
        """
        number = next(self._numbers)
        front_end.expected[engine.name] = number

        with suppress(OSError):  # too many files: the channel stays missing
            for end, process, other in zip(
                socket.socketpair(), (engine, front_end), (front_end, engine), strict=True
            ):
                with end:
                    description = f"{number} {other.name}".encode()
                    process.send(control.CHANNEL, description, end.fileno())

    def connect_front_ends(self, engine: Process) -> None:
        """Create channels between *engine* and all front ends that run."""
        for front_end in self.front_ends:
            if front_end.control is not None:
                self.connect(engine, front_end)

    def connect_engines(self, front_end: Process) -> None:
        """Create channels between *front_end* and all engines that are ready."""
        for engine in self.engines:
            if engine.is_ready:
                self.connect(engine, front_end)

    def forget(self, process: Process) -> None:
        """Expect no channel of *process*, which has ended, any more."""
        for front_end in self.front_ends:
            front_end.expected.pop(process.name, None)

    def are_missing(self, process: Process) -> bool:
        """Tell whether *process* lacks channels that it needs.

        A channel that was sent is missing until both ends report it. Of its channels,

        - an engine needs one at least,
        - a front end that starts needs one at least,
        - a front end that is ready needs all.
        """
        # Only front ends note which channels they expect, by engine.
        if process in self.engines:
            front_ends = [each for each in self.front_ends if process.name in each.expected]
            are_missing = [self._is_missing(each, process) for each in front_ends]
            return bool(are_missing) and all(are_missing)

        engines = [engine for engine in self.engines if engine.name in process.expected]
        are_missing = [self._is_missing(process, engine) for engine in engines]
        if process.is_ready:
            return any(are_missing)
        return bool(are_missing) and all(are_missing)

    @staticmethod
    def _is_missing(front_end: Process, engine: Process) -> bool:
        number = front_end.expected[engine.name]
        return number not in front_end.has or number not in engine.has


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
