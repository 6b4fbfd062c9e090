"""Evaluation sources: detection of checkpoints, bundles and services, and the scores of a service."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np

from sopdeploy.client import Classification, Client
from sopdeploy.data.datasets.layouts import open_any_images, open_evaluation_images
from sopdeploy.data.folder_store import Log, ignore
from sopdeploy.data.image_files import ImageFiles
from sopdeploy.errors import ConfigError, DataError, OverloadedError, ServiceError, UnreachableError
from sopdeploy.evaluation.metrics import Score
from sopdeploy.evaluation.multi_label import MultiLabelPredictions

ALL_CLASSES = 1_000_000  # `top_k` that requests every class


def detect_source(source: str) -> Literal["checkpoint", "bundle", "service"]:
    """Detect what *source* names; raises `ConfigError` if it cannot be evaluated."""
    if source.startswith(("http://", "https://")):
        return "service"
    path = Path(source)
    if path.is_dir():
        if (path / "manifest.json").is_file():
            return "bundle"
        if (path / "best.pt").is_file():
            raise ConfigError(f"{source}: is a run folder; give {path / 'best.pt'}")
        raise ConfigError(
            f"{source}: not a bundle, it has no manifest.json; give a checkpoint, a bundle or a URL"
        )
    if "://" in source:
        raise ConfigError(
            f"{source}: only services on http:// and https:// can be evaluated; write http://HOST:PORT"
        )
    return "checkpoint"


def score_service(
    client: Client,
    data: Path,
    *,
    model: str | None = None,
    on_image: Callable[[int, int], None],
    log: Log = ignore,
) -> tuple[tuple[str, ...], list[Score] | MultiLabelPredictions]:
    """Score a running service on the images below *data*, one subfolder per class or `labels.csv`.

    Returns the sorted class names, read from the first response, and the scores, or all predictions of a
    multi-label network. *on_image* receives the numbers of images done and in total, *log* lines about the
    folder. Raises `DataError` if the folder has other classes or the service rejects an image.
    """
    served = [found for found in client.info().models if model in (None, found.name)]
    if served and served[0].thresholds is not None:
        thresholds = dict(sorted(served[0].thresholds.items()))
        return tuple(thresholds), _predict_multi_label(client, data, model, thresholds, on_image)
    first = _classify(client, open_any_images(data), 0, model)
    labels = tuple(sorted(entry.label for entry in first.classes))
    images = open_evaluation_images(data, labels, log=log)
    scores = []
    for index in range(len(images)):
        response = _classify(client, images, index, model)
        ranked = [(labels.index(entry.label), entry.probability) for entry in response.classes]
        scores.append(Score.from_ranking(int(images.targets[index]), ranked, known=response.known))
        on_image(index + 1, len(images))
    return labels, scores


def _predict_multi_label(
    client: Client,
    data: Path,
    model: str | None,
    thresholds: dict[str, float],
    on_image: Callable[[int, int], None],
) -> MultiLabelPredictions:
    """Request the probabilities of all classes, those of *thresholds*, for every image of *data*."""
    labels = tuple(thresholds)
    images = open_evaluation_images(data, labels, multi_label=True)
    probabilities = np.zeros((len(images), len(labels)))
    for index in range(len(images)):
        response = _classify(client, images, index, model, threshold=0.0)
        found = {entry.label: entry.probability for entry in response.classes}
        probabilities[index] = [found[label] for label in labels]
        on_image(index + 1, len(images))
    return MultiLabelPredictions(
        labels=labels,
        targets=images.targets.astype(np.float64),
        probabilities=probabilities,
        thresholds=tuple(thresholds.values()),
    )


def _classify(
    client: Client, images: ImageFiles, index: int, model: str | None, threshold: float | None = None
) -> Classification:
    try:
        return client.classify(images.read(index), top_k=ALL_CLASSES, model=model, threshold=threshold)
    except (OverloadedError, UnreachableError):
        raise
    except ServiceError as error:
        raise DataError(
            f"{images.path(index)}: rejected by the service ({error}); repair or remove it"
        ) from error
