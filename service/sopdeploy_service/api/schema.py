"""Requests and responses of the HTTP API that only the server needs; `sopdeploy.http_api` has all others."""

from typing import Annotated

import pydantic

from sopdeploy.config import StrictModel
from sopdeploy.http_api import Classes, EncodedEmbedding, Problem
from sopdeploy_service.inference.service import State


class ClassifyRequest(pydantic.BaseModel):
    """JSON body of `/v1/classify`, and of `/v1/embed`, which ignores `top_k`.

    It has either `image` or `images`.
    """

    model_config = pydantic.ConfigDict(strict=True, extra="forbid")

    image: str | None = pydantic.Field(None, description="base64, or a data URI")
    images: list[str] | None = pydantic.Field(None, description="base64, or data URIs")
    top_k: Annotated[int, pydantic.Field(ge=1)] | None = None

    @pydantic.model_validator(mode="after")
    def _has_images(self) -> "ClassifyRequest":
        if (self.image is None) == (self.images is None):
            raise ValueError("the body must have either `image` or `images`")
        return self


class Failed(StrictModel):
    """The error of one image among several."""

    error: Problem


class Results(StrictModel):
    """Results of several images, in the order of the request."""

    results: tuple[Classes | Failed, ...]


class Embeddings(StrictModel):
    """Embeddings of several images, in the order of the request."""

    results: tuple[EncodedEmbedding | Failed, ...]


class Health(StrictModel):
    """Response of `/livez` and `/readyz`."""

    status: State
    reason: str | None = None


class SelfTest(StrictModel):
    """Result of `/selftest`: the largest deviation of each output over the probes, and its tolerance."""

    model: str
    version: str
    num_images: int
    deviation: dict[str, float]
    tolerance: dict[str, float]
    seconds: float


class CertificateSummary(StrictModel):
    """The certificate in short: what was compared, tensors removed and kept, and graph roots."""

    proof: str
    compared: tuple[str, ...]
    detached: tuple[str, ...]
    num_removed: int
    bytes_removed: int
    num_kept: int
    root: str
    onnx_root: str
    num_operations: int
    num_images: int
    largest_difference: float


class Card(StrictModel):
    """The model card as Markdown; `num_components` is 0 without a gate."""

    bundle: str
    text: str
    certificate: CertificateSummary | None
    num_components: int
