"""A child that decodes, on an event loop of its own."""

import asyncio
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from sopdeploy.images.preprocess import Preprocess
from sopdeploy_service.decoding import child, pool
from sopdeploy_service.inference.daemon_threads import running_loop

RULES = Preprocess(resize=36, crop=32)


class Child(pool.DecoderProcess):
    """A child whose calls wait in the thread of a test; `restrictions` are those of its sandbox."""

    def __init__(
        self,
        template: pool.DecoderTemplate,
        options: child.ChildOptions,
        loop: asyncio.AbstractEventLoop,
        limit: float = 60.0,
    ) -> None:
        super().__init__(template, options, limit, on_idle=lambda *_: self._run_next())
        self._waits_on = loop
        self._waiting: list[pool.Request] = []
        self.restrictions = asyncio.run_coroutine_threadsafe(self.start(), loop).result(60)

    def decode(self, image: bytes, seconds: float = 0.0) -> pool.Reply | pool.ChildEnded:
        """Let the child decode *image*."""
        return self.decode_all([image], seconds)[0]

    def decode_all(
        self, images: Sequence[bytes], seconds: float = 0.0
    ) -> list[pool.Reply | pool.ChildEnded]:
        """Let the child decode *images*, each as soon as it has the one before."""

        async def run() -> list[pool.Reply | pool.ChildEnded]:
            size = math.prod((RULES.crop, RULES.crop, 3))
            loop = asyncio.get_running_loop()
            rules = RULES.model_dump_json().encode()
            sizes = range(size, size + 1)
            requests = [
                pool.Request(
                    image, rules, child.PIXELS, sizes, loop.create_future(), 0, seconds
                )
                for image in images
            ]
            self._waiting = list(requests)
            self._run_next()
            return await asyncio.gather(*(request.result for request in requests))

        return asyncio.run_coroutine_threadsafe(run(), self._waits_on).result(60)

    def _run_next(self) -> None:
        if self._waiting:
            self.run(self._waiting.pop(0))


@contextmanager
def running_child(
    template: pool.DecoderTemplate, options: child.ChildOptions, limit: float = 60.0
) -> Iterator[Child]:
    """Start a child with *options*, which has *limit* seconds for an image; end it after the block."""
    with running_loop() as loop:
        one = Child(template, options, loop, limit)
        yield one

        async def close() -> None:
            one.close(None)
            await asyncio.sleep(0)  # which closes the connection

        asyncio.run_coroutine_threadsafe(close(), loop).result(60)


def error_of(reply: pool.Reply | pool.ChildEnded) -> str:
    """Return the code of an error, `ended` or an empty string."""
    if isinstance(reply, pool.ChildEnded):
        return "ended"
    return "" if reply.kind == child.PIXELS else child.ERRORS[reply.kind - child.FIRST_ERROR][0]
