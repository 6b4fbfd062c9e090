"""The socket between the supervisor and another process of a server, and the memory that processes share.

The supervisor sends the connections of clients, and to front ends and engines the ends of their channels.
Each process reports its status ten times per second. Both sides may ask the other for metrics. An empty
message means that the other one has ended or left.

The shared memory has the state of every bucket of a rate limit and the number of images that each process has
admitted, without a lock: if two processes charge a key in the same microsecond, one of the charges is lost.
"""

import asyncio
import contextlib
import socket
import struct
from collections.abc import Iterable, Mapping
from functools import partial
from types import SimpleNamespace
from typing import cast

from prometheus_client import CollectorRegistry, Metric, ProcessCollector, generate_latest
from prometheus_client.parser import text_string_to_metric_families

# Messages with a file; the name of the engine or front end at the other end of a channel follows
CLIENT, SEND_METRICS, CHANNEL = b"client", b"metrics", b"channel "
RELOAD = b"reload"  # the bundles
SPEED = b"speed "  # seconds that the loaded models of a device need for an image
FRONT_ENDS = b"front ends "  # the answer: their number; with 0, the device serves HTTP itself
NEW_MODELS, BAD_FRONT_END = b"models", b"bad "  # of an engine: after a reload; with the name of a front end
STATUS = struct.Struct("=QI")  # connections received and open ones, or images; then names of bundles
ADMITTED_BYTES, LIMIT_BYTES = 4096, 16  # of the shared memory: for all processes, then for each key
METRICS_SECONDS = 1.0  # a process that takes longer counts as down; the supervisor has twice the time


def receive_message(control: socket.socket) -> tuple[bytes, list[int]]:
    """Receive a waiting message and its files; both are empty if the other end has ended or left."""
    try:
        data, files, _, _ = socket.recv_fds(control, 4096, 2)
    except OSError:
        return b"", []
    return data, files


def send_message(control: socket.socket, message: bytes, *files: int) -> bool:
    """Send *message* with *files*; return whether the other end gets it."""
    try:
        socket.send_fds(control, [message], files)
    except OSError:
        return False
    return True


async def request_metrics(control: socket.socket | None, seconds: float) -> bytes:
    """Return the metrics of the process or supervisor at the other end; empty after *seconds*."""
    with contextlib.ExitStack() as stack, contextlib.suppress(OSError):  # no free file, or a TimeoutError
        ours, theirs = map(stack.enter_context, socket.socketpair())
        if control is None or not send_message(control, SEND_METRICS, theirs.fileno()):
            return b""
        theirs.close()  # the page ends when the other process closes its copy
        ours.setblocking(False)
        async with asyncio.timeout(seconds):
            page = b""
            while piece := await asyncio.get_running_loop().sock_recv(ours, 1 << 16):
                page += piece
            return page
    return b""  # no answer in time, or an error


async def send_metrics(file: int, page: bytes) -> None:
    """Answer `request_metrics`, which sent the socket *file*, with *page*."""
    with contextlib.suppress(OSError), socket.socket(fileno=file) as connection:
        connection.setblocking(False)
        await asyncio.get_running_loop().sock_sendall(connection, page)


def merge_metrics(pages: Mapping[str, bytes], ids: Mapping[str, int]) -> bytes:
    """Merge the metrics *pages* of processes by name; add the label `process` and `sopdeploy_worker_up`.

    A page is empty if its process is down. The `process_*` metrics are collected here, of the processes with
    *ids*, by name; the supervisor has an id but no page.
    """
    up = Metric("sopdeploy_worker_up", "Whether a process that serves HTTP answers", "gauge")
    merged: dict[str, Metric] = {}  # by name of the metric, with the samples of all processes

    def add_samples(process: str, metrics: Iterable[Metric]) -> None:
        for metric in metrics:
            empty = Metric(metric.name, metric.documentation, metric.type)
            samples = merged.setdefault(metric.name, empty).samples
            for sample in metric.samples:
                samples.append(sample._replace(labels={**sample.labels, "process": process}))

    for process, page in pages.items():
        up.add_sample(up.name, {"process": process}, 1.0 if page else 0.0)
        add_samples(process, text_string_to_metric_families(page.decode()))
    for process, pid in ids.items():  # the collector calls its *pid* to get the id
        add_samples(process, ProcessCollector(pid=partial(str, pid), registry=None).collect())
    collector = SimpleNamespace(collect=lambda: [up, *merged.values()])
    return generate_latest(cast(CollectorRegistry, collector))  # uses no other method than `collect`
