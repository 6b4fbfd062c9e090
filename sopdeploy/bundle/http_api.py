"""Requests and responses of the HTTP API, for the server and the client; imports neither."""

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import pydantic

from sopdeploy.base.config import Fraction, StrictModel
from sopdeploy.bundle.decision import Answer
from sopdeploy.images.preprocess import Preprocess

# What caches, campaigns and gateways add to any address.
ADDED = re.compile(r"_|utm_\w+|api-version")


class Query(pydantic.BaseModel):
    """Parameters of a query; an unknown one is an error, except those that others add."""

    model_config = pydantic.ConfigDict(extra="forbid")

    @pydantic.model_validator(mode="before")
    @classmethod
    def _leave_out_added(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if not ADDED.fullmatch(name)}


class CardQuery(Query):
    """Query parameters of `/v1/card`, and of all requests about a model."""

    model: str | None = pydantic.Field(
        None, description="Required if several models are loaded."
    )


class ImageQuery(CardQuery):
    """Query parameters of all requests with images."""

    version: str | None = pydantic.Field(
        None, description="Bundle ID; default: the current version."
    )


class ClassifyQuery(ImageQuery):
    """Query parameters of `/v1/classify`."""

    top_k: Annotated[int, pydantic.Field(ge=1, le=1_000_000)] | None = None
    threshold: Fraction | None = pydantic.Field(
        None,
        description="Smallest probability of a class, instead of the thresholds of a multi-label network.",
    )
    explain: bool = pydantic.Field(
        False,
        description="Include an occlusion map of the first class; an image then counts as 50.",
    )
    reported: str | None = pydantic.Field(
        None,
        description="The prediction was wrong: keep the image for a label, and suggest this class, if not empty.",
    )


class EmbedQuery(ImageQuery):
    """Query parameters of `/v1/embed`."""

    encoding_format: Literal["float", "base64"] = pydantic.Field(
        "float", description="A list of numbers, or base64 of little-endian float32."
    )


class Problem(StrictModel):
    """An error of RFC 9457: `code` is stable, `detail` is for people, `type` is a page about the code."""

    type: str = "about:blank"
    title: str = ""
    status: int
    code: str
    detail: str


class ClassProbability(StrictModel):
    """One class and its probability."""

    label: str
    probability: Fraction


class Classes(StrictModel):
    """Prediction for one image: its most probable classes, best first.

    A multi-label network lists the classes whose probability reaches their threshold, possibly
    none. `warnings` name changes made while decoding: `alpha_flattened`, `exif_rotated`,
    `first_frame_only`, `sixteen_bit_scaled`. If requested, `explanation` has 7 rows of 7
    numbers: the probability that the first class loses if that part of the network's input is
    gray. `known` is false if the image probably shows none of the classes, because its `score`
    is below the threshold of the bundle. Without a threshold, `known` and `score` are absent.
    """

    classes: tuple[ClassProbability, ...]
    warnings: tuple[str, ...] = ()
    known: bool | None = None
    score: float | None = None
    explanation: tuple[tuple[float, ...], ...] | None = None


def name_classes(
    answer: Answer, labels: Sequence[str], warnings: Sequence[str]
) -> dict[str, object]:
    """Return the fields of `Classes` for *answer* that are not None; *labels* name its classes."""
    classes = [
        {"label": labels[index], "probability": probability}
        for index, probability in answer.ranked
    ]
    optional = {
        "known": answer.known,
        "score": answer.score,
        "explanation": answer.explanation,
    }
    set_ones = {name: value for name, value in optional.items() if value is not None}
    return {"classes": classes, "warnings": warnings, **set_ones}


class EncodedEmbedding(StrictModel):
    """Features of one image: the D numbers that the classifier reads, or base64 of little-endian float32."""

    embedding: tuple[float, ...] | str
    warnings: tuple[str, ...] = ()


class PredictedShares(StrictModel):
    """Shares of the images of a time: by their most probable class (`labels`), and `unknown` ones."""

    num_images: int
    labels: dict[str, float]
    unknown: float


class ModelInfo(StrictModel):
    """A served network and its runtime; `id` is its bundle ID.

    `thresholds` (by class) is set for a multi-label network. `embedding_size`, the length of a
    vector of `/v1/embed`, is set if the bundle has features. `known_from`, the smallest score of
    a known image, is set if the bundle has a threshold for known images. `temperature` is set if the
    probabilities are the softmax of the logits of `/v2` divided by it. `last_day` and `days_before` are what
    it has predicted in the last 24 hours and in the seven days before; not set if it has several classes per
    image, or if several processes serve HTTP.
    """

    name: str
    bundle: str
    id: str
    model: str
    num_labels: int
    precision: str
    preprocess: Preprocess
    runtime: str
    device: str
    largest_batch: int
    versions: dict[str, str]
    thresholds: dict[str, float] | None = None
    embedding_size: int | None = None
    known_from: float | None = None
    temperature: float | None = None
    last_day: PredictedShares | None = None
    days_before: PredictedShares | None = None


class ServerInfo(StrictModel):
    """The models of a server by name; `server` is its version, `front_ends` the number of these processes.

    `keeps` tells whether it keeps images, so that wrong answers can be reported.
    """

    server: str
    models: tuple[ModelInfo, ...]
    front_ends: int = 0
    keeps: bool = False
