"""What is to be measured, recognised by what it is: a file, a folder with a manifest, or an address."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from sopdeploy.client import Classification, Client
from sopdeploy.data.datasets.folder import open_classes, open_store, scan
from sopdeploy.data.image_files import Opening
from sopdeploy.errors import ConfigError, DataError, OverloadedError, ServiceError, UnreachableError
from sopdeploy.evaluation.metrics import Score

Kind = Literal["checkpoint", "bundle", "service"]


def detect_source(source: str) -> Kind:
    """Return what *source* names; raises `ConfigError` where it is nothing that answers."""
    if source.startswith(("http://", "https://")):
        return "service"
    path = Path(source)
    if path.is_dir():
        if (path / "manifest.json").is_file():
            return "bundle"
        if (path / "best.pt").is_file():
            raise ConfigError(f"{source}: the folder of a run; give {path / 'best.pt'}")
        raise ConfigError(
            f"{source}: a folder without a manifest.json is no bundle; give a checkpoint, a bundle or a URL"
        )
    if "://" in source:
        raise ConfigError(f"{source}: only services on http:// and https:// can be measured")
    return "checkpoint"


EVERY_CLASS = 1_000_000  # the service answers with as many as there are


def score_service(
    client: Client, data: Path, *, model: str | None = None, on_image: Callable[[int, int], None]
) -> tuple[tuple[str, ...], list[Score]]:
    """Return the classes of a service, sorted, and its scores on the pictures below *data*.

    Which classes it knows, its first answer says. *on_image* is told how many of how many are done. Raises
    `DataError` for classes that do not fit and for a picture that the service refuses.
    """
    store = open_store(data, Opening())
    found = scan(store, tuple(store.folders()))
    if not len(found):
        raise DataError(f"{data}: holds no class folders; sort the images into one subfolder per class")
    labels = tuple(sorted(one.label for one in ask(client, found.path(0), model).classes))
    pictures = open_classes(data, labels)
    positions = {label: place for place, label in enumerate(labels)}
    scores = []
    for place in range(len(pictures)):
        answer = ask(client, pictures.path(place), model)
        ranked = [(positions[one.label], one.probability) for one in answer.classes]
        scores.append(Score.from_ranking(int(pictures.targets[place]), ranked))
        on_image(place + 1, len(pictures))
    return labels, scores


def ask(client: Client, path: Path, model: str | None) -> Classification:
    """Return every class of the picture at *path*, best first; raises `DataError` where it is refused."""
    try:
        return client.classify(path, top_k=EVERY_CLASS, model=model)
    except (OverloadedError, UnreachableError):
        raise
    except ServiceError as problem:
        raise DataError(f"{path}: refused by the service ({problem}); repair or remove it") from problem
