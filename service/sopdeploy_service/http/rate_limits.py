"""Rate limits of API keys: one token bucket per key."""

import math
import time

from sopdeploy_service.inference.results import RejectedError, Rejection


class TokenBucket:
    """Holds up to *burst* tokens and gains *rate* per second; an image takes one. For one event loop."""

    def __init__(self, rate: float, burst: int, number: int = 0) -> None:  # noqa: ARG002 - for subclasses
        self._rate = rate
        self.burst = burst
        self._tokens = float(burst)
        self._filled = time.monotonic()

    def spend(self, images: int, *, check_only: bool = False) -> None:
        """Take the tokens of *images*, unless *check_only*.

        Raises `RejectedError`, and takes none, if *images* exceed the limit now.
        """
        self._fill()
        if images > self.burst:
            message = f"{images} images exceed the limit of this key ({self.burst}); send fewer per request"
            raise RejectedError(Rejection("too_many_images", 400, message))
        if images > self._tokens:
            wait = max(1, math.ceil((images - self._tokens) / self._rate))
            message = f"this key may send {self._rate:g} images per second; retry later"
            raise RejectedError(Rejection("rate_limited", 429, message, wait))
        if not check_only:
            self._tokens -= images

    def headers(self) -> dict[str, str]:
        """Format the response headers; `Reset` is the time in seconds until the bucket is full."""
        self._fill()
        return {
            "RateLimit-Limit": str(self.burst),
            "RateLimit-Remaining": str(max(0, int(self._tokens))),
            "RateLimit-Reset": str(math.ceil((self.burst - self._tokens) / self._rate)),
        }

    def _fill(self) -> None:
        now = time.monotonic()
        self._tokens = min(float(self.burst), self._tokens + (now - self._filled) * self._rate)
        self._filled = now
