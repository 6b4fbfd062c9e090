"""A network with the features of the images, and the heads that are compared on them."""

import hashlib
import time
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sopdeploy.data.base import LabeledImages, PreprocessedDataset, derive_seed
from sopdeploy.data.batches import load_batches, sequential_batches
from sopdeploy.data.near import Copies, find_pairs
from sopdeploy.errors import ConfigError
from sopdeploy.files import expand_user
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.layers.normalize import Normalize
from sopdeploy.models.base import Classifier
from sopdeploy.models.registry import with_head
from sopdeploy.models.second_order_head import HeadConfig, SecondOrderHead
from sopdeploy.training.few_shot.classifier import GRID, Array, Indices, LinearHead, Problem, Targets
from sopdeploy.training.few_shot.config import CandidateResult, FewShotConfig
from sopdeploy.training.few_shot.estimates import estimate
from sopdeploy.training.fine_tuning import StartConfig
from sopdeploy.training.recipe import ModelConfig, Recipe

WIDTH, TAPS = 64, 2  # channels of the covariances, and number of feature maps
BATCHES = {"cpu": 4, "cuda": 64}  # images; the maps of four stay in a CPU's cache, which halves the time
PROJECTION_IMAGES = 128  # for the projections: with 49 positions per image, 6,272 rows


class Candidate(NamedTuple):
    """A head, its problem, its out-of-fold logits (G, N, K) and losses (G, N), and its record."""

    head: HeadConfig
    problem: Problem
    logits: Array
    losses: Array
    result: CandidateResult


class Network:
    """The network of *recipe* with the features of *images*, and the candidates that were compared on them.

    `full` is a copy of the network with the head that reads all statistics. `vectors` (N, D) are the inputs
    of this head and `hashes` the hashes of the pixels; to compute both took `seconds`.
    """

    def __init__(
        self, recipe: Recipe, model: Classifier, images: LabeledImages, on_image: Callable[[int, int], None]
    ) -> None:
        since = time.monotonic()
        self.recipe, self.model, self.full = recipe, model, full_head(recipe, model)
        self.vectors, self.hashes = compute_features(self.full, images, recipe, on_image)
        self.seconds = time.monotonic() - since
        self.candidates: list[Candidate] = []

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

    def describe(self, head: HeadConfig) -> str:
        """Describe the network with *head* in a few words."""
        return f"{self.recipe.model.name} {head.kind}" + (f" of {', '.join(head.taps)}" if head.taps else "")

    def cross_validate(self, head: HeadConfig, targets: Targets, folds_N: Indices, groups_N: Indices) -> None:
        """Cross-validate *head* and add it to the candidates."""
        since = time.monotonic()
        problem = Problem.create([self.vectors[:, part] for part in self.columns(head)], targets)
        logits = problem.cross_validate(folds_N)
        losses, seconds = targets.losses(logits), round(time.monotonic() - since, 3)
        best = int(losses.mean(axis=1).argmin())  # of the strengths in `GRID`
        result = CandidateResult(
            name=self.describe(head),
            score=estimate(targets, logits[best], self.recipe.seed, groups_N, int(folds_N.max()) + 1),
            loss=float(losses[best].mean()),
            num_features=len(problem.center),
            strength=GRID[best],
            seconds=seconds,
        )
        self.candidates.append(Candidate(head, problem, logits, losses, result))

    @torch.no_grad()
    def build(self, chosen: Candidate, fitted: LinearHead, distance_weight: float) -> SecondOrderHead:
        """Build the network with the head of *chosen* and the weights *fitted*.

        The logits are reduced by *distance_weight* times the distance from the mean of the training images.
        """
        with_distance = distance_weight > 0
        config = chosen.head.model_copy(update={"distance": with_distance})
        model: Any = with_head(self.recipe.model.name, self.model, config)
        head, weight = model.pooled_head, fitted.weight
        for tap in head.channels if head.poolings else ():
            head.pooling(tap).load_state_dict(self.full.pooled_head.pooling(tap).state_dict())
        if with_distance:
            head.center.copy_(torch.from_numpy(chosen.problem.center))
            head.scale.copy_(torch.from_numpy(chosen.problem.scale))
            weight = np.concatenate([weight, np.full((len(weight), 1), -distance_weight)], axis=1)
        head.fc.weight.copy_(torch.from_numpy(weight))
        head.fc.bias.copy_(torch.from_numpy(fitted.bias))
        network: SecondOrderHead = model.eval()
        return network


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


def other_recipe(recipe: Recipe, text: str) -> Recipe:
    """Change *recipe* to the network of *text*, NAME or NAME=FILE; preprocessing is that of its weights."""
    name, _, file = text.partition("=")
    start = recipe.start or StartConfig()
    if file:
        start = start.model_copy(update={"weights": expand_user(Path(file))})
    preprocess = recipe.preprocess if start.weights == "none" else Preprocess()
    changes = {"model": ModelConfig(name=name), "start": start, "preprocess": preprocess}
    return recipe.model_copy(update=changes)


def full_head(recipe: Recipe, model: Classifier) -> SecondOrderHead:
    """Give *model* a head on all statistics of its last taps, or without taps a head on its own vector."""
    torch.manual_seed(derive_seed(recipe.seed, "head"))
    taps = tuple(model.tap_channels)[-TAPS:] or None
    head = HeadConfig(kind="gap+mean+isqrt", taps=taps, width=WIDTH)
    try:
        network: Any = with_head(recipe.model.name, model, head)
    except ConfigError as error:
        if not str(error).startswith("head.taps"):
            raise
        network = with_head(recipe.model.name, model, HeadConfig(kind="gap"))
    full: SecondOrderHead = network.eval()
    return full


def list_heads(full: SecondOrderHead, config: FewShotConfig) -> list[HeadConfig]:
    """List the heads to compare, the default one first.

    Without `config.heads`, the means of the feature maps are compared only if the network's own vector is
    not the mean of the last one.
    """
    all_taps, kinds = tuple(full.pooled_head.channels), config.heads
    if not all_taps:
        return [HeadConfig(kind="gap")]
    if not kinds:
        kinds = ("gap+isqrt", "gap") if full.own_vector_is_mean else ("gap+isqrt", "gap+mean+isqrt", "gap")
    last_tap = all_taps[-1:]
    heads = []
    for kind in kinds:
        if kind == "gap":  # reads the network's own vector instead of taps
            choices: list[tuple[str, ...] | None] = [None]
        else:
            choices = [all_taps] if all_taps == last_tap else [all_taps, last_tap]
        heads += [HeadConfig(kind=kind, taps=taps, width=WIDTH) for taps in choices]
    return heads
