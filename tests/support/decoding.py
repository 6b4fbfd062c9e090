"""A child that decodes, on an event loop of its own."""

import asyncio
import math
from collections.abc import Iterator
from contextlib import contextmanager

from sopdeploy.images.preprocess import Preprocess
from sopdeploy_service.decoding import child, pool
from sopdeploy_service.inference.daemon_threads import running_loop

RULES = Preprocess(resize=36, crop=32)


class Child(pool.DecoderProcess):
    """A child whose calls wait in the thread of a test; `restrictions` are those of its sandbox."""

    def __init__(
        self, template: pool.Template, options: child.ChildOptions, loop: asyncio.AbstractEventLoop
    ) -> None:
        super().__init__(template, options, 60)
        self._waits_on = loop
        self.restrictions = asyncio.run_coroutine_threadsafe(self.start(), loop).result(60)

    def decode(self, image: bytes) -> pool.Reply | pool.Ended:
        """Let the child decode *image*."""

        async def run() -> pool.Reply | pool.Ended:
            size = math.prod((RULES.crop, RULES.crop, 3))
            rules = RULES.model_dump_json().encode()
            result = asyncio.get_running_loop().create_future()
            self.run(pool.Request(image, rules, child.PIXELS, range(size, size + 1), result))
            return await result

        return asyncio.run_coroutine_threadsafe(run(), self._waits_on).result(60)


@contextmanager
def running_child(template: pool.Template, options: child.ChildOptions) -> Iterator[Child]:
    """Start a child with *options*; end it after the block."""
    with running_loop() as loop:
        one = Child(template, options, loop)
        yield one

        async def close() -> None:
            one.close(None)
            await asyncio.sleep(0)  # which closes the connection

        asyncio.run_coroutine_threadsafe(close(), loop).result(60)


def error_of(reply: pool.Reply | pool.Ended) -> str:
    """Return the code of an error, `larger`, `ended` or an empty string."""
    if isinstance(reply, pool.Ended):
        return "ended"
    if reply.kind == child.LARGER:
        return "larger"
    return "" if reply.kind == child.PIXELS else child.ERRORS[reply.kind - child.FIRST_ERROR][0]
