"""A token bucket: so many images per second, and so many at once after a pause."""

import math
import time

from sopdeploy_service.http.problems import RejectedError
from sopdeploy_service.inference.results import Rejection


class TokenBucket:
    """Holds at most *burst* tokens and gains *rate* a second; an image takes one. For the event loop."""

    def __init__(self, rate: float, burst: int) -> None:
        self._rate = rate
        self._burst = burst
        self._tokens = float(burst)
        self._filled = time.monotonic()

    def refusal(self, images: int) -> Rejection | None:
        """Return why *images* would not be taken now, or None."""
        self._fill()
        if images > self._burst:
            most = f"{images} images are more than this key may send at once ({self._burst})"
            return Rejection("too_many_images", 400, f"{most}; send fewer in one request")
        if images <= self._tokens:
            return None
        wait = max(1, math.ceil((images - self._tokens) / self._rate))
        return Rejection(
            "rate_limited", 429, f"this key may send {self._rate:g} images per second; send it later", wait
        )

    def check(self, images: int) -> None:
        """Raise `RejectedError` if *images* exceed the limit now; take no tokens."""
        rejection = self.refusal(images)
        if rejection is not None:
            raise RejectedError(rejection)

    def spend(self, images: int) -> None:
        """Take the tokens of *images*, or raise `RejectedError` and take none."""
        self.check(images)
        self._tokens -= images

    def headers(self) -> dict[str, str]:
        """Return what an answer tells of the limit; `Reset` is the seconds until the bucket is full again."""
        self._fill()
        return {
            "RateLimit-Limit": str(self._burst),
            "RateLimit-Remaining": str(int(self._tokens)),
            "RateLimit-Reset": str(math.ceil((self._burst - self._tokens) / self._rate)),
        }

    def _fill(self) -> None:
        now = time.monotonic()
        self._tokens = min(float(self._burst), self._tokens + (now - self._filled) * self._rate)
        self._filled = now
