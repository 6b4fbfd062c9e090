"""`sopdeploy predict`: classify image files without a server, by the server's own code."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sopdeploy.bundle.folder import MANIFEST
from sopdeploy.config import StrictModel
from sopdeploy.errors import DataError, ImageError
from sopdeploy_service.api.schema import Classes, ClassProbability, Problem
from sopdeploy_service.images.decode import EncodedImage, decode
from sopdeploy_service.images.loaders import pixel_loader
from sopdeploy_service.inference.loader import LoadedModel, load_model
from sopdeploy_service.inference.results import NONFINITE, Ranking, Rejection, format_prediction
from sopdeploy_service.settings import Settings, load_settings


class FilePrediction(StrictModel):
    """One image file and its most probable classes, best first, or why there are none."""

    image: str
    classes: tuple[ClassProbability, ...] = ()
    warnings: tuple[str, ...] = ()
    error: Problem | None = None


def predict(
    bundle_path: Path,
    image_paths: Sequence[Path],
    settings: Settings | None = None,
) -> list[FilePrediction]:
    """Return a prediction for every path, in order; a bad image has its `error` set.

    Images go one by one, so that an answer does not depend on its neighbours. Raises `DataError`
    where a file cannot be read, and what `open_verified` raises for the bundle.
    """
    settings = settings or load_settings()
    inference = load_model(bundle_path, settings)
    return [predict_one(inference, path, settings) for path in image_paths]


def predict_one(inference: LoadedModel, path: Path, settings: Settings) -> FilePrediction:
    """Return the prediction for the image file at *path*."""
    manifest = inference.bundle.manifest
    try:
        decoded = decode(
            EncodedImage(read(path, settings.max_body_bytes)),
            manifest.preprocess,
            max_bytes=settings.max_body_bytes,
            max_pixels=settings.max_pixels,
            load=pixel_loader(settings),
        )
    except ImageError as problem:
        return FilePrediction(image=str(path), error=Problem.of(Rejection.of(problem)))
    outputs = inference.runtime.run(decoded.pixels[None])
    if not all(np.isfinite(values).all() for values in outputs.values()):
        return FilePrediction(image=str(path), error=Problem.of(NONFINITE))
    logits = outputs[manifest.outputs[0].name][0]
    return FilePrediction(
        image=str(path),
        classes=Classes(
            **format_prediction(Ranking([logits]).top_k(0, settings.top_k), inference.bundle.labels)
        ).classes,
        warnings=decoded.warnings,
    )


def read(path: Path, max_bytes: int) -> bytes:
    """Return the bytes of the file at *path*, but no more than one above *max_bytes*."""
    try:
        with path.open("rb") as file:
            return file.read(max_bytes + 1)
    except OSError as problem:
        raise DataError(f"{path}: {why_unreadable(path, problem)}") from problem


def why_unreadable(path: Path, problem: OSError) -> str:
    """Return why there is no picture to read at *path*, and what to give instead."""
    if (path / MANIFEST).is_file():
        return "a second bundle; name one, and pictures behind it"
    if path.is_dir():
        return f"a folder; give its pictures: {path}/*"
    return f"cannot be read ({problem.strerror}); give a picture"
