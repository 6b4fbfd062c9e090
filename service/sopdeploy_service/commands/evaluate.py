"""`sopdeploy eval` of a bundle: evaluate it with the server's code, without a server.

Images run one by one, as in `predict`, so that a prediction does not depend on other images.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sopdeploy.data.datasets.folder import open_classes
from sopdeploy.errors import DataError, ImageError
from sopdeploy.evaluation.metrics import Score
from sopdeploy.images.preprocess import TtaMode, check_tta_mode, tta_views
from sopdeploy_service.commands.predict import read_image
from sopdeploy_service.images.loaders import make_decoder
from sopdeploy_service.inference.loader import LoadedModel, load_model
from sopdeploy_service.inference.results import RankedClasses, softmax
from sopdeploy_service.settings import Settings, load_settings


@dataclass(frozen=True, kw_only=True, slots=True)
class BundleScores:
    """The sorted classes, the score of every image, and what ran the bundle."""

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
    """Score the bundle at *path* on the images below *data*.

    Calls *on_image* with the number of finished images and of all images. Raises `DataError` for classes that
    do not match and for images that the server would reject, and the errors of `load_model`.
    """
    settings = settings or load_settings()
    loaded = load_model(path, settings)
    tta_mode = check_tta_mode(tta, loaded.bundle.manifest.preprocess)
    labels = loaded.bundle.labels
    sorted_labels = tuple(sorted(labels))
    columns = [sorted_labels.index(label) for label in labels]
    images = open_classes(data, sorted_labels)
    scores = []
    for index in range(len(images)):
        ranked = _rank_classes(loaded, images.path(index), tta_mode, settings)
        ranking = [(columns[column], probability) for column, probability in ranked]
        scores.append(Score.from_ranking(int(images.targets[index]), ranking))
        on_image(index + 1, len(images))
    return BundleScores(
        labels=sorted_labels,
        scores=scores,
        bundle=loaded.bundle.name,
        runtime=loaded.runtime.name,
        device=loaded.runtime.device,
    )


def _rank_classes(loaded: LoadedModel, path: Path, tta: TtaMode, settings: Settings) -> RankedClasses:
    """Rank the classes of one image by the mean probability of its views."""
    manifest = loaded.bundle.manifest
    encoded, decode = read_image(path, settings.max_body_bytes), make_decoder(settings)
    try:
        views = tta_views(lambda rules: decode(encoded, rules).pixels, manifest.preprocess, tta)
    except ImageError as error:
        raise DataError(f"{path}: {error}; repair or remove it") from error
    output = manifest.outputs[0].name
    logits = [loaded.runtime.run(np.ascontiguousarray(view)[None])[output][0] for view in views]
    if not all(np.isfinite(row).all() for row in logits):
        raise DataError(f"{path}: the network's output is not finite; verify the bundle")
    probabilities = np.mean([softmax(row) for row in logits], axis=0)
    # Logits still differ where probabilities have become 0.
    order = np.argsort(-(logits[0] if len(logits) == 1 else probabilities), kind="stable")
    return [(int(index), float(probabilities[index])) for index in order]
