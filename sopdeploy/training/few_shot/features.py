"""The frozen network with the features of all images, and the network with a fitted classifier."""

import hashlib
from collections.abc import Callable, Iterator
from itertools import chain, islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sopdeploy.data.base import LabeledImages, PreprocessedDataset, derive_seed
from sopdeploy.data.batches import load_batches, sequential_batches
from sopdeploy.data.near import Copies, find_pairs
from sopdeploy.errors import ConfigError
from sopdeploy.layers.normalize import Normalize
from sopdeploy.models.base import Classifier
from sopdeploy.models.registry import with_head
from sopdeploy.models.second_order_head import HeadConfig, HeadKind, SecondOrderHead
from sopdeploy.training.few_shot.classifier import Indices, LinearHead, Problem
from sopdeploy.training.recipe import Recipe

WIDTH, TAPS = 64, 2  # channels of the covariances, and number of feature maps
BATCHES = {"cpu": 4, "cuda": 64}  # images; the maps of four stay in a CPU's cache, which halves the time
PROJECTION_IMAGES = 128  # for the projections: with 49 positions per image, 6,272 rows


class Features:
    """The network of *recipe* with the features of *images*.

    `full` is a copy of the network with the head that reads all statistics, `vectors` (N, D) are the inputs
    of this head and `hashes` the hashes of the pixels. `head` is the head to fit, of the
    configured *kind*.
    """

    def __init__(
        self,
        recipe: Recipe,
        kind: HeadKind,
        model: Classifier,
        images: LabeledImages,
        on_image: Callable[[int, int], None],
    ) -> None:
        self.recipe, self.model, self.full = recipe, model, full_head(recipe, model)
        self.vectors, self.hashes = compute_features(self.full, images, recipe, on_image)
        taps = tuple(self.full.pooled_head.channels)
        self.head = HeadConfig(kind="gap")  # the only one of a network without feature maps
        if taps and kind != "gap":
            self.head = HeadConfig(kind=kind, taps=taps, width=WIDTH)

    def columns(self, head: HeadConfig) -> list[slice]:
        """Find the columns of `vectors` that *head* reads: one slice per statistic and tap."""
        pooled = self.full.pooled_head
        root_lengths = {tap: pooled.pooling(tap).out_features for tap in pooled.channels if pooled.poolings}
        own_length = self.full.num_features() - sum(pooled.channels.values()) - sum(root_lengths.values())
        lengths = {("gap", ""): own_length}
        lengths |= {("mean", tap): length for tap, length in pooled.channels.items()}
        lengths |= {("isqrt", tap): length for tap, length in root_lengths.items()}
        columns, start = [], 0
        for (statistic, tap), length in lengths.items():
            if statistic in head.parts and (statistic == "gap" or tap in (head.taps or ())):
                columns.append(slice(start, start + length))
            start += length
        return columns

    @torch.no_grad()
    def find_copies(self, images: LabeledImages) -> Indices:
        """Find the pairs (2, P) of near-duplicates among *images* by the averages of the feature maps."""
        head, device = self.full.pooled_head, next(self.full.parameters()).device
        taps = tuple(head.channels) or None
        columns = self.columns(HeadConfig(kind="gap+mean" if taps else "gap", taps=taps))
        normalize, copies = Normalize(self.recipe.preprocess).to(device), Copies.of(images)
        dataset = PreprocessedDataset(copies, self.recipe.preprocess)
        batches = sequential_batches(len(copies), BATCHES[device.type])
        loader = load_batches(dataset, batches, self.recipe.workers, device)
        inputs = (self.full.head_inputs(normalize(pixels)) for pixels, _ in loader)
        of_copies = np.concatenate([head.vector(own, maps).float().cpu().numpy() for own, maps in inputs])
        parts = [np.concatenate([self.vectors[:, part], of_copies[:, part]]) for part in columns]
        return find_pairs(parts, copies.originals, images.targets)

    @torch.no_grad()
    def build(self, problem: Problem, fitted: LinearHead, distance_weight: float) -> SecondOrderHead:
        """Build the network with the head that was *fitted* to *problem*.

        The logits are reduced by *distance_weight* times the distance from the mean of the training images.
        """
        with_distance = distance_weight > 0
        config = self.head.model_copy(update={"distance": with_distance})
        model = with_head(self.recipe.model.name, self.model, config)
        head, weight = model.pooled_head, fitted.weight
        for tap in head.channels if head.poolings else ():
            head.pooling(tap).load_state_dict(self.full.pooled_head.pooling(tap).state_dict())
        if with_distance:
            head.center.copy_(torch.from_numpy(problem.center))
            head.scale.copy_(torch.from_numpy(problem.scale))
            weight = np.concatenate([weight, np.full((len(weight), 1), -distance_weight)], axis=1)
        head.fc.weight.copy_(torch.from_numpy(weight))
        head.fc.bias.copy_(torch.from_numpy(fitted.bias))
        return model.eval()


@torch.no_grad()
def compute_features(
    network: SecondOrderHead, images: LabeledImages, recipe: Recipe, on_image: Callable[[int, int], None]
) -> tuple[NDArray[np.float32], list[str]]:
    """Fit the projections of *network* to its feature maps, and compute the vectors that its head reads.

    Returns the vectors (N, D) of all images, and the hashes of their pixels. *on_image* receives the numbers
    of images done and in total.
    """
    device, count = next(network.parameters()).device, len(images)
    shuffled = np.random.default_rng(0).permutation(count)  # so that the first batches show many classes
    size = BATCHES[device.type]
    batches = [shuffled[start : start + size].tolist() for start in range(0, count, size)]
    network = network.eval().to(memory_format=torch.channels_last)
    normalize, head = Normalize(recipe.preprocess).to(device), network.pooled_head
    dataset, hashes = PreprocessedDataset(images, recipe.preprocess), [""] * count

    def compute_inputs() -> Iterator[tuple[list[int], Tensor, dict[str, Tensor]]]:
        loader = load_batches(dataset, batches, recipe.workers, torch.device("cpu"))
        for number, (indices, (pixels, _)) in enumerate(zip(batches, loader, strict=True)):
            for index, image in zip(indices, pixels, strict=True):
                hashes[index] = hashlib.sha256(image.numpy().tobytes()).hexdigest()
            yield indices, *network.head_inputs(normalize(pixels.to(device)))
            on_image(number * size + len(indices), count)

    inputs = compute_inputs()
    projection_inputs = list(islice(inputs, PROJECTION_IMAGES // size))
    head.fit_projection([maps for _, _, maps in projection_inputs])
    vectors = np.zeros((count, network.num_features()), np.float32)
    for indices, own, maps in chain(projection_inputs, inputs):
        vectors[indices] = head.vector(own, maps).float().cpu().numpy()
    return vectors, hashes


def full_head(recipe: Recipe, model: Classifier) -> SecondOrderHead:
    """Give *model* a head on all statistics of its last taps, or without taps a head on its own vector."""
    torch.manual_seed(derive_seed(recipe.seed, "head"))
    taps = tuple(model.tap_channels)[-TAPS:] or None
    head = HeadConfig(kind="gap+mean+isqrt", taps=taps, width=WIDTH)
    try:
        return with_head(recipe.model.name, model, head).eval()
    except ConfigError as error:
        if not str(error).startswith("head.taps"):
            raise
        return with_head(recipe.model.name, model, HeadConfig(kind="gap")).eval()
