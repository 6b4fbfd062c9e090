"""`sopdeploy predict`: classify images without a server, with the same code."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
from PIL import Image

from sopdeploy.bundle.folder import MANIFEST
from sopdeploy.data.folders import is_image
from sopdeploy.errors import DataError, ImageError
from sopdeploy.files import open_regular, read_at_most
from sopdeploy.http_api import Classes, ClassProbability, Problem
from sopdeploy.images.pixels import list_changes, match_transparency, preprocess_image
from sopdeploy_service.http.problems import describe_error
from sopdeploy_service.images.decode import Decoded, EncodedImage
from sopdeploy_service.images.loaders import make_decoder
from sopdeploy_service.inference.loader import LoadedModel, load_model
from sopdeploy_service.inference.results import NONFINITE, HttpError
from sopdeploy_service.runtime.base import must_run
from sopdeploy_service.settings import Settings, load_settings


class FilePrediction(Classes):
    """The most probable classes of one image, best first, or the error.

    `image` is the path of a file or, for an image in memory, its file name or position. A multi-label
    network gives all classes above their threshold, at most `top_k` if that is set. `known` and `score` are
    omitted unless the bundle has a threshold for them.
    """

    image: str
    classes: tuple[ClassProbability, ...] = ()
    error: Problem | None = None

    @pydantic.model_serializer(mode="wrap")
    def _omit_unset(self, dump: pydantic.SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = dump(self)
        return {key: value for key, value in fields.items() if value is not None or key == "error"}


def predict_files(
    bundle_path: Path, images: Sequence[Path | Image.Image], settings: Settings | None = None
) -> list[FilePrediction]:
    """Classify files and images in memory one by one; a file that is not a valid image gets an `error`.

    Images run in batches of one, so that a prediction does not depend on the other images. An image in memory
    gives the same result as a file with the same pixels. Raises `DataError` for a file that cannot be read,
    and the errors of `load_model`.
    """
    settings = settings or load_settings()
    loaded = load_model(bundle_path, settings)
    predictions = []
    for number, image in enumerate(images):
        name = str(image if isinstance(image, Path) else getattr(image, "filename", "") or f"image {number}")
        opened = read_image(image, settings.max_body_bytes) if isinstance(image, Path) else image
        predictions.append(_predict_image(loaded, opened, name, settings))
    return predictions


def _predict_image(
    loaded: LoadedModel, image: EncodedImage | Image.Image, name: str, settings: Settings
) -> FilePrediction:
    manifest = loaded.bundle.manifest
    try:
        decoded = _decode(image, loaded, settings)
    except ImageError as error:
        return FilePrediction(image=name, error=describe_error(HttpError.of(error)))
    with must_run(loaded.runtime):
        outputs = loaded.runtime.run(decoded.pixels[None])
    if not all(np.isfinite(values).all() for values in outputs.values()):
        return FilePrediction(image=name, error=describe_error(NONFINITE))
    logits = outputs[manifest.outputs[0].name][0]
    limit = settings.classes_per_image(multi_label=manifest.thresholds is not None)
    fields = manifest.answer(logits, limit).fields(loaded.bundle.labels)
    return FilePrediction(image=name, warnings=decoded.warnings, **fields)


def _decode(image: EncodedImage | Image.Image, loaded: LoadedModel, settings: Settings) -> Decoded:
    preprocess = loaded.bundle.manifest.preprocess
    if isinstance(image, EncodedImage):
        return make_decoder(settings)(image, preprocess)
    try:
        match_transparency(image)  # of a file that is open but not decoded yet
        return Decoded(preprocess_image(image, preprocess), list_changes(image, preprocess))
    except (OSError, SyntaxError, ValueError) as error:
        raise ImageError("the image is damaged", code="damaged_image", status=422) from error


def read_image(path: Path, max_bytes: int) -> EncodedImage:
    """Read at most one byte more than *max_bytes*: enough to reject a larger file."""
    try:
        # `photos/*` can match a FIFO, on which reading may wait forever: only a path without the extension
        # of an image, such as /dev/stdin or <(command), may be a pipe.
        with open_regular(path) if is_image(path.name) else path.open("rb") as file:
            return EncodedImage(read_at_most(file, max_bytes + 1))
    except OSError as error:
        reason = f"cannot be read ({error.strerror}); name an image file"
        if (path / MANIFEST).is_file():
            reason = "a second bundle; name one bundle, then image files"
        elif path.is_dir():
            reason = f"a folder; name its images: {path}/*"
        raise DataError(f"{path}: {reason}") from error
