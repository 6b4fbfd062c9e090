"""The request bodies in memory: their bytes have a limit."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from sopdeploy_service.inference.results import HttpError, RejectedError
from sopdeploy_service.settings import LARGE_BODY_SHARE

# Most images are smaller; the rest of the budget, beside `LARGE_BODY_SHARE`, is for such bodies
SMALL_BODY = 1_000_000

UPLOADS_FULL = HttpError(
    "uploads_full", 429, "too many bytes are being uploaded; retry later", 2
)


@dataclass(slots=True)
class Body:
    """The body of a request, of which `num_bytes` are in memory."""

    num_bytes: int = 0


class Uploads:
    """The bodies of all requests, in at most *budget* bytes."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.num_bytes = 0

    @contextmanager
    def open(self) -> Iterator[Body]:
        """Count a body, which `add` lets grow, until the end of the block."""
        body = Body()
        try:
            yield body
        finally:
            self.num_bytes -= body.num_bytes

    def check(self, body: Body, more: int) -> None:
        """Raise `RejectedError` (429) if *body* could not grow by *more* bytes."""
        # Large bodies leave the rest to small ones.
        is_large = body.num_bytes + more > SMALL_BODY
        budget = int(self.budget * LARGE_BODY_SHARE) if is_large else self.budget
        if self.num_bytes + more > budget:
            raise RejectedError(UPLOADS_FULL)

    def add(self, body: Body, more: int) -> None:
        """Let *body* grow by *more* bytes, or raise `RejectedError` (429)."""
        self.check(body, more)
        body.num_bytes += more
        self.num_bytes += more
