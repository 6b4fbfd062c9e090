"""What `model.onnx` says of itself in its `metadata_props`, for programs that get it without its bundle.

Each value is JSON, except the version of sopdeploy. Does not import onnx.
"""

import json
from collections.abc import Mapping
from typing import Annotated

import pydantic

from sopdeploy.base.config import Positive, StrictModel, Text, first_problem, parse_json
from sopdeploy.base.names import MAX_CLASSES, ProjectName
from sopdeploy.bundle.manifest import BatchRange, Precision
from sopdeploy.errors import BundleError
from sopdeploy.images.preprocess import Preprocess

_VERSION = "sopdeploy"


class GraphProperties(StrictModel):
    """The class names in the order of the logits, the rules for images, and how the graph is served.

    `temperature` divides the logits before the softmax; it is 1 if nothing has to.
    """

    sopdeploy: Text
    project: ProjectName
    labels: Annotated[tuple[Text, ...], pydantic.Field(min_length=1, max_length=MAX_CLASSES)]
    preprocess: Preprocess
    batch: BatchRange
    precision: Precision
    temperature: Positive = 1.0

    def to_texts(self) -> dict[str, str]:
        """Return the texts that the file has."""
        fields = self.model_dump(mode="json")
        version = fields.pop(_VERSION)
        texts = {key: json.dumps(value, ensure_ascii=False) for key, value in fields.items()}
        return {**texts, _VERSION: version}

    @classmethod
    def of_texts(cls, texts: Mapping[str, str]) -> "GraphProperties":
        """Read the *texts* of a file; raises `BundleError` for those of another program."""
        if _VERSION not in texts:
            raise BundleError("has no class names and rules of sopdeploy in its metadata_props")
        known = {key: texts[key] for key in cls.model_fields if key in texts}
        version = known.pop(_VERSION)
        try:
            fields = {key: parse_json(text) for key, text in known.items()}
            return cls(**fields, sopdeploy=version)
        except pydantic.ValidationError as error:
            raise BundleError(f"metadata_props: {first_problem(error)}") from error
        except ValueError as error:
            raise BundleError(f"metadata_props: {error}") from error
