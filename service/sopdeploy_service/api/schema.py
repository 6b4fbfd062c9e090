"""Request and response bodies of the HTTP API; `sopdeploy predict` prints the same classes."""

from typing import Annotated, Literal

import pydantic

from sopdeploy.config import StrictModel
from sopdeploy.images.preprocess import Preprocess
from sopdeploy_service.http.problems import Problem
from sopdeploy_service.images.loaders import FastDecode
from sopdeploy_service.inference.service import State

SOURCES = ("image", "images", "url")


class ClassifyRequest(pydantic.BaseModel):
    """JSON body of `/v1/classify`, and of `/v1/embed`, which ignores `top_k`.

    It has exactly one of `image`, `images` and `url`.
    """

    model_config = pydantic.ConfigDict(strict=True, extra="forbid")

    image: str | None = pydantic.Field(None, description="base64, or a data URI")
    images: list[str] | None = pydantic.Field(None, description="base64, or data URIs")
    url: str | None = pydantic.Field(None, description="URL of one image; the server must allow its host")
    top_k: Annotated[int, pydantic.Field(ge=1)] | None = None

    @pydantic.model_validator(mode="after")
    def _has_one_source(self) -> "ClassifyRequest":
        given = [name for name in SOURCES if name in self.model_fields_set]
        if len(given) != 1 or getattr(self, given[0]) is None:
            raise ValueError(f"the body must have exactly one of {', '.join(SOURCES)}")
        return self


class ClassifyQuery(pydantic.BaseModel):
    """Query parameters of `/v1/classify`; unknown ones are ignored."""

    top_k: Annotated[int, pydantic.Field(ge=1, le=1_000_000)] | None = None
    model: str | None = pydantic.Field(None, description="Required if several models are loaded.")
    version: str | None = pydantic.Field(None, description="Bundle ID; default: the current version.")
    gates: bool = pydantic.Field(
        False, description="Include the selected components of a network with a gate."
    )
    threshold: Annotated[float, pydantic.Field(ge=0, le=1)] | None = pydantic.Field(
        None,
        description="Smallest probability of a class, instead of the thresholds of a multi-label network.",
    )
    explain: bool = pydantic.Field(False, description="Include the class activation map of the best class.")
    explain_label: str | None = pydantic.Field(None, description="The class to explain instead of the best.")


class EmbedQuery(pydantic.BaseModel):
    """Query parameters of `/v1/embed`; unknown ones are ignored."""

    model: str | None = pydantic.Field(None, description="Required if several models are loaded.")
    version: str | None = pydantic.Field(None, description="Bundle ID; default: the current version.")
    encoding_format: Literal["float", "base64"] = pydantic.Field(
        "float", description="A list of numbers, or base64 of little-endian float32."
    )


class ClassProbability(StrictModel):
    """One class and its probability."""

    label: str
    probability: Annotated[float, pydantic.Field(ge=0, le=1)]


class Expert(StrictModel):
    """One component selected by the gate: its index and its weight in the sum."""

    component: int
    weight: float


class ClassMap(StrictModel):
    """Class activation map: what each position of the image adds to the logit of a class.

    `values` are the rows of the map in units of logits; their mean plus `bias` is the logit. `box` is the
    part (left, top, right, bottom) of the upright image that the network receives; the values divide it into
    equal cells. `image_size` is (width, height). Both are in pixels. A padded image is smaller than its box.
    """

    label: str
    values: tuple[tuple[float, ...], ...]
    bias: float
    box: tuple[float, float, float, float]
    image_size: tuple[int, int]


class Classes(StrictModel):
    """Prediction for one image: its most probable classes, best first.

    A multi-label network lists the classes whose probability reaches their threshold, possibly none.
    `warnings` name changes made while decoding: `alpha_flattened`, `content_type_mismatch`, `exif_rotated`,
    `first_frame_only`, `sixteen_bit_scaled`. If requested, `gates` lists the selected components, largest
    weight first, and `class_map` explains a class. `known` is false if the image probably shows none of the
    classes, because its `score` is below the threshold of the bundle. Without a threshold, `known` and
    `score` are absent.
    """

    classes: tuple[ClassProbability, ...]
    warnings: tuple[str, ...] = ()
    gates: tuple[Expert, ...] | None = None
    class_map: ClassMap | None = None
    known: bool | None = None
    score: float | None = None


class Embedding(StrictModel):
    """Features of one image: the D numbers that the classifier reads, or base64 of little-endian float32."""

    embedding: tuple[float, ...] | str
    warnings: tuple[str, ...] = ()


class Failed(StrictModel):
    """The error of one image among several."""

    error: Problem


class Results(StrictModel):
    """Results of several images, in the order of the request."""

    results: tuple[Classes | Failed, ...]


class Embeddings(StrictModel):
    """Embeddings of several images, in the order of the request."""

    results: tuple[Embedding | Failed, ...]


class Health(StrictModel):
    """Response of `/livez` and `/readyz`."""

    status: State
    reason: str | None = None


class ModelInfo(StrictModel):
    """A loaded network and its runtime.

    `decode` is the way in which images are decoded; unless it is `exact`, `fast_decode` is its effect.
    `thresholds` (by class) is set for a multi-label network, `embedding_size`, the length of a vector of
    `/v1/embed`, if the bundle has features, and `known_from`, the smallest score of a known image, if it has
    such a threshold. The last three fields are set with a memory budget; `memory_bytes` is an estimate before
    the first load.
    """

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
    decode: str
    fast_decode: FastDecode | None = None
    thresholds: dict[str, float] | None = None
    class_maps: bool = False
    embedding_size: int | None = None
    known_from: float | None = None
    loaded: bool | None = None
    pinned: bool | None = None
    memory_bytes: int | None = None


class ShadowInfo(StrictModel):
    """The shadow of the model *live*, which receives the fraction *share* of the requests for that model.

    `images` counts the images since the start by result: best class agrees or differs, failed, dropped.
    """

    name: str
    bundle: str
    id: str
    live: str
    share: float
    images: dict[str, int]


class Info(StrictModel):
    """The models of this server by name, the versions available for rollback, and the shadow."""

    server: str
    models: tuple[ModelInfo, ...]
    previous: dict[str, str]
    shadow: ShadowInfo | None = None


class SelfTest(StrictModel):
    """Result of `/selftest`: the largest deviation of each output over the probes, and its tolerance."""

    model: str
    version: str
    images: int
    deviation: dict[str, float]
    tolerance: dict[str, float]
    seconds: float


class CertificateSummary(StrictModel):
    """The certificate in short: what was compared, tensors removed and kept, and graph roots."""

    proof: str
    compared: tuple[str, ...]
    detached: tuple[str, ...]
    removed: int
    bytes_removed: int
    kept: int
    root: str
    onnx_root: str
    operations: int
    images: int
    largest_difference: float


class Card(StrictModel):
    """The model card as Markdown; `components` is the number of components of the gate, 0 without a gate."""

    bundle: str
    text: str
    certificate: CertificateSummary | None
    components: int
