"""`sopdeploy predict`: classify image files without a server, by the server's own code."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sopdeploy.bundle import MANIFEST
from sopdeploy.errors import DataError, ImageError
from sopdeploy.frozen import Frozen
from sopdeploy_service.answer import answer
from sopdeploy_service.decode import Sent, decode
from sopdeploy_service.loading import loader
from sopdeploy_service.outcome import NONFINITE, Refusal
from sopdeploy_service.ranking import Ranking
from sopdeploy_service.schema import Classes, ClassProbability, Problem
from sopdeploy_service.settings import Settings, load_settings
from sopdeploy_service.verified import Inference, open_verified


class Prediction(Frozen):
    """One image file and its most probable classes, best first, or why there are none."""

    image: str
    classes: tuple[ClassProbability, ...] = ()
    warnings: tuple[str, ...] = ()
    error: Problem | None = None


def predict(
    bundle_path: Path,
    image_paths: Sequence[Path],
    settings: Settings | None = None,
) -> list[Prediction]:
    """Return a prediction for every path, in order; a bad image has its `error` set.

    Images go one by one, so that an answer does not depend on its neighbours. Raises `DataError`
    where a file cannot be read, and what `open_verified` raises for the bundle.
    """
    settings = settings or load_settings()
    inference = open_verified(bundle_path, settings)
    return [predict_one(inference, path, settings) for path in image_paths]


def predict_one(inference: Inference, path: Path, settings: Settings) -> Prediction:
    """Return the prediction for the image file at *path*."""
    manifest = inference.bundle.manifest
    try:
        decoded = decode(
            Sent(read(path, settings.max_body_bytes)),
            manifest.preprocess,
            max_bytes=settings.max_body_bytes,
            max_pixels=settings.max_pixels,
            load=loader(settings),
        )
    except ImageError as problem:
        return Prediction(image=str(path), error=Problem.of(Refusal.of(problem)))
    outputs = inference.runtime.run(decoded.pixels[None])
    if not all(np.isfinite(values).all() for values in outputs.values()):
        return Prediction(image=str(path), error=Problem.of(NONFINITE))
    logits = outputs[manifest.outputs[0].name][0]
    return Prediction(
        image=str(path),
        classes=Classes(**answer(Ranking([logits]).best(0, settings.top_k), inference.bundle.labels)).classes,
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
