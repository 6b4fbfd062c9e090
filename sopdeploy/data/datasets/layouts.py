"""Detection of official layouts, for commands that get a folder and no recipe: `eval` and `data check`."""

from dataclasses import replace
from pathlib import Path

from sopdeploy.data.datasets.fine_grained import LAYOUTS, find_fine_grained
from sopdeploy.data.datasets.folder import match_classes, open_classes, open_store
from sopdeploy.data.datasets.imagenet import (
    TRAIN_FOLDERS,
    WORDNET_ID,
    find_list,
    is_torchvision_order,
    open_validation,
)
from sopdeploy.data.folder_store import OpenOptions
from sopdeploy.data.image_files import ImageFiles
from sopdeploy.data.subset import select_files
from sopdeploy.errors import DataError


def detect_kind(path: Path) -> str | None:
    """Find the `data.kind` of the official layout in the folder *path*, if there is one."""
    kinds = [kind for kind in LAYOUTS if find_fine_grained(path, kind)]
    return kinds[0] if kinds else "imagenet" if find_list(path) else None


def open_official(path: Path, options: OpenOptions) -> dict[str, ImageFiles]:
    """Open the parts of an official layout in the folder *path* by name; empty if there is none.

    The last part has the official test or validation images.
    """
    for kind in LAYOUTS:
        if found := find_fine_grained(path, kind):
            split = found[1](found[0], options)
            parts = {"train": split.train, "test": split.held_out}
            return {name: part for name, part in parts.items() if isinstance(part, ImageFiles)}
    listing = find_list(path)
    if listing is None:
        return {}
    held_out = open_validation(path, listing, options)
    train = next((path / name for name in TRAIN_FOLDERS if (path / name).exists()), None)
    images = {} if train is None else {"train": match_classes(open_store(train, options), held_out.labels)}
    return {**images, "val": held_out}


def open_evaluation_images(root: Path, labels: tuple[str, ...]) -> ImageFiles:
    """Open the images below *root* for a network with the classes *labels*, in output order.

    Classes are matched by name and returned sorted. Of an official layout, the test or validation images of
    the network's classes are opened. WordNet IDs match the ImageNet names of torchvision's weights. Raises
    `DataError` naming the classes that do not match.
    """
    official = open_official(root, OpenOptions())
    named_by_torchvision = is_torchvision_order(labels)
    if not official:
        folders = open_store(root, OpenOptions()).folders() if named_by_torchvision else []
        if not folders or not all(WORDNET_ID.fullmatch(folder) for folder in folders):
            return open_classes(root, tuple(sorted(labels)))
        images = open_classes(root, tuple(folders))
    else:
        images = list(official.values())[-1]
    if named_by_torchvision and len(images.labels) == len(labels):
        images = replace(images, labels=labels)
    missing = sorted(set(labels) - set(images.labels))
    if missing:
        raise DataError(f"{root}: has no images of the classes {', '.join(missing[:10])}; give other data")
    return select_files(images, tuple(sorted(labels)))
