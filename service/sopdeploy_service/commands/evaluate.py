"""`sopdeploy eval` of a bundle: decoded, computed and answered by the server's own code, without a server.

Pictures go one by one, as `predict` sends them, so that an answer does not depend on its neighbours.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sopdeploy.data.datasets.folder import open_classes
from sopdeploy.errors import DataError, ImageError
from sopdeploy.evaluation.metrics import Score
from sopdeploy.images.preprocess import Preprocess, TtaMode, check_tta_mode, tta_views
from sopdeploy_service.commands.predict import read
from sopdeploy_service.images.decode import EncodedImage, decode
from sopdeploy_service.images.loaders import pixel_loader
from sopdeploy_service.inference.loader import LoadedModel, load_model
from sopdeploy_service.inference.results import softmax
from sopdeploy_service.settings import Settings, load_settings


@dataclass(frozen=True, kw_only=True, slots=True)
class BundleScores:
    """The classes, sorted, the scores, and what computed them."""

    labels: tuple[str, ...]
    scores: list[Score]
    bundle: str
    runtime: str
    device: str


def scores_of_bundle(
    path: Path,
    data: Path,
    *,
    tta: str = "none",
    settings: Settings | None = None,
    on_image: Callable[[int, int], None],
) -> BundleScores:
    """Return the scores of the bundle at *path* on the pictures below *data*, classes matched by name.

    *on_image* is told how many of how many are done. Raises `DataError` for classes that do not fit and for
    a picture that the server would refuse, and what `open_verified` raises for the bundle.
    """
    settings = settings or load_settings()
    inference = load_model(path, settings)
    wish = check_tta_mode(tta, inference.bundle.manifest.preprocess)
    labels = inference.bundle.labels
    by_name = tuple(sorted(labels))
    columns = [by_name.index(label) for label in labels]
    pictures = open_classes(data, by_name)
    scores = []
    for place in range(len(pictures)):
        ranked = answer(inference, pictures.path(place), wish, settings)
        target = int(pictures.targets[place])
        scores.append(
            Score.from_ranking(target, [(columns[column], probability) for column, probability in ranked])
        )
        on_image(place + 1, len(pictures))
    return BundleScores(
        labels=by_name,
        scores=scores,
        bundle=inference.bundle.name,
        runtime=inference.runtime.name,
        device=inference.runtime.device,
    )


def answer(inference: LoadedModel, path: Path, wish: TtaMode, settings: Settings) -> list[tuple[int, float]]:
    """Return the classes of the picture at *path* with their probabilities, best first.

    Of several views the probabilities are averaged.
    """
    manifest = inference.bundle.manifest
    body = EncodedImage(read(path, settings.max_body_bytes))
    try:
        seen = tta_views(partial(pixels, body, settings), manifest.preprocess, wish)
    except ImageError as problem:
        raise DataError(f"{path}: {problem}; repair or remove it") from problem
    name = manifest.outputs[0].name
    found = [inference.runtime.run(np.ascontiguousarray(view)[None])[name][0] for view in seen]
    if not all(np.isfinite(logits).all() for logits in found):
        raise DataError(f"{path}: the network's answer is not finite; verify the bundle")
    if len(found) == 1:  # by logits, which differ where probabilities have become 0
        order = np.argsort(-found[0], kind="stable")
        probabilities = softmax(found[0])
    else:
        probabilities = np.mean([softmax(logits) for logits in found], axis=0)
        order = np.argsort(-probabilities, kind="stable")
    return [(int(place), float(probabilities[place])) for place in order]


def pixels(sent: EncodedImage, settings: Settings, preprocess: Preprocess) -> NDArray[np.uint8]:
    """Return what the server would feed its network with."""
    return decode(
        sent,
        preprocess,
        max_bytes=settings.max_body_bytes,
        max_pixels=settings.max_pixels,
        load=pixel_loader(settings),
    ).pixels
