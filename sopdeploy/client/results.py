"""Results for images, and how responses are parsed: keys of newer servers are ignored."""

import base64
import re
from typing import Self, TypeVar

import httpx
import numpy as np
import pydantic
from numpy.typing import NDArray

from sopdeploy.config import StrictModel
from sopdeploy.errors import ServiceError
from sopdeploy.http_api import Classes, ClassProbability, Problem, ServerInfo

Result = TypeVar("Result", bound="ImageResult")
DURATION = re.compile(r"([a-z]+);dur=(\d+(?:\.\d+)?)")


class ImageResult(StrictModel):
    """What every result for one image has.

    Attributes:
        error: set if the server has no result for this image of a list.
        model_digest: id of the bundle that computed the result.
        timing_ms: server time per stage (receive, decode, queue, infer); for a list, of its slowest image.
    """

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
        warnings: codes of the changes made while decoding, such as first_frame_only.
    """

    model_config = pydantic.ConfigDict(arbitrary_types_allowed=True)

    values: NDArray[np.float32] = pydantic.Field(np.zeros(0, np.float32), validation_alias="embedding")
    warnings: tuple[str, ...] = ()

    @pydantic.field_validator("values", mode="before")
    @classmethod
    def _decode(cls, text: str) -> NDArray[np.float32]:
        return np.frombuffer(base64.b64decode(text), "<f4")


class Classification(ImageResult, Classes):
    """The result for one image, with the attributes of `ImageResult` and `Classes`.

    Attributes:
        classes: most probable classes, best first; empty if `error` is set.
    """

    classes: tuple[ClassProbability, ...] = ()


def parse_results(response: httpx.Response, kind: type[Result]) -> list[Result]:
    """Parse the results in *response*, in the order of the images; raise `ServiceError` if invalid."""
    shared = {
        "model_digest": response.headers.get("X-Model-Digest", ""),
        "timing_ms": dict(DURATION.findall(response.headers.get("Server-Timing", ""))),
    }
    try:
        body = response.json()
        rows = body.get("results", [body])
        return [kind.model_validate({**row, **shared}, extra="ignore") for row in rows]
    except (AttributeError, TypeError, ValueError) as error:
        raise _foreign(response) from error


def parse_info(response: httpx.Response) -> ServerInfo:
    """Parse the response of `/info`; raise `ServiceError` if it is invalid."""
    try:
        return ServerInfo.model_validate_json(response.content, extra="ignore")
    except pydantic.ValidationError as error:
        raise _foreign(response) from error


def _foreign(response: httpx.Response) -> ServiceError:
    status = response.status_code
    return ServiceError(
        f"{response.request.url}: status {status}, but not a sopdeploy response; check the URL",
        code="foreign_answer",
        status=status,
    )
