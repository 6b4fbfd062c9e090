"""Groups of copies without a run, and vectors of photographs, by features of the default network."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from sopdeploy.data.photos.copies import Groups
from sopdeploy.data.photos.photo import ImageFiles, LabeledImages
from sopdeploy.errors import DataError
from sopdeploy.training.distributed import Strategy, select_device
from sopdeploy.training.few_shot.classifier import unit_length
from sopdeploy.training.few_shot.features import CachedNetwork, full_head
from sopdeploy.training.few_shot.groups import group_by_features
from sopdeploy.training.settings.recipe import Recipe, read_recipe
from sopdeploy.training.start_weights import create_initial_model
from sopdeploy.weights.published import find_lite_weights


def has_default_weights() -> bool:
    """Tell whether the ImageNet weights of the default network are on this machine; downloads nothing."""
    return find_lite_weights(_default_recipe().model.name) is not None


def group_images(images: LabeledImages, on_image: Callable[[int, int], None]) -> Groups:
    """Group *images* (N,) as `group_by_features` does, by the default network.

    Its weights are downloaded if they are not on this machine.
    """
    return group_by_features(open_default_network(), images, on_image).groups


@torch.no_grad()
def embed_files(paths: Sequence[Path]) -> Iterator[tuple[Path, NDArray[np.float32]]]:
    """Yield the vector (D,) of length 1 of each readable image of *paths*, by the default network.

    Its weights are downloaded if they are not on this machine.
    """
    network = open_default_network()
    for start in range(0, len(paths), network.batch_size):
        part = paths[start : start + network.batch_size]
        below_root = np.asarray(
            [os.fsencode(path.absolute().relative_to("/")) for path in part], np.bytes_
        )

        # Images need classes, which are not used.
        targets = np.zeros(len(part), np.int64)
        images = ImageFiles(Path("/"), ("one", "other"), below_root, targets)

        # Images that cannot be read are left out.
        readable = []
        for index in range(len(part)):
            with suppress(DataError):
                images.photo(index).check()
                readable.append(index)

        for batch in network.batches(images, readable) if readable else ():
            vectors = unit_length(batch.own_vectors.float().cpu().numpy())
            for index, vector in zip(batch.indices, vectors, strict=True):
                yield part[index], vector


def _default_recipe() -> Recipe:
    return read_recipe("photos", ["data.path=."])  # required, but not read


def open_default_network() -> CachedNetwork:
    """Build the default network with its ImageNet weights, which are downloaded if they are not here."""
    recipe = _default_recipe()
    strategy = Strategy(select_device(recipe.device))
    # The network needs classes, which are not used.
    model, recipe, _ = create_initial_model(recipe, ("one", "other"), strategy)
    return CachedNetwork(full_head(recipe, model.to(strategy.device)), recipe)
