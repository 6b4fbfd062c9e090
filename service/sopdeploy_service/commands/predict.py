"""`sopdeploy predict`: classify image files without a server, with the same code."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sopdeploy.bundle.folder import MANIFEST
from sopdeploy.config import StrictModel
from sopdeploy.errors import DataError, ImageError
from sopdeploy_service.api.schema import Classes, ClassProbability
from sopdeploy_service.http.problems import Problem
from sopdeploy_service.images.decode import EncodedImage
from sopdeploy_service.images.loaders import make_decoder
from sopdeploy_service.inference.loader import LoadedModel, load_model
from sopdeploy_service.inference.results import NONFINITE, Ranking, Rejection, format_prediction
from sopdeploy_service.settings import Settings, load_settings


class FilePrediction(StrictModel):
    """The most probable classes of one image file, best first, or the error."""

    image: str
    classes: tuple[ClassProbability, ...] = ()
    warnings: tuple[str, ...] = ()
    error: Problem | None = None


def predict(
    bundle_path: Path, image_paths: Sequence[Path], settings: Settings | None = None
) -> list[FilePrediction]:
    """Classify the files one by one; a file that is no valid image gets an `error`.

    Batches of one make a prediction independent of the other files. Raises `DataError` for a file that cannot
    be read, and the errors of `load_model`.
    """
    settings = settings or load_settings()
    loaded = load_model(bundle_path, settings)
    return [_predict_file(loaded, path, settings) for path in image_paths]


def _predict_file(loaded: LoadedModel, path: Path, settings: Settings) -> FilePrediction:
    manifest = loaded.bundle.manifest
    try:
        decoded = make_decoder(settings)(read_image(path, settings.max_body_bytes), manifest.preprocess)
    except ImageError as error:
        return FilePrediction(image=str(path), error=Problem.of(Rejection.of(error)))
    outputs = loaded.runtime.run(decoded.pixels[None])
    if not all(np.isfinite(values).all() for values in outputs.values()):
        return FilePrediction(image=str(path), error=Problem.of(NONFINITE))
    ranked = Ranking([outputs[manifest.outputs[0].name][0]]).top_k(0, settings.top_k)
    classes = Classes(**format_prediction(ranked, loaded.bundle.labels)).classes
    return FilePrediction(image=str(path), classes=classes, warnings=decoded.warnings)


def read_image(path: Path, max_bytes: int) -> EncodedImage:
    """Read at most one byte more than *max_bytes*: enough to reject a larger file."""
    try:
        with path.open("rb") as file:
            return EncodedImage(file.read(max_bytes + 1))
    except OSError as error:
        reason = f"cannot be read ({error.strerror}); name an image file"
        if (path / MANIFEST).is_file():
            reason = "a second bundle; name one bundle, then image files"
        elif path.is_dir():
            reason = f"a folder; name its images: {path}/*"
        raise DataError(f"{path}: {reason}") from error
