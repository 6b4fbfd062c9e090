"""Typed responses of the server. Unknown keys are ignored, so that newer servers can add keys."""

import re
from typing import Any, TypeVar

import httpx
import pydantic

from sopdeploy.config import StrictModel, first_problem
from sopdeploy.errors import ServiceError

Model = TypeVar("Model", bound="Response")
DURATION = re.compile(r"([a-z]+);dur=(\d+(?:\.\d+)?)")


class Response(StrictModel):
    """Base class of responses and their parts."""

    model_config = pydantic.ConfigDict(extra="ignore")


class ClassProbability(Response):
    """A class and its probability in [0, 1]."""

    label: str
    probability: float


class Expert(Response):
    """Index and mixture weight of an expert that the gate selected."""

    expert: int
    weight: float


class ClassMap(Response):
    """Class activation map: the amount that each position of the image adds to the logit of `label`.

    `values` (h rows of w) are in units of logits; their mean plus `bias` is the logit. They are the values of
    equal cells of `box` (left, top, right, bottom), the region that the network sees, in pixels of the
    upright image. `image_size` is the (width, height) of that image.
    """

    label: str
    values: tuple[tuple[float, ...], ...]
    bias: float
    box: tuple[float, float, float, float]
    image_size: tuple[int, int]


class Problem(Response):
    """The reason why an image was not classified: stable `code`, HTTP `status`, readable `detail`."""

    code: str
    status: int
    detail: str


class Classification(Response):
    """The result for one image.

    Attributes:
        classes: most probable classes, best first; empty if `error` is set. For a multi-label network, the
            classes whose probability reaches their threshold.
        gates: selected experts of a gated network, best first, if requested.
        class_map: class activation map of the explained class, if requested.
        warnings: codes of the decoder's warnings, such as first_frame_only.
        known: false if the image probably shows none of the classes; `None` if the bundle has no threshold.
        score: the number that decides `known`; larger is more certainly known.
        error: set if this image of a list could not be classified.
        model_digest: id of the bundle that computed the result.
        timing_ms: server time per stage (receive, decode, queue, infer); for a list, of its slowest image.
    """

    classes: tuple[ClassProbability, ...] = ()
    gates: tuple[Expert, ...] | None = None
    class_map: ClassMap | None = None
    warnings: tuple[str, ...] = ()
    known: bool | None = None
    score: float | None = None
    error: Problem | None = None
    model_digest: str = ""
    timing_ms: dict[str, float] = pydantic.Field(default_factory=dict)


class ModelInfo(Response):
    """A served model; `id` is its bundle id, `labels` the number of classes.

    `thresholds` are the smallest probabilities by class of a multi-label network; None for other networks.
    """

    name: str
    id: str
    bundle: str
    model: str
    labels: int
    precision: str
    runtime: str
    device: str
    largest_batch: int
    thresholds: dict[str, float] | None = None


class ServerInfo(Response):
    """Version and models of the server."""

    server: str
    models: tuple[ModelInfo, ...]


def parse_classifications(response: httpx.Response) -> list[Classification]:
    """Parse the results in *response*, in the order of the images; raise `ServiceError` if invalid."""
    shared = {
        "model_digest": response.headers.get("X-Model-Digest", ""),
        "timing_ms": {
            stage: float(milliseconds)
            for stage, milliseconds in DURATION.findall(response.headers.get("Server-Timing", ""))
        },
    }
    body = _json_object(response)
    rows = body.get("results", [body])
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and ("classes" in row or "error" in row) for row in rows
    ):
        raise _unexpected(response, "no results")
    return [_validate(Classification, {**row, **shared}, response) for row in rows]


def parse_server_info(response: httpx.Response) -> ServerInfo:
    """Parse the response of `/info`; raise `ServiceError` if it is invalid."""
    return _validate(ServerInfo, _json_object(response), response)


def parse_error(response: httpx.Response) -> ServiceError:
    """Convert an error response to an exception; its body may be anything, such as a proxy's HTML page."""
    status = response.status_code
    try:
        problem = Problem.model_validate_json(response.content)
    except pydantic.ValidationError:
        problem = Problem(code="http_error", status=status, detail=response.reason_phrase or "no explanation")
    message = f"{response.request.url}: {status} {problem.code}: {problem.detail}"
    return ServiceError(message, code=problem.code, status=status)


def _json_object(response: httpx.Response) -> dict[str, Any]:
    try:
        value = response.json()
    except ValueError as error:
        raise _unexpected(response, "not JSON") from error
    if not isinstance(value, dict):
        raise _unexpected(response, "not a JSON object")
    return value


def _validate(kind: type[Model], value: dict[str, Any], response: httpx.Response) -> Model:
    try:
        return kind.model_validate(value)
    except pydantic.ValidationError as error:
        raise _unexpected(response, first_problem(error)) from error


def _unexpected(response: httpx.Response, reason: str) -> ServiceError:
    status = response.status_code
    return ServiceError(
        f"{response.request.url}: status {status}, but not a sopdeploy response ({reason}); check the URL",
        code="foreign_answer",
        status=status,
    )
