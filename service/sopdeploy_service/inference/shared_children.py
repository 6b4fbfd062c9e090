"""The children of a kind, which clients share: images wait for one in groups, which take turns.

Of large images, each client has two groups: slow ones, which are small but took too long for a
light child, and large ones. If too many images wait, the group with most pixels loses its last
one.
"""

import itertools
from collections import Counter, OrderedDict
from typing import TypeAlias

from sopdeploy.images.limits import MAX_PIXELS
from sopdeploy_service.decoding.pool import DecoderProcess, Request
from sopdeploy_service.inference import results
from sopdeploy_service.observability.metrics import Metrics

MAX_WAITING = 8  # large images of the largest size, or 46 of 12 megapixels; others get 503
# Groups take turns: a client, and whether its images are slow ones. None is for light images, and
# for the server's own requests.
Group: TypeAlias = tuple[str, bool] | None


class SharedChildren:
    """Children of a kind, which clients share: those that are idle, or the requests that wait for one.

    Requests run in the order of arrival within each `Group`; the groups take turns.
    """

    def __init__(self, metrics: Metrics, max_pixels: int = MAX_PIXELS) -> None:
        self._metrics = metrics
        self._max_waiting_pixels = MAX_WAITING * max_pixels
        self._is_closed = False

        self.idle: list[DecoderProcess] = []
        # By group: the requests that wait, in order. The first group has the next turn.
        self._groups: OrderedDict[Group, OrderedDict[Request, None]] = OrderedDict()

    def put(self, request: Request, group: Group) -> None:
        """Let an idle child run *request* of *group*, or let it wait.

        If the images that wait, this one included, have too many pixels, the group with most
        pixels loses its last image, until few enough pixels wait. If *group* has most pixels,
        *request* is refused. Requests of the group None are never refused for this. After
        `close`, every request is refused.
        """
        if self._is_closed:
            request.settle(results.DRAINING)
            return

        if self.idle:
            self.idle.pop().run(request)
            return

        if group is not None and not self._make_room(request, group):
            request.settle(results.DECODERS_BUSY)
            return
        self._groups.setdefault(group, OrderedDict())[request] = None
        request.result.add_done_callback(lambda _: self._remove(request, group))

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
            refused.settle(results.DECODERS_BUSY)
        return True

    def _remove(self, request: Request, group: Group) -> None:
        """Forget *request* of *group*, for which nobody waits any more, and its image."""
        if (waiting := self._groups.get(group)) is not None:
            waiting.pop(request, None)
            if not waiting:
                del self._groups[group]

    def give_work(self, child: DecoderProcess, seconds: float = 0.0) -> None:
        """Let *child*, which was busy for *seconds*, run the next group's first request, or keep it idle."""
        self._metrics.decode_seconds.inc(seconds)

        while self._groups:
            group, waiting = self._groups.popitem(last=False)
            request, _ = waiting.popitem(last=False)
            if waiting:
                self._groups[group] = waiting  # after all others

            if not request.result.done():  # somebody still waits for it
                child.run(request)
                return
        self.idle.append(child)

    def close(self) -> None:
        """Refuse the requests that wait and those to come."""
        self._is_closed = True
        for request in itertools.chain.from_iterable(self._groups.values()):
            request.settle(results.DRAINING)

        self._groups.clear()
