"""What becomes of one picture: an answer or a refusal. Both are values; neither is raised.

A refusal has a stable `code` and the HTTP status that fits it. The statuses keep the retry policies
apart: 4xx is the client's to mend, 429 and 503 may be sent again after `retry_after` seconds, 504
was too late, 500 is ours.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from sopdeploy.errors import ImageError

GATES = "gates"  # the output of a network that chooses among experts
FEW = 10  # classes that are looked for one by one, in all images at once; more need a sort of each alone

Ranked = list[tuple[int, float]]  # places of classes and their probabilities, best first


class Ranking:
    """Ranks the classes by *logits* (C,), one for each image; for one thread."""

    def __init__(self, logits: Sequence[NDArray[np.float32]]) -> None:
        self._logits = logits
        self._found: dict[int, list[Ranked]] = {}

    def top_k(self, image: int, count: int) -> Ranked:
        """Return the *count* most probable classes of *image*, equal ones in order; of C at most C."""
        if count > FEW:
            return ranked(best(self._logits[image], count)[None], self._logits[image][None])[0]
        if count not in self._found:
            logits = np.stack(self._logits)
            self._found[count] = ranked(largest(logits, count), logits)
        return self._found[count][image]


def ranked(places: NDArray[np.intp], logits: NDArray[np.float32]) -> list[Ranked]:
    """Return *places* (n, k) of classes with the probabilities that *logits* (n, C) give them."""
    probabilities = np.take_along_axis(softmax(logits), places, axis=1)
    return [list(zip(*row, strict=True)) for row in zip(places.tolist(), probabilities.tolist(), strict=True)]


def largest(values: NDArray[np.float32], count: int) -> NDArray[np.intp]:
    """Return the places (n, count) of the *count* largest of each row of *values* (n, C), as `best`."""
    left, rows = values.copy(), np.arange(len(values))
    found = np.empty((len(values), min(count, values.shape[1])), np.intp)
    for column in found.T:
        column[:] = left.argmax(axis=1)
        left[rows, column] = -np.inf
    return found


def best(values: NDArray[np.float32], count: int) -> NDArray[np.intp]:
    """Return the places of the *count* largest of finite *values* (C,), best first, equal ones in order.

    The rest is not sorted.
    """
    if count >= len(values):
        return np.argsort(-values, kind="stable")
    least = np.partition(values, -count)[-count]
    places = np.flatnonzero(values >= least)  # more than *count* where several are equal to the least
    return places[np.argsort(-values[places], kind="stable")[:count]]


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the probabilities (..., C) float64 of finite *logits* (..., C), without overflow."""
    powers = logits.astype(np.float64)
    powers -= powers.max(axis=-1, keepdims=True)
    np.exp(powers, out=powers)
    powers /= powers.sum(axis=-1, keepdims=True)
    return powers


class Prediction(NamedTuple):
    """The outputs (...) float32 of one picture by name, logits first, and what happened on the way.

    *ranking* ranks the classes of all pictures of the run, of which this is number *place* of *batch*;
    *warnings* name what decoding changed in the picture.
    """

    outputs: Mapping[str, NDArray[np.float32]]
    queue_seconds: float
    infer_seconds: float
    batch: int
    ranking: Ranking
    row: int
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Rejection:
    """Why a picture, or a whole request, gets no answer; *retry_after* is in seconds."""

    code: str
    status: int
    message: str
    retry_after: int | None = None

    @classmethod
    def of(cls, problem: ImageError) -> "Rejection":
        """Return the refusal that *problem* stands for."""
        return cls(problem.code, problem.status, str(problem))


Outcome: TypeAlias = Prediction | Rejection

DRAINING = Rejection("draining", 503, "the server is shutting down; send it to another one", 1)
ENGINE_DEAD = Rejection("engine_dead", 503, "the engine has stopped; the server is restarting", 5)
DEADLINE = Rejection("deadline", 504, "no answer before the deadline; the server is overloaded")
ENGINE_FAILED = Rejection("engine_failed", 500, "the engine failed on this image")
DECODER_FAILED = Rejection("decoder_failed", 500, "the decoder failed on this image")
NONFINITE = Rejection("nonfinite_output", 500, "the network gave numbers that are not finite for this image")
TOO_LATE = Rejection("deadline_unreachable", 503, "so many images wait that the deadline cannot be met", 1)
OUT_OF_MEMORY = Rejection(
    "out_of_memory", 503, "the engine has no memory for this image now; send it again", 2
)
CLIENT_GONE = Rejection("client_gone", 499, "the client closed the connection")


def queue_full(retry_after: int) -> Rejection:
    """Return the refusal of an image that finds the queue full; *retry_after* in seconds."""
    return Rejection("queue_full", 429, "too many images are waiting; send it later", retry_after)


def answer(
    ranked: Ranked,
    labels: Sequence[str],
    *,
    warnings: tuple[str, ...] = (),
    gates: NDArray[np.float32] | None = None,
) -> dict[str, Any]:
    """Return a `schema.Classes` as JSON has it: the classes of *ranked*, places in *labels*.

    *gates* (N,) are the weights of a gate's experts, where they belong into the answer.
    """
    found: dict[str, Any] = {
        "classes": [{"label": labels[place], "probability": probability} for place, probability in ranked],
        "warnings": warnings,
    }
    return found if gates is None else {**found, "gates": experts(gates)}


def experts(gates: NDArray[np.float32]) -> list[dict[str, Any]]:
    """Return the experts whose weight in *gates* (N,) is not 0, best first; equal ones in their order."""
    return [
        {"expert": place, "weight": float(gates[place])}
        for place in best(gates, len(gates)).tolist()
        if gates[place] != 0
    ]
