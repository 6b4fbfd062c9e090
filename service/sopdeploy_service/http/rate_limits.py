"""Rate limits of API keys: one token bucket per key."""

import math
import time
from collections.abc import Callable, MutableSequence
from typing import TypeAlias

from sopdeploy_service.inference.results import HttpError, RejectedError

# Tokens, and the time of the last fill; 0 before the first one.
BucketState: TypeAlias = "MutableSequence[float] | memoryview[float]"
CreateBucketState: TypeAlias = Callable[[int], BucketState]  # for the number of a key


def local_state(_key: int) -> BucketState:
    """Create the state of a bucket that no other process uses."""
    return [0.0, 0.0]


class TokenBucket:
    """Holds up to *burst* tokens and gains *rate* per second; an image takes one. For one event loop."""

    def __init__(self, rate: float, burst: int, state: BucketState) -> None:
        self._rate, self.burst, self._state = rate, burst, state
        if not state[1]:
            state[0], state[1] = float(burst), time.monotonic()

    def spend(self, num_images: int, *, check_only: bool = False) -> None:
        """Take the tokens of *num_images*, unless *check_only*.

        Raises `RejectedError`, and takes none, if *num_images* exceed the limit now.
        """
        tokens = self._fill()
        if num_images > self.burst:
            message = (
                f"{num_images} images exceed the limit of this key ({self.burst}); send fewer per request"
            )
            raise RejectedError(HttpError("too_many_images", 400, message))
        if num_images > tokens:
            wait = max(1, math.ceil((num_images - tokens) / self._rate))
            message = f"this key may send {self._rate:g} images per second; retry later"
            raise RejectedError(HttpError("rate_limited", 429, message, wait))
        if not check_only:
            self._state[0] = tokens - num_images

    def headers(self) -> dict[str, str]:
        """Format the response headers; `Reset` is the time in seconds until the bucket is full."""
        tokens = self._fill()
        return {
            "RateLimit-Limit": str(self.burst),
            "RateLimit-Remaining": str(max(0, int(tokens))),
            "RateLimit-Reset": str(math.ceil((self.burst - tokens) / self._rate)),
        }

    def _fill(self) -> float:
        """Add the tokens since the last fill; return their number."""
        tokens, filled = self._state
        now = time.monotonic()
        tokens = min(float(self.burst), tokens + (now - filled) * self._rate)
        self._state[0], self._state[1] = tokens, now
        return tokens
