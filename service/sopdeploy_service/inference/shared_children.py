"""The children of a kind, which clients share: images wait for one in groups, which take turns.

Of large images, each client has two groups: slow ones, which are small but took too long for a
light child, and large ones. If too many images wait, the group with most pixels loses its last
one. An image that cannot be ready in time is refused, or skipped if another one can.
"""

import itertools
import time
from collections import Counter, OrderedDict
from typing import TypeAlias

from sopdeploy.images.limits import MAX_PIXELS
from sopdeploy_service.decoding.pool import DecoderProcess, Request
from sopdeploy_service.inference import results
from sopdeploy_service.inference.pace import Pace, check_time, retry_after
from sopdeploy_service.observability.busy import BusyShare
from sopdeploy_service.observability.metrics import Metrics

MAX_WAITING = 8  # large images of the largest size, or 46 of 12 megapixels; others get 503
# Groups take turns: a client, and whether its images are slow ones. None is for light images, and
# for the server's own requests.
Group: TypeAlias = tuple[str, bool] | None
USUAL_PACE = 0.5  # the seconds that a header tells are twice those of ordinary files


class SharedChildren:
    """Children of a kind, which clients share: those that are idle, or the requests that wait for one.

    Requests run in the order of arrival within each `Group`; the groups take turns.
    """

    def __init__(self, metrics: Metrics, max_pixels: int = MAX_PIXELS) -> None:
        self._metrics = metrics
        self._max_waiting_pixels = MAX_WAITING * max_pixels
        self._is_closed = False
        self.pace = Pace(USUAL_PACE)

        self.idle: list[DecoderProcess] = []
        self.busy = BusyShare()
        metrics.busy_shares.append(self.busy)
        self._running: set[Request] = set()
        # By group: the requests that wait, in order. The first group has the next turn.
        self._groups: OrderedDict[Group, OrderedDict[Request, None]] = OrderedDict()

    def put(self, request: Request, group: Group) -> None:
        """Let an idle child run *request* of *group*, or let it wait.

        If the images that wait, this one included, have too many pixels, the group with most
        pixels loses its last image, until few enough pixels wait. If *group* has most pixels,
        *request* is refused. Requests of the group None are never refused for this. A request
        that would have to wait too long is refused. After `close`, every request is.
        """
        if self._is_closed:
            request.settle(results.DRAINING)
            return

        if self.idle:
            self._run(self.idle.pop(), request)
            return

        # Refuse what cannot be ready in time.
        seconds = self.wait_seconds(group) + request.work * self.pace.factor
        refusal = check_time(seconds, request.latest)
        if refusal is not None:
            request.settle(refusal)
            return

        if group is not None and not self._make_room(request, group):
            request.settle(retry_after(results.DECODERS_BUSY, seconds))
            return
        self._groups.setdefault(group, OrderedDict())[request] = None
        request.result.add_done_callback(lambda _: self._remove(request, group))

    def wait_seconds(self, group: Group) -> float:
        """Estimate how long the next image of *group* would wait for a child."""
        if self.idle or not self._running:  # none runs before the start
            return 0.0

        # Groups take turns: of the others, as many images run before it as its own group has.
        turns = len(self._groups.get(group, ())) + 1
        work = 0.0
        for requests in self._groups.values():
            work += sum(request.work for request in itertools.islice(requests, turns))

        # What runs has been running for a while, half of its time on average.
        work += sum(request.work for request in self._running) / 2
        return work * self.pace.factor / len(self._running)

    @property
    def num_running(self) -> int:
        """How many images children have."""
        return len(self._running)

    def has_room(self, pixels: int, group: Group) -> bool:
        """Estimate whether an image of *group* with *pixels* would run or wait now, and not be refused."""
        counts = self._count_pixels(pixels, group)
        is_largest = counts[group] == max(counts.values())
        return bool(self.idle) or counts.total() <= self._max_waiting_pixels or not is_largest

    def _count_pixels(self, pixels: int, group: Group) -> Counter[Group]:
        """Count the pixels that wait by group, as if *pixels* of *group* waited, too."""
        counts: Counter[Group] = Counter()
        for other, requests in self._groups.items():
            counts[other] = sum(request.pixels for request in requests)
        counts[group] += pixels
        return counts

    def _make_room(self, request: Request, group: Group) -> bool:
        """Refuse images until *request* of *group* can wait; return False if it is itself to be refused."""
        pixels = self._count_pixels(request.pixels, group)

        # Refuse the last image of the group with most pixels, unless that is *group*.
        while pixels.total() > self._max_waiting_pixels:
            largest = max(
                (other for other in pixels if other is not None),
                key=lambda other: pixels[other],
            )

            if pixels[group] == pixels[largest]:
                return False

            refused, _ = self._groups[largest].popitem()
            pixels[largest] -= refused.pixels
            if not self._groups[largest]:
                del self._groups[largest]
            wait = self.wait_seconds(largest)
            refused.settle(retry_after(results.DECODERS_BUSY, wait))
        return True

    def _remove(self, request: Request, group: Group) -> None:
        """Forget *request* of *group*, for which nobody waits any more, and its image."""
        if (waiting := self._groups.get(group)) is not None:
            waiting.pop(request, None)
            if not waiting:
                del self._groups[group]

    def finish(self, child: DecoderProcess, request: Request, is_done: bool) -> None:
        """Let *child*, which had *request*, run the next one; *is_done* tells whether it has decoded it."""
        self._running.discard(request)
        self.busy.change(-1)
        seconds = request.busy_seconds()
        self._metrics.decode_seconds.inc(seconds)
        if is_done:
            self.pace.record(request.work, seconds)

        self.give_work(child)

    def give_work(self, child: DecoderProcess) -> None:
        """Let *child* run the next request that can be ready in time; if none can, the first one, or none.

        Those before it are skipped; their timers refuse them.
        """
        skipped: Request | None = None

        while self._groups:
            group, waiting = self._groups.popitem(last=False)
            request, _ = waiting.popitem(last=False)
            if waiting:
                self._groups[group] = waiting  # after all others

            if request.result.done():  # nobody waits for it any more
                continue
            if time.monotonic() + request.work * self.pace.factor <= request.latest:
                self._run(child, request)
                return
            skipped = skipped or request

        # An estimate that is too high must not skip them all, or it would never be corrected.
        if skipped is None:
            self.idle.append(child)
        else:
            self._run(child, skipped)

    def _run(self, child: DecoderProcess, request: Request) -> None:
        """Let *child* run *request*."""
        self._running.add(request)
        self.busy.change(1)
        child.run(request)

    def close(self) -> None:
        """Refuse the requests that wait and those to come."""
        self._is_closed = True
        for request in itertools.chain.from_iterable(self._groups.values()):
            request.settle(results.DRAINING)

        self._groups.clear()
