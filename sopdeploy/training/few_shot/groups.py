"""Groups of copies among images, by the features of a frozen network.

Letters: N images, V views, D components of a vector.
"""

from collections.abc import Callable
from contextlib import suppress

import numpy as np
import torch

from sopdeploy.data.photos.copies import (
    MAX_COMPARED,
    Grouped,
    connect,
    find_near_duplicates,
    group_photographs,
)
from sopdeploy.data.photos.photo import LabeledImages
from sopdeploy.errors import DataError
from sopdeploy.models.base import Classifier
from sopdeploy.training.device import move_to_device
from sopdeploy.training.distributed import Strategy
from sopdeploy.training.few_shot.features import CachedNetwork, average_views, full_head
from sopdeploy.training.procedure import has_head
from sopdeploy.training.settings.head import FeatureSettings
from sopdeploy.training.settings.recipe import Recipe
from sopdeploy.training.start_weights import WeightSource, create_initial_model


@torch.no_grad()
def group_by_features(
    outputs: CachedNetwork,
    images: LabeledImages,
    on_image: Callable[[int, int], None] = lambda _done, _total: None,
) -> Grouped:
    """Group *images* (N,) by near-duplicates, found by the features of *outputs*, and by known groups.

    Unlike `train`, it finds no clips. *on_image* receives the numbers of images done and in total.
    Raises `DataError` for an image that cannot be decoded.
    """
    batches = []
    views = []
    num_done = 0
    for batch in outputs.batches(images, list(range(len(images)))):
        batches.append(batch)
        views.append(average_views(batch.own_vectors, batch.maps))
        batch.maps.clear()  # the largest part of a batch
        num_done += len(batch.indices)
        on_image(num_done, len(images))

    hashes = [pixel_hash for batch in batches for pixel_hash in batch.hashes]
    near = find_near_duplicates(
        [np.concatenate(part) for part in zip(*views, strict=True)],  # (N, V, D) each
        np.concatenate([batch.small for batch in batches]),
        images.targets,
        hashes,
    )
    return Grouped(
        connect(len(images), near.pairs, hashes, images.groups),
        np.concatenate([batch.file_hashes for batch in batches]),
        np.concatenate([batch.times for batch in batches]),
        near.vectors,
    )


def group_by_network(recipe: Recipe, network: Classifier, images: LabeledImages) -> Grouped:
    """Group *images* (N,) by the features of *network*, from which a run of *recipe* starts.

    Random features tell nothing, so pixels do then (`group_photographs`). Of more than
    `MAX_COMPARED` images, or if one cannot be decoded, only equal files are grouped.
    """
    if not recipe.starts_random and len(images) <= MAX_COMPARED:
        settings = recipe.part(FeatureSettings)
        outputs = CachedNetwork(full_head(settings, network), settings)
        with suppress(DataError):  # whoever uses the image names it
            return group_by_features(outputs, images)
    return group_photographs(images)


def group_by_start(
    recipe: Recipe, strategy: Strategy, weights: WeightSource | None, images: LabeledImages
) -> Grouped:
    """Group *images* (N,) by the features of the network that a run of *recipe* will start from.

    *weights* is the file of the start weights, if it is known. If the network starts random or has no
    head, or if several processes train, pixels tell copies (`group_photographs`).
    """
    if recipe.starts_random or not has_head(recipe) or strategy.world > 1:
        return group_photographs(images)
    model, recipe, _ = create_initial_model(recipe, images.labels, strategy, weights)
    return group_by_network(recipe, move_to_device(recipe, model, strategy), images)
