"""Outcomes of one image: a `Prediction` or an `HttpError`. `RejectedError` refuses a whole request.

An `HttpError` has a stable `code` and an HTTP status: 4xx is an error of the request, 429 and
503 may be sent again after `retry_after` seconds, 504 missed the deadline, 500 is an error of
the server.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from sopdeploy.errors import ImageError

if TYPE_CHECKING:  # a supervisor does not import it
    import numpy as np
    from numpy.typing import NDArray


class Prediction(NamedTuple):
    """The outputs of one image by name, (...) float32, logits first, with its timings.

    *stage_seconds* are by name: `decode_queue` and `decode` (of an encoded image), `queue`,
    `infer`, `explain`.
    *pixels* are the network's input. *warnings* name what decoding changed in the image.
    *occluded* has the logits (n, C) of its copies with a gray part, if an explanation was
    requested.
    """

    outputs: "Mapping[str, NDArray[np.float32]]"
    stage_seconds: Mapping[str, float]
    pixels: "NDArray[np.uint8]"
    warnings: tuple[str, ...] = ()
    occluded: "NDArray[np.float32] | None" = None


@dataclass(frozen=True, slots=True)
class HttpError:
    """The reason why an image or a whole request gets no prediction; *retry_after* is in seconds."""

    code: str
    status: int
    message: str
    retry_after: int | None = None

    @classmethod
    def from_image_error(cls, error: ImageError) -> "HttpError":
        """Convert the error of an image that cannot be decoded."""
        return cls(error.code, error.status, str(error))


class RejectedError(Exception):
    """Ends a request with the response of *reason*."""

    def __init__(self, reason: HttpError) -> None:
        super().__init__(reason.message)
        self.reason = reason


Outcome: TypeAlias = Prediction | HttpError

STARTING = HttpError(
    "starting",
    503,
    "the server has not started; an app around this one has to run its lifespan",
    1,
)
DRAINING = HttpError("draining", 503, "the server is shutting down; retry on another one", 1)
# A client whose time is short must not give up: the other servers behind the address are free
RUNTIME_DEAD = HttpError(
    "runtime_dead", 503, "the model worker has stopped; the server is restarting", 1
)
DEADLINE = HttpError(
    "deadline", 504, "no prediction before the deadline; the server is overloaded"
)
INFERENCE_FAILED = HttpError("inference_failed", 500, "inference failed on this image")
DECODERS_BUSY = HttpError(
    "decoders_busy", 503, "too many large images wait to be decoded; retry later", 5
)
DECODER_KILLED = HttpError(
    "decoder_killed", 503, "the image's decoder was killed twice; retry later", 5
)
DECODER_CRASHED = HttpError("decoder_crashed", 422, "the decoder crashed twice on this image")
DAMAGED = HttpError("damaged_image", 422, "the image is damaged, or its decoder took too long")
NONFINITE = HttpError(
    "nonfinite_output", 500, "the network's output for this image is not finite"
)
QUEUE_FULL = HttpError("queue_full", 429, "the queue is full; retry later", 1)
TOO_LATE = HttpError(
    "deadline_unreachable", 503, "the queue is too long to meet the deadline", 1
)
OUT_OF_MEMORY = HttpError(
    "out_of_memory", 503, "the device is out of memory for this image; retry", 2
)
CLIENT_GONE = HttpError("client_gone", 499, "the client closed the connection")
