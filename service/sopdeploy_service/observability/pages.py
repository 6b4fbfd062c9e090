"""What many clients ask for at no price: made once a second and shared, such as the page of metrics."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Generic, TypeVar

from prometheus_client import CollectorRegistry, Gauge

SHARED_SECONDS = 1.0  # at most one in this time
_UP = (
    b"# HELP sopdeploy_worker_up Whether the process responds, if there are several",
    b"# TYPE sopdeploy_worker_up gauge",
)

_Value = TypeVar("_Value")


class Shared(Generic[_Value]):
    """What *make* returns: made at most once a second, and shared by all who ask. For one event loop.

    However many ask, the cost is that of one. Who asks while it is made waits for it.
    """

    def __init__(self, make: Callable[[], Awaitable[_Value]]) -> None:
        self._make = make
        self._made: asyncio.Future[_Value] | None = None
        self._next = 0.0  # the time from which another one may be made

    async def get(self) -> _Value:
        """Return what was made in the last second, or make it; raises what *make* raises."""
        now = time.monotonic()
        if self._made is None or (self._made.done() and now >= self._next):
            self._made = asyncio.ensure_future(self._make())
            self._next = now + SHARED_SECONDS

        # One who leaves does not cancel it for the others
        return await asyncio.shield(self._made)


def keys_gauge(registry: CollectorRegistry) -> Gauge:
    """Create the gauge of the key file in *registry*: of a server process, or of the supervisor."""
    return Gauge(
        "sopdeploy_keys_unreadable",
        "1 if the key file could not be read the last time, so that the keys before stay in use",
        registry=registry,
    )


def merge_metrics(pages: Mapping[str, bytes], supervisor: bytes) -> bytes:
    """Merge the metrics *pages* of processes, by their names, and the page of the *supervisor*.

    Adds the label `process`, and the metric `sopdeploy_worker_up`, which is 0 for a page that
    is empty.
    """
    # Which processes have answered is a metric of its own.
    sent_pages = {process: page for process, page in pages.items() if page}
    up_samples = [
        b'sopdeploy_worker_up{process="%b"} %d.0' % (process.encode(), process in sent_pages)
        for process in pages
    ]

    # The lines of each metric, by its name: help, type, and the samples of all processes.
    lines_of_metric = {_name_of_type(_UP[1]): [*_UP, *up_samples]}
    for process, page in {**sent_pages, "supervisor": supervisor}.items():
        help_line = b""
        lines: list[bytes] = []
        for line in page.split(b"\n")[:-1]:
            if line.startswith(b"# HELP"):
                help_line = line
            elif line.startswith(b"# TYPE"):
                # A metric has one type, that of the first process.
                lines = lines_of_metric.setdefault(_name_of_type(line), [help_line, line])
            else:
                lines.append(_with_label(line, b'process="%b"' % process.encode()))

    return b"".join(line + b"\n" for lines in lines_of_metric.values() for line in lines)


def _name_of_type(line: bytes) -> bytes:
    """Return the name of the metric in a *line* `# TYPE name type`."""
    return line.split()[2]


def _with_label(sample: bytes, label: bytes) -> bytes:
    """Put *label* first into the line of a *sample*, `name value` or `name{labels} value`."""
    name, brace, rest = sample.partition(b"{")
    if brace:
        return b"%b{%b,%b" % (name, label, rest)
    name, _, value = sample.partition(b" ")
    return b"%b{%b} %b" % (name, label, value)
