"""`front_ends` above 1: an engine process per device and several front ends, connected by the supervisor.

Both kinds of processes keep a socket to the supervisor, the broker. Whenever a front end or an engine has
started, the supervisor creates a channel and sends one end to each. So a front end needs no right to open
sockets, and either side can be replaced while the other runs.
"""

import contextlib
import logging
import socket
import subprocess
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sopdeploy.environment import usable_cores
from sopdeploy.errors import ConfigError
from sopdeploy_service.inference.engine_process.channel import open_pair
from sopdeploy_service.settings import Settings

ENGINE_SECONDS = 5.0  # an engine process without a heartbeat for this long is killed
MAX_AUTO, CORES_PER_FRONT_END = 8, 4
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # cgroup v2: microseconds per period

log = logging.getLogger("sopdeploy.supervisor")


def count_front_ends(settings: Settings) -> int:
    """Return the number of front ends per device.

    `auto` is a quarter of the cores, at most 8, divided by the number of devices. With a shadow, which needs
    a single process, `auto` is 1. Raises `ConfigError` if `auto` is 1 and a sandbox is required.
    """
    if settings.front_ends != "auto":
        return settings.front_ends
    cores = cores_within_quota()
    count = max(1, min(MAX_AUTO, cores // CORES_PER_FRONT_END) // max(1, len(settings.devices)))
    if settings.shadow is not None:
        count = 1
    if count == 1 and settings.sandbox == "required":
        raise ConfigError(
            f"sandbox=required: front_ends=auto is one process on {cores} cores; set front_ends=2 or more"
        )
    return count


def cores_within_quota() -> int:
    """Count the usable cores, at most the CPU time of the container's quota."""
    try:
        most, period = CPU_QUOTA.read_text().split()
        return min(usable_cores(), max(1, int(most) // int(period)))
    except (OSError, ValueError):  # no cgroup, or no quota: `max 100000`
        return usable_cores()


def share_limits(settings: Settings, front_ends: int) -> dict[str, int]:
    """Divide the limits of the whole server among its *front_ends*.

    Raises `ConfigError` if the share of a front end is too small for the largest request.
    """
    smallest = {
        "queue_size": settings.max_images * front_ends,
        "max_upload_bytes": -(-settings.max_body_bytes * 8 // 7) * front_ends,
    }
    small = [f"{name}={least}" for name, least in smallest.items() if getattr(settings, name) < least]
    if small:
        raise ConfigError(
            f"{front_ends} front ends share queue_size and max_upload_bytes, and the largest request "
            f"does not fit into a share; set {', '.join(small)} or start fewer front ends"
        )
    return {name: getattr(settings, name) // front_ends for name in smallest}


@dataclass(eq=False)
class Peer:
    """A process of a group; *broker* is the supervisor's end of its socket."""

    name: str
    broker: socket.socket | None = None
    child: "subprocess.Popen[str] | None" = None


@dataclass
class EngineGroup:
    """The engine process of one device and its front ends. Thread-safe."""

    engine: Peer
    front_ends: Sequence[Peer]
    _engine_ready: bool = False
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def open_broker(self, peer: Peer) -> socket.socket:
        """Create the broker of a process that is about to start; return the socket that it inherits."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with self._lock:
            if peer.broker is not None:
                peer.broker.close()
            peer.broker = ours
            if peer is self.engine:
                self._engine_ready = False
        return theirs

    def started(self, peer: Peer, child: "subprocess.Popen[str]") -> None:
        """Connect a front end that has started to its engine, if the engine is running."""
        with self._lock:
            peer.child = child
            if peer is not self.engine and self._engine_ready:
                self._connect(peer)

    def engine_ready(self) -> None:
        """Connect all front ends to the engine and watch its heartbeat from now on."""
        with self._lock:
            broker = self.engine.broker
            if broker is None:  # `close` was called while the engine started
                return
            self._engine_ready = True
            for peer in self.front_ends:
                self._connect(peer)
            broker.settimeout(ENGINE_SECONDS)
            watched = broker, self.engine.child
        threading.Thread(target=self._watch, args=watched, name="engine watch", daemon=True).start()

    def close(self) -> None:
        """Close the brokers, which ends the engine."""
        with self._lock:
            for peer in (self.engine, *self.front_ends):
                if peer.broker is not None:
                    with contextlib.suppress(OSError):  # the other end may be closed
                        peer.broker.shutdown(socket.SHUT_RDWR)  # ends a `recv` of `_watch`, unlike `close`
                    peer.broker.close()
                    peer.broker = None

    def _connect(self, peer: Peer) -> None:
        if peer.broker is None or self.engine.broker is None:
            return
        with contextlib.ExitStack() as stack:
            ends = [stack.enter_context(end) for end in open_pair()]
            with contextlib.suppress(OSError):  # one of them has just died; it will be started again
                socket.send_fds(peer.broker, [b"engine"], [ends[0].fileno()])
                socket.send_fds(self.engine.broker, [peer.name.encode()], [ends[1].fileno()])

    def _watch(self, broker: socket.socket, child: "subprocess.Popen[str]") -> None:
        """Kill an engine without heartbeats, and front ends that it reports."""
        while True:
            try:
                message = broker.recv(1000).decode()
            except TimeoutError:
                log.error("the engine process %d hangs; it is killed", child.pid)
                child.kill()
                return
            except OSError:
                return
            if not message:
                return
            if message.startswith("replace "):
                for peer in self.front_ends:
                    if peer.name == message.removeprefix("replace ") and peer.child is not None:
                        peer.child.kill()
