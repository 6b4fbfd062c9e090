"""Evaluation sources: detection of checkpoints, bundles and services, and the scores of a service."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from sopdeploy.client import Classification, Client
from sopdeploy.data.datasets.folder import open_classes, open_store, scan_classes
from sopdeploy.data.folder_store import OpenOptions
from sopdeploy.errors import ConfigError, DataError, OverloadedError, ServiceError, UnreachableError
from sopdeploy.evaluation.metrics import Score

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
        raise ConfigError(f"{source}: only services on http:// and https:// can be evaluated")
    return "checkpoint"


def score_service(
    client: Client, data: Path, *, model: str | None = None, on_image: Callable[[int, int], None]
) -> tuple[tuple[str, ...], list[Score]]:
    """Score a running service on the images below *data*, one subfolder per class.

    Returns the sorted class names, read from the first response, and the scores. *on_image* receives the
    numbers of images done and in total. Raises `DataError` if the classes differ or the service rejects an
    image.
    """
    store = open_store(data, OpenOptions())
    found = scan_classes(store, tuple(store.folders()))
    if not len(found):
        raise DataError(f"{data}: holds no class folders; sort the images into one subfolder per class")
    first = _classify(client, found.path(0), model)
    labels = tuple(sorted(entry.label for entry in first.classes))
    images = open_classes(data, labels)
    scores = []
    for index in range(len(images)):
        response = _classify(client, images.path(index), model)
        ranked = [(labels.index(entry.label), entry.probability) for entry in response.classes]
        scores.append(Score.from_ranking(int(images.targets[index]), ranked))
        on_image(index + 1, len(images))
    return labels, scores


def _classify(client: Client, path: Path, model: str | None) -> Classification:
    try:
        return client.classify(path, top_k=ALL_CLASSES, model=model)
    except (OverloadedError, UnreachableError):
        raise
    except ServiceError as error:
        raise DataError(f"{path}: rejected by the service ({error}); repair or remove it") from error
