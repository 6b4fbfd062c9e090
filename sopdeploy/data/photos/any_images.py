"""Images without labels: any images, or images of things that a network does not know."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from sopdeploy.base.files import expand_user
from sopdeploy.data.photos.files import list_any_images
from sopdeploy.data.photos.kept import SAMPLE_FOLDER, is_kept_as_unsure
from sopdeploy.data.photos.photo import ImageFiles
from sopdeploy.errors import amount


def open_any_images(root: Path) -> ImageFiles:
    """Open all images below *root*, without their classes; raises `DataError` if there are none."""
    root = expand_user(root)
    paths = np.asarray(list_any_images(root), dtype=np.bytes_)
    return ImageFiles(root, ("",), paths, np.zeros(len(paths), dtype=np.int64))


class UnknownImages(NamedTuple):
    """The images of no class, None if none remain, and a note about those that were left out, if any."""

    images: ImageFiles | None
    note: str


def open_unknown(root: Path) -> UnknownImages:
    """Open the images of no class below *root*, without those that a server kept because of their scores.

    The live network rejected most of these, so that the share that a network rejects would seem
    higher than it is. Those of the uniform sample remain. Raises `DataError` if the folder has no
    images at all.
    """
    images = open_any_images(root)
    paths = [images.path(index) for index in range(len(images))]

    # A kept photograph has an ID as its name. Those in `SAMPLE_FOLDER` were drawn whatever their
    # scores.
    are_biased = [
        path.parent.name != SAMPLE_FOLDER and is_kept_as_unsure(path.name) for path in paths
    ]
    num_left_out = sum(are_biased)
    num_remaining = len(images) - num_left_out
    if not num_left_out:
        return UnknownImages(images, "")

    note = (
        f"{root}: {amount(num_left_out, 'photo')} left out, because a server "
        f"kept them outside of its sample, mostly as unknown; {num_remaining:,} "
        "remain"
    )
    remaining = images.select(~np.asarray(are_biased)) if num_remaining else None
    return UnknownImages(remaining, note)
