"""Distribute connections over the processes behind one port.

Every process accepts from a socket of its own (SO_REUSEPORT), and the kernel chooses the socket by a hash of
the addresses: of 8 connections, one of two processes may get 7. A process that has accepted a connection
therefore passes it to the process with the fewest open connections, before it reads a byte. A process that
drains passes on all connections. The socket of a process that is not running stays open, so the supervisor
accepts its connections and passes them on.

The numbers of open connections are in shared memory, with the moments at which the event loops ran last. Each
number has one writer, so no locks are needed.
"""

import contextlib
import mmap
import os
import socket
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, Any

import numpy as np

from sopdeploy_service.server.sockets import accept_pending

OPEN, TAKEN, BEAT, SENT = 0, 1, 2, 3  # columns of a process's row; the number sent to process i: SENT + i
CLOSED = -1  # the process accepts no connections
FROM_CLIENT, FROM_PROCESS = b"c", b"p"


class Balancer:
    """Passes connections from one process to the others, by the shared numbers of open connections.

    *index* is the position of this process among those that read an inbox; the supervisor comes after the
    last of them. *counters* is a file descriptor of the shared numbers, *outboxes* are the writable ends of
    all inboxes.
    """

    def __init__(self, index: int, counters: int, outboxes: Sequence[socket.socket]) -> None:
        self._index = index
        self._outboxes = outboxes
        shape = (len(outboxes) + 1, SENT + len(outboxes))
        memory = mmap.mmap(counters, 8 * shape[0] * shape[1])
        self._counts = np.frombuffer(memory, np.int64).reshape(shape)

    def join(self) -> None:
        """Start to accept connections, after the connections left in the inbox have been read."""
        self._counts[self._index, TAKEN] = self._counts[:, SENT + self._index].sum()
        self.beat()
        self._counts[self._index, OPEN] = 0

    def leave(self, index: int | None = None) -> None:
        """Receive no more connections; the supervisor calls this for the ended process *index*."""
        self._counts[self._index if index is None else index, [OPEN, BEAT]] = CLOSED, 0

    def set_open(self, connections: int) -> None:
        """Publish the number of open *connections*."""
        if self.accepts(self._index):
            self._counts[self._index, OPEN] = connections

    def beat(self) -> None:
        """Record that the event loop of this process runs."""
        self._counts[self._index, BEAT] = time.monotonic_ns()

    def last_beat(self, index: int) -> float:
        """Return when the event loop of process *index* ran last, as `time.monotonic`; 0 if it has left."""
        return float(self._counts[index, BEAT]) / 1e9

    def set_taken(self) -> None:
        """Record that a connection from the inbox is now included in the published number of open ones."""
        self._counts[self._index, TAKEN] += 1

    def accepts(self, index: int) -> bool:
        """Tell whether process *index* accepts connections."""
        return bool(self._counts[index, OPEN] != CLOSED)

    def hand_over(self, connection: int) -> bool:
        """Pass the file descriptor *connection* to the process with the fewest open connections.

        Returns False if the connection stays in this process: because it has the fewest, no other process
        accepts connections, or the other inbox is full.
        """
        count = len(self._outboxes)
        opened = self._counts[:count, OPEN].copy()
        loads = opened + self._counts[:, SENT:].sum(axis=0) - self._counts[:count, TAKEN]
        loads[opened == CLOSED] = np.iinfo(np.int64).max
        target = int(loads.argmin())
        if opened[target] == CLOSED or (self._index < count and loads[target] >= loads[self._index]):
            return False
        self._counts[self._index, SENT + target] += 1  # before it can be received
        try:
            socket.send_fds(self._outboxes[target], [FROM_CLIENT], [connection])
        except OSError:
            self._counts[self._index, SENT + target] -= 1
            return False
        return True

    def connect(self, index: int) -> socket.socket:
        """Open an internal connection to process *index*; balancing does not count it.

        Raises `OSError` if the inbox is full.
        """
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with theirs:
            try:
                socket.send_fds(self._outboxes[index], [FROM_PROCESS], [theirs.fileno()])
            except OSError:
                ours.close()
                raise
        return ours

    def relay(self, index: int, listener: socket.socket, inbox: socket.socket) -> None:
        """Pass on connections that wait for the ended process *index*, if other processes accept some."""
        if not any(self.accepts(other) for other in range(len(self._outboxes))):
            return
        clients, processes = receive(inbox)
        for connection in processes:
            connection.close()
        self._counts[self._index, SENT + index] -= len(clients)
        for connection in (*clients, *accept_pending(listener)):
            with connection:
                self.hand_over(connection.fileno())


def receive(inbox: socket.socket) -> tuple[list[socket.socket], list[socket.socket]]:
    """Receive the connections of clients and of other processes that wait in the non-blocking *inbox*."""
    clients: list[socket.socket] = []
    processes: list[socket.socket] = []
    with contextlib.suppress(OSError):  # none is left
        while True:
            sender, numbers, _, _ = socket.recv_fds(inbox, 1, 1)
            for number in numbers:
                try:
                    connection = socket.socket(fileno=number)
                except OSError:  # not a socket: the sender may be an exploited process
                    os.close(number)
                    continue
                connection.setblocking(False)
                (clients if sender == FROM_CLIENT else processes).append(connection)
    return clients, processes


@dataclass(frozen=True, slots=True)
class Inbox:
    """Two ends of a pair of sockets: one process reads connections, the others write them."""

    reads: socket.socket
    writes: socket.socket


class Group:
    """The shared connection counts and the inboxes of *count* processes; they outlive each process."""

    def __init__(self, count: int) -> None:
        self.counters: IO[bytes]  # closed by `close`
        if hasattr(os, "memfd_create"):  # a container may have no folder for temporary files
            self.counters = os.fdopen(os.memfd_create("connections"), "r+b")
        else:
            self.counters = tempfile.TemporaryFile()  # noqa: SIM115
        rows = np.zeros((count + 1, SENT + count), np.int64)
        rows[:, OPEN] = CLOSED
        self.counters.write(rows.tobytes())
        self.counters.flush()
        self.inboxes = [Inbox(*socket.socketpair()) for _ in range(count)]
        for inbox in self.inboxes:
            inbox.reads.setblocking(False)
            inbox.writes.setblocking(False)

    def member(self, index: int) -> Balancer:
        """Create the balancer of process *index*, or of the supervisor after the last one."""
        return Balancer(index, self.counters.fileno(), [inbox.writes for inbox in self.inboxes])

    def launch_config(self, index: int) -> dict[str, Any]:
        """List the file descriptors and numbers that process *index* inherits, for `join_group`."""
        return {
            "index": index,
            "counters": self.counters.fileno(),
            "inbox": self.inboxes[index].reads.fileno(),
            "outboxes": [inbox.writes.fileno() for inbox in self.inboxes],
        }

    def close(self) -> None:
        """Close all files; running processes have their own."""
        self.counters.close()
        for inbox in self.inboxes:
            inbox.reads.close()
            inbox.writes.close()


def inherited_files(config: dict[str, Any]) -> tuple[int, ...]:
    """List the file descriptors in *config*, a result of `Group.launch_config`."""
    return (config["counters"], config["inbox"], *config["outboxes"])


def join_group(config: dict[str, Any]) -> tuple[Balancer, socket.socket]:
    """Create the balancer and the inbox of a process from *config*."""
    outboxes = [socket.socket(fileno=number) for number in config["outboxes"]]
    for outbox in outboxes:
        outbox.setblocking(False)
    inbox = socket.socket(fileno=config["inbox"])
    inbox.setblocking(False)
    balancer = Balancer(config["index"], config["counters"], outboxes)
    os.close(config["counters"])
    return balancer, inbox
