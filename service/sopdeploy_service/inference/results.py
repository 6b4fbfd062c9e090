"""Outcomes of one image: a `Prediction` or an `HttpError`. `RejectedError` refuses a whole request.

An `HttpError` has a stable `code` and an HTTP status that tells clients whether to retry: 4xx is an error of
the request, 429 and 503 may be sent again after `retry_after` seconds, 504 missed the deadline, 500 is an
error of the server.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from sopdeploy.decision import sigmoid, softmax
from sopdeploy.errors import ImageError

FEW_CLASSES = 32  # above this, a sort of all classes is faster

RankedClasses = list[tuple[int, float]]  # class index and probability, best first


def rank_classes(
    logits: NDArray[np.float32], top_k: int | None, thresholds: Sequence[float] | None = None
) -> list[RankedClasses]:
    """Rank the classes of images with *logits* (n, C), at most *top_k* of each; ties keep their order.

    With *thresholds* the classes are independent: the probability of a class is the sigmoid of its logit, and
    only classes whose probability reaches their threshold are listed.
    """
    classes = logits.shape[1]
    indices = top_indices(logits, top_k if top_k is not None and thresholds is None else classes)
    probabilities = softmax(logits) if thresholds is None else sigmoid(logits)
    listed = np.take_along_axis(probabilities, indices, axis=1)
    ranked = [list(zip(*row, strict=True)) for row in zip(indices.tolist(), listed.tolist(), strict=True)]
    if thresholds is None:
        return ranked
    return [[(index, p) for index, p in image if p >= thresholds[index]][:top_k] for image in ranked]


def top_indices(values: NDArray[np.float32], k: int) -> NDArray[np.intp]:
    """Return the indices (images, k) of the *k* largest of finite *values* (images, classes) of each image.

    The largest comes first; ties keep their order. For a small *k*, *k* searches for the maximum are faster
    than a sort of all classes.
    """
    if k > FEW_CLASSES:
        return np.argsort(-values, axis=1, kind="stable")[:, :k]
    rest, images = values.copy(), np.arange(len(values))
    columns = []
    for _ in range(min(k, values.shape[1])):
        columns.append(rest.argmax(axis=1))
        rest[images, columns[-1]] = -np.inf
    return np.stack(columns, axis=1)


class Prediction(NamedTuple):
    """The outputs of one image by name, (...) float32, logits first, with its timings.

    *batch* is the size of the batch it ran in; *row* is its position among the predictions of the batch.
    *ranked* has as many classes as the request wanted from the model worker. *warnings* name what decoding
    changed in the image.
    """

    outputs: Mapping[str, NDArray[np.float32]]
    queue_seconds: float
    infer_seconds: float
    batch: int
    row: int
    ranked: RankedClasses
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class HttpError:
    """The reason why an image or a whole request gets no prediction; *retry_after* is in seconds."""

    code: str
    status: int
    message: str
    retry_after: int | None = None

    @classmethod
    def of(cls, error: ImageError) -> "HttpError":
        """Convert the error of an image that cannot be decoded."""
        return cls(error.code, error.status, str(error))


class RejectedError(Exception):
    """Ends a request with the response of *reason*."""

    def __init__(self, reason: HttpError) -> None:
        super().__init__(reason.message)
        self.reason = reason


Outcome: TypeAlias = Prediction | HttpError

DRAINING = HttpError("draining", 503, "the server is shutting down; retry on another one", 1)
RUNTIME_DEAD = HttpError("runtime_dead", 503, "the model worker has stopped; the server is restarting", 5)
DEADLINE = HttpError("deadline", 504, "no prediction before the deadline; the server is overloaded")
INFERENCE_FAILED = HttpError("inference_failed", 500, "inference failed on this image")
DECODER_FAILED = HttpError("decoder_failed", 500, "the decoder failed on this image")
DECODERS_BUSY = HttpError("decoders_busy", 503, "too many large images wait to be decoded; retry later", 5)
DECODE_TIMEOUT = HttpError("decode_timeout", 503, "decoding took longer than decode_seconds; retry later", 5)
NONFINITE = HttpError("nonfinite_output", 500, "the network's output for this image is not finite")
TOO_LATE = HttpError("deadline_unreachable", 503, "the queue is too long to meet the deadline", 1)
OUT_OF_MEMORY = HttpError("out_of_memory", 503, "the device is out of memory for this image; retry", 2)
CLIENT_GONE = HttpError("client_gone", 499, "the client closed the connection")


def format_prediction(
    ranked: RankedClasses,
    labels: Sequence[str],
    *,
    warnings: tuple[str, ...] = (),
    gates: NDArray[np.float32] | None = None,
    recognized: tuple[bool, float] | None = None,
) -> dict[str, Any]:
    """Build the JSON object `schema.Classes` of *ranked* classes.

    *gates* (N,) are the weights of a gate's components: components with a weight other than 0 are listed, the
    largest weight first. *recognized* is whether the image is known, and its score.
    """
    classes = [{"label": labels[index], "probability": probability} for index, probability in ranked]
    response: dict[str, Any] = {"classes": classes, "warnings": warnings}
    if recognized is not None:
        response["known"], response["score"] = recognized
    if gates is not None:
        components = [index for index in np.argsort(-gates, kind="stable").tolist() if gates[index] != 0]
        response["gates"] = [{"component": index, "weight": float(gates[index])} for index in components]
    return response
