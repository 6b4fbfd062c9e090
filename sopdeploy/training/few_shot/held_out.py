"""Held-out images: their logits, and how many of them the training images show, too.

Letters: M held-out images, K classes, D length of a vector, V views, S pixels of a side.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from sopdeploy.data.photos.copies import NO_PAIRS, connect, find_near_duplicates
from sopdeploy.data.photos.photo import LabeledImages
from sopdeploy.models.second_order_head import SecondOrderHead
from sopdeploy.training.few_shot.features import CachedNetwork, Features, average_views
from sopdeploy.training.few_shot.targets import Array


class HeldOutOutputs(NamedTuple):
    """The `logits` (M, K) of held-out images, and what tells copies.

    These are views (M, V, D) of each part of the vectors, `small` images (M, S, S), and `hashes`
    of the pixels (M,).
    """

    logits: Array
    views: list[NDArray[np.float32]]
    small: NDArray[np.uint8]
    hashes: list[str]


@torch.no_grad()
def predict_held_out(
    outputs: CachedNetwork, network: SecondOrderHead, images: LabeledImages
) -> HeldOutOutputs:
    """Run the head of *network* on the *outputs* for *images*, at least one; the frozen network runs once.

    The feature maps that the head reads are among those of *outputs*. Raises `DataError` for
    images that cannot be used.
    """
    logits = []
    views = []
    small = []
    hashes: list[str] = []
    for batch in outputs.batches(images, list(range(len(images)))):
        maps = {tap: batch.maps[tap] for tap in network.maps}
        logits.append(network.pooled_head(batch.own_vectors, maps).double().cpu().numpy())
        views.append(average_views(batch.own_vectors, batch.maps))
        small.append(batch.small)
        hashes += batch.hashes

    views_of_all = [np.concatenate(part) for part in zip(*views, strict=True)]
    return HeldOutOutputs(np.concatenate(logits), views_of_all, np.concatenate(small), hashes)


def find_shown_in_training(
    train: LabeledImages,
    features: Features,
    held_out: LabeledImages,
    outputs: HeldOutOutputs,
    *,
    with_copies: bool,
) -> NDArray[np.bool_]:
    """Tell which *held_out* images (M,) *train*, which has these *features*, shows, too.

    These have equal pixels; *with_copies*, also near-duplicates. Only pairs of a training image
    and a held-out one are compared.
    """
    hashes = [*features.hashes, *outputs.hashes]
    pairs = NO_PAIRS
    if with_copies:
        both = zip(features.views, outputs.views, strict=True)
        near = find_near_duplicates(
            [np.concatenate(views) for views in both],
            np.concatenate([features.small, outputs.small]),
            np.concatenate([train.targets, held_out.targets]),
            hashes,
            parts=np.repeat([0, 1], [len(train), len(held_out)]),
        )
        pairs = near.pairs

    groups = connect(len(hashes), pairs, hashes)
    return np.isin(groups[len(train) :], groups[: len(train)])
