"""What becomes of one picture: an answer or a refusal. Both are values; neither is raised.

A refusal has a stable `code` and the HTTP status that fits it. The statuses keep the retry policies
apart: 4xx is the client's to mend, 429 and 503 may be sent again after `retry_after` seconds, 504
was too late, 500 is ours.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from sopdeploy.errors import ImageError
from sopdeploy_service.ranking import Ranking


class Answered(NamedTuple):
    """The outputs (...) float32 of one picture by name, logits first, and what happened on the way.

    *ranking* ranks the classes of all pictures of the run, of which this is number *place* of *batch*;
    *warnings* name what decoding changed in the picture.
    """

    outputs: Mapping[str, NDArray[np.float32]]
    queue_seconds: float
    infer_seconds: float
    batch: int
    ranking: Ranking
    place: int
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a picture, or a whole request, gets no answer; *retry_after* is in seconds."""

    code: str
    status: int
    message: str
    retry_after: int | None = None

    @classmethod
    def of(cls, problem: ImageError) -> "Refusal":
        """Return the refusal that *problem* stands for."""
        return cls(problem.code, problem.status, str(problem))


Outcome: TypeAlias = Answered | Refusal

DRAINING = Refusal("draining", 503, "the server is shutting down; send it to another one", 1)
ENGINE_DEAD = Refusal("engine_dead", 503, "the engine has stopped; the server is restarting", 5)
DEADLINE = Refusal("deadline", 504, "no answer before the deadline; the server is overloaded")
ENGINE_FAILED = Refusal("engine_failed", 500, "the engine failed on this image")
DECODER_FAILED = Refusal("decoder_failed", 500, "the decoder failed on this image")
NONFINITE = Refusal("nonfinite_output", 500, "the network gave numbers that are not finite for this image")
TOO_LATE = Refusal("deadline_unreachable", 503, "so many images wait that the deadline cannot be met", 1)
OUT_OF_MEMORY = Refusal("out_of_memory", 503, "the engine has no memory for this image now; send it again", 2)
CLIENT_GONE = Refusal("client_gone", 499, "the client closed the connection")


def queue_full(retry_after: int) -> Refusal:
    """Return the refusal of an image that finds the queue full; *retry_after* in seconds."""
    return Refusal("queue_full", 429, "too many images are waiting; send it later", retry_after)
