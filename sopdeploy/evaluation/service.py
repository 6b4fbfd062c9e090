"""The scores of a running service."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from sopdeploy.client import Classification, Client
from sopdeploy.data.datasets.layouts import open_any_images, open_evaluation_images
from sopdeploy.data.folders import Log, ignore
from sopdeploy.data.image_files import ImageFiles
from sopdeploy.errors import DataError, OverloadedError, ServiceError, UnreachableError
from sopdeploy.evaluation.metrics import ImageScore
from sopdeploy.evaluation.multi_label import MultiLabelPredictions

ALL_CLASSES = 1_000_000  # `top_k` that requests every class


def score_service(
    url: str,
    data: Path,
    *,
    api_key: str | None = None,
    model: str | None = None,
    on_image: Callable[[int, int], None],
    log: Log = ignore,
) -> tuple[tuple[str, ...], list[ImageScore] | MultiLabelPredictions]:
    """Score the service at *url* on the images below *data*, one subfolder per class or `labels.csv`.

    Returns the sorted names of the service's classes, and the scores or, for a multi-label network, all
    predictions. *on_image* receives the numbers of images done and in total, *log* lines about the folder.
    Raises `DataError` if the folder has other classes or the service rejects an image.
    """
    with Client(url, api_key=api_key) as client:
        served = [info for info in client.info().models if model in (None, info.name)]
        thresholds = served[0].thresholds if served else None  # those of a multi-label network
        if thresholds is None:
            first = _classify(client, open_any_images(data), 0, model)
            labels = tuple(sorted(entry.label for entry in first.classes))
        else:
            labels = tuple(sorted(thresholds))
        images = open_evaluation_images(data, labels, multi_label=thresholds is not None, log=log)
        scores = []
        probabilities = np.zeros((len(images), len(labels)))
        for index in range(len(images)):
            threshold = None if thresholds is None else 0.0  # 0 requests every class of a multi-label network
            response = _classify(client, images, index, model, threshold)
            ranked = [(labels.index(entry.label), entry.probability) for entry in response.classes]
            if thresholds is None:
                scores.append(
                    ImageScore.from_ranking(int(images.targets[index]), ranked, known=response.known)
                )
            else:
                for column, probability in ranked:
                    probabilities[index, column] = probability
            on_image(index + 1, len(images))
    if thresholds is None:
        return labels, scores
    return labels, MultiLabelPredictions(
        labels=labels,
        targets=images.targets.astype(np.float64),
        probabilities=probabilities,
        thresholds=tuple(thresholds[label] for label in labels),
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
