"""Typed responses of the server. Unknown keys are ignored, so that newer servers can add keys."""

import base64
import re
from typing import Self, TypeVar

import httpx
import numpy as np
import pydantic
from numpy.typing import NDArray

from sopdeploy.config import StrictModel
from sopdeploy.errors import ServiceError

Result = TypeVar("Result", bound="ImageResult")
DURATION = re.compile(r"([a-z]+);dur=(\d+(?:\.\d+)?)")


class Response(StrictModel):
    """Base class of responses and their parts."""

    model_config = pydantic.ConfigDict(extra="ignore")


class ClassProbability(Response):
    """A class and its probability in [0, 1]."""

    label: str
    probability: float


class Component(Response):
    """Index and mixture weight of a component that the gate selected."""

    component: int
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


class ImageResult(Response):
    """What every result for one image has.

    Attributes:
        warnings: codes of the decoder's warnings, such as first_frame_only.
        error: set if the server has no result for this image of a list.
        model_digest: id of the bundle that computed the result.
        timing_ms: server time per stage (receive, decode, queue, infer); for a list, of its slowest image.
    """

    warnings: tuple[str, ...] = ()
    error: Problem | None = None
    model_digest: str = ""
    timing_ms: dict[str, float] = pydantic.Field(default_factory=dict)

    @pydantic.model_validator(mode="after")
    def _has_result(self) -> Self:
        if not self.model_fields_set & {"classes", "values", "error"}:
            raise ValueError("neither a result nor an error")
        return self


class Embedding(ImageResult):
    """The features of one image in front of the classifier.

    Attributes:
        values: (D,) float32, read-only; empty if `error` is set.
    """

    model_config = pydantic.ConfigDict(arbitrary_types_allowed=True)

    values: NDArray[np.float32] = pydantic.Field(np.zeros(0, np.float32), validation_alias="embedding")

    @pydantic.field_validator("values", mode="before")
    @classmethod
    def _decode(cls, text: str) -> NDArray[np.float32]:
        return np.frombuffer(base64.b64decode(text), "<f4")


class Classification(ImageResult):
    """The result for one image, with the attributes of `ImageResult`.

    Attributes:
        classes: most probable classes, best first; empty if `error` is set. For a multi-label network, the
            classes whose probability reaches their threshold.
        gates: selected components of a gated network, best first, if requested.
        class_map: class activation map of the explained class, if requested.
        known: false if the image probably shows none of the classes; `None` if the bundle has no threshold.
        score: the number that decides `known`; larger is more certainly known.
    """

    classes: tuple[ClassProbability, ...] = ()
    gates: tuple[Component, ...] | None = None
    class_map: ClassMap | None = None
    known: bool | None = None
    score: float | None = None


class ModelInfo(Response):
    """A served model; `id` is its bundle id, `labels` the number of classes.

    `thresholds` are the smallest probabilities by class of a multi-label network; None for other networks.
    `embedding_size` is the length of an embedding; None if the bundle has no features.
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
    class_maps: bool = False
    embedding_size: int | None = None


class ServerInfo(Response):
    """Version and models of the server."""

    server: str
    models: tuple[ModelInfo, ...]


def parse_results(response: httpx.Response, kind: type[Result]) -> list[Result]:
    """Parse the results in *response*, in the order of the images; raise `ServiceError` if invalid."""
    shared = {
        "model_digest": response.headers.get("X-Model-Digest", ""),
        "timing_ms": dict(DURATION.findall(response.headers.get("Server-Timing", ""))),
    }
    try:
        body = response.json()
        rows = body.get("results", [body])
        return [kind.model_validate({**row, **shared}) for row in rows]
    except (AttributeError, TypeError, ValueError) as error:
        raise _foreign(response) from error


def parse_info(response: httpx.Response) -> ServerInfo:
    """Parse the response of `/info`; raise `ServiceError` if it is invalid."""
    try:
        return ServerInfo.model_validate_json(response.content)
    except pydantic.ValidationError as error:
        raise _foreign(response) from error


def _foreign(response: httpx.Response) -> ServiceError:
    status = response.status_code
    return ServiceError(
        f"{response.request.url}: status {status}, but not a sopdeploy response; check the URL",
        code="foreign_answer",
        status=status,
    )
