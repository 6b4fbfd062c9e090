"""The bodies of the HTTP answers; `sopdeploy predict` prints the same classes."""

from http import HTTPStatus
from typing import Annotated

import pydantic

from sopdeploy.config import StrictModel
from sopdeploy.images.preprocess import Preprocess
from sopdeploy_service.images.fast_decode import FastDecode
from sopdeploy_service.inference.results import Rejection
from sopdeploy_service.inference.service import State

PROBLEM_JSON = "application/problem+json"


class ClassProbability(StrictModel):
    """One class and how probable it is."""

    label: str
    probability: Annotated[float, pydantic.Field(ge=0, le=1)]


class Expert(StrictModel):
    """One expert that the gate chose, by its number, and its weight in the sum."""

    expert: int
    weight: float


class Classes(StrictModel):
    """The answer to one image: its most probable classes, best first.

    `warnings` name what was done to the image that its sender may not expect: `alpha_flattened`,
    `content_type_mismatch`, `exif_rotated`, `first_frame_only`, `sixteen_bit_scaled`.
    `gates` are the experts that decided, best first; they are there where they were asked for.
    """

    classes: tuple[ClassProbability, ...]
    warnings: tuple[str, ...] = ()
    gates: tuple[Expert, ...] | None = None


class Problem(StrictModel):
    """An error as RFC 9457 has it; `code` is stable, `detail` for people, `type` a page on it."""

    type: str
    title: str
    status: int
    code: str
    detail: str

    @classmethod
    def of(cls, refusal: Rejection) -> "Problem":
        """Return the body that tells *refusal* to a client."""
        try:
            title = HTTPStatus(refusal.status).phrase
        except ValueError:  # 499, which no standard names
            title = "Client Closed Request"
        page = f"/errors#{refusal.code}"
        return cls(type=page, title=title, status=refusal.status, code=refusal.code, detail=refusal.message)


class Failed(StrictModel):
    """The place of one image that got no answer, among others that did."""

    error: Problem


class Results(StrictModel):
    """The answers to several images, in the order they were sent."""

    results: tuple[Classes | Failed, ...]


class Health(StrictModel):
    """What `/livez` and `/readyz` say."""

    status: State


class ModelInfo(StrictModel):
    """Which network answers for one name, on what; `fast_decode` is there where JPEGs are decoded fast."""

    name: str
    bundle: str
    id: str
    model: str
    labels: int
    precision: str
    preprocess: Preprocess
    runtime: str
    device: str
    largest_batch: int
    versions: dict[str, str]
    fast_decode: FastDecode | None = None


class Info(StrictModel):
    """What this server answers with: its models by name, and which earlier versions it could go back to."""

    server: str
    models: tuple[ModelInfo, ...]
    previous: dict[str, str]


class SelfTest(StrictModel):
    """What `/selftest` measured: the largest deviation of each output over the probes, and its bound."""

    model: str
    version: str
    images: int
    deviation: dict[str, float]
    tolerance: dict[str, float]
    seconds: float
