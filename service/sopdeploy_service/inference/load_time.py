"""How long a load may take, and the wait for what runs in a daemon thread."""

import asyncio
from concurrent.futures import Future
from typing import TypeVar

from sopdeploy.errors import RuntimeUnavailableError
from sopdeploy_service.runtime.choice import may_use_gpu
from sopdeploy_service.settings import Settings

LOAD_SECONDS_ON_CPU = 120.0
LOAD_SECONDS_ON_GPU = 600.0
LOAD_TIMEOUT = "load_timeout"  # code of the error

Result = TypeVar("Result")


def wait_in_time(work: Future[Result], what: object, settings: Settings) -> Result:
    """Wait for the *work* of a daemon thread on *what* as `finish_in_time` does, without an event loop."""
    seconds = load_seconds(settings)

    try:
        return work.result(seconds)
    except TimeoutError as error:
        if not work.cancel():  # it has ended meanwhile, or raised this error itself
            return work.result()
        raise _too_slow(what, seconds) from error


async def finish_in_time(work: Future[Result], what: object, settings: Settings) -> Result:
    """Wait for *work* on *what*, at most as long as a load may take; raises `RuntimeUnavailableError`."""
    result = asyncio.wrap_future(work)
    seconds = load_seconds(settings)

    try:
        # `wait_for` of Python 3.11 may swallow a cancellation.
        async with asyncio.timeout(seconds):
            return await result
    except TimeoutError as error:
        if not result.cancelled():  # the work itself raised this error
            raise
        raise _too_slow(what, seconds) from error


def load_seconds(settings: Settings) -> float:
    """Return how long a load may take: on a GPU, libraries are loaded and kernels chosen, too."""
    return LOAD_SECONDS_ON_GPU if may_use_gpu(settings) else LOAD_SECONDS_ON_CPU


def _too_slow(what: object, seconds: float) -> RuntimeUnavailableError:
    return RuntimeUnavailableError(
        f"{what}: not loaded within {seconds:g} s; check the device and the disk",
        code=LOAD_TIMEOUT,
    )
