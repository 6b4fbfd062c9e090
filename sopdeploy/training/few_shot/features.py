"""Features of a frozen network: the input of its classifier and, for fine-tuning, of its last stage.

Every image is seen in two deterministic views, the center crop of the service and its mirror image. The
result is stored in the run folder under a key of weights, preprocessing and pixels, so that an interrupted
run does not compute it again.
"""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sopdeploy.checkpoint import load_plain, write_plain
from sopdeploy.data.base import ImagesDataset, LabeledImages
from sopdeploy.data.batches import load_batches
from sopdeploy.errors import CheckpointError
from sopdeploy.images.pixels import preprocess_image
from sopdeploy.images.preprocess import Preprocess, tta_views
from sopdeploy.layers.normalize import Normalize
from sopdeploy.models.base import Classifier, is_in
from sopdeploy.training.few_shot.networks import fit_reduction, reduces_by_components
from sopdeploy.training.fine_tuning import classifier_name

BATCH = 16  # images, each with two views
COMPONENT_IMAGES = 64  # images for the principal components; 49 positions each are 6 rows per channel of 512
VIEWS = 2
GIB = 2**30


@dataclass(frozen=True, slots=True)
class Features:
    """Features of all images.

    Attributes:
        vectors: One (N, 2, D) float32 tensor per network, the input of its classifier.
        stage_inputs: (N, 2, C, H, W) float32, the input of the last stage; `None` if it is too large.
        keys: Hash of the pixels of each image.
    """

    vectors: tuple[Tensor, ...]
    stage_inputs: Tensor | None
    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TwoViews(ImagesDataset):
    """Preprocessed images as (2, crop, crop, 3) uint8: center crop and its mirror image."""

    preprocess: Preprocess

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], int]:
        image, _ = self.images[index]
        return tta_views(lambda rules: preprocess_image(image, rules), self.preprocess, "flip"), index


def last_stage(model: Classifier) -> str:
    """Return the dotted name of the stage that contains the last tap of *model*."""
    tap = list(model.tap_channels)[-1]
    stage = tap.rpartition(".")[0]
    return stage if stage in model.stage_names else tap


def compute_features(
    models: Sequence[Classifier],
    images: LabeledImages,
    preprocess: Preprocess,
    *,
    workers: int,
    max_gib: float,
    cache: Path,
    on_image: Callable[[int, int], None],
) -> Features:
    """Compute the features of *images* by *models*, networks that differ in pooling and classifier only.

    Also sets dimension reductions before a covariance, in *models*, to the principal components of the
    feature maps. Stage inputs above *max_gib* are not kept; 0 keeps none. *on_image* receives the numbers of
    images done and in total. The result is read from the file *cache* if that has the same key.
    """
    dataset, device, count = TwoViews(images, preprocess), next(models[0].parameters()).device, len(images)
    order = np.random.default_rng(0).permutation(count)  # so that the first batches show many classes
    batches = [order[start : start + BATCH].tolist() for start in range(0, count, BATCH)]
    views = [views for views, _ in load_batches(dataset, batches, workers, torch.device("cpu"))]
    keys = _pixel_keys(views, batches)
    key = _cache_key(models, preprocess, keys, max_gib)
    stored = _read_cache(cache, key, models)
    if stored is not None:
        on_image(count, count)
        return Features(*stored, keys)
    normalize = Normalize(preprocess).to(device)
    for model in models:
        model.eval()
    reduced = [model for model in models if reduces_by_components(model)]
    rows, stage = [Rows(count) for _ in models], Rows(count, max_gib)
    waiting: list[tuple[list[int], Tensor]] = []  # maps before the components are known
    done = 0
    for indices, part in zip(batches, views, strict=True):
        maps, stage_input = _run(models[0], normalize(part.to(device).flatten(end_dim=1)))
        stage.put(indices, stage_input)
        waiting.append((indices, maps))
        done += len(indices)
        if not reduced or done >= min(count, COMPONENT_IMAGES):
            for model in reduced:
                fit_reduction(model.pooling, [maps for _, maps in waiting])  # type: ignore[arg-type]
            reduced = []
            for (some, maps), (model, to) in product(waiting, zip(models, rows, strict=True)):
                to.put(some, classifier_input(model, maps))
            waiting = []
        on_image(done, count)
    vectors = tuple(to.values for to in rows if to.values is not None)
    _write_cache(cache, key, models, vectors, stage.values)
    return Features(vectors, stage.values, keys)


class Rows:
    """Values (N, 2, ...) float32 of *count* images, filled in any order; `None` if larger than *max_gib*."""

    def __init__(self, count: int, max_gib: float | None = None) -> None:
        self.count, self.max_gib = count, max_gib
        self.values: Tensor | None = None

    def put(self, indices: list[int], views: Tensor) -> None:
        """Store the values *views* (B * 2, ...) of the images *indices*."""
        by_image = views.float().cpu().reshape(-1, VIEWS, *views.shape[1:])
        size = by_image[:1].nbytes * self.count
        if self.max_gib is not None and size > self.max_gib * GIB:
            return
        if self.values is None:
            self.values = by_image.new_empty((self.count, *by_image.shape[1:]))
        self.values[indices] = by_image


@torch.no_grad()
def _run(model: Classifier, images: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the last feature map (B, C, h, w) of *images*, and the input of the last stage."""
    stage = model.get_submodule(last_stage(model))
    # Backbones of the catalog call the blocks of a stage; those of timm call the stage itself.
    block = next(stage.children(), stage)
    with record_input(stage) as of_stage, record_input(block) as of_block:
        maps, _ = model.features(images)
    return maps, (of_stage or of_block)[0]


@torch.no_grad()
def classifier_input(model: Classifier, maps: Tensor) -> Tensor:
    """Compute the input (B, D) of the last linear layer of *model* from its last feature map."""
    with record_input(model.get_submodule(classifier_name(model))) as found:
        model.classify(maps.clone())
    vector: Tensor = found[0]
    return vector


@contextmanager
def record_input(module: nn.Module) -> Any:
    """Yield a list, and append the first input of each call of *module* to it."""
    inputs: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _module, given: inputs.append(given[0].clone()))
    try:
        yield inputs
    finally:
        handle.remove()


def _cache_key(
    models: Sequence[Classifier], preprocess: Preprocess, keys: Sequence[str], max_gib: float
) -> str:
    """Hash what features depend on: configs, weights outside classifier and branches, rules and pixels.

    Options such as strides and poolings can change the features without changing any weight.
    """
    digest = hashlib.sha256(f"{preprocess.model_dump_json()} {max_gib} {' '.join(keys)}".encode())
    for model in models:
        digest.update(model.config.model_dump_json().encode())
        unused = (*model.training_only, classifier_name(model))
        for name, tensor in model.state_dict().items():
            if not is_in(name, *unused):
                digest.update(f"{name} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _pixel_keys(views: Sequence[Tensor], batches: Sequence[list[int]]) -> tuple[str, ...]:
    """Hash the pixels of the first view of each image."""
    hashes = {
        index: hashlib.sha256(one[0].numpy().tobytes()).hexdigest()[:32]
        for part, indices in zip(views, batches, strict=True)
        for one, index in zip(part, indices, strict=True)
    }
    return tuple(hashes[index] for index in range(len(hashes)))


def _write_cache(
    path: Path, key: str, models: Sequence[Classifier], vectors: tuple[Tensor, ...], inputs: Tensor | None
) -> None:
    """Write features to *path*, with the poolings that computed them; raises `CheckpointError`."""
    poolings = [_pooling(model).state_dict() for model in models]
    content = {"key": key, "vectors": list(vectors), "stage_inputs": inputs, "poolings": poolings}
    write_plain(path, content)


def _read_cache(
    path: Path, key: str, models: Sequence[Classifier]
) -> tuple[tuple[Tensor, ...], Tensor | None] | None:
    """Read vectors and stage inputs from *path* and load the poolings into *models*.

    Returns `None` without a file of the same *key*.
    """
    if not path.is_file():
        return None
    try:
        content = load_plain(path)
    except CheckpointError:
        return None
    if not isinstance(content, dict) or content.get("key") != key or "poolings" not in content:
        return None
    for model, pooling in zip(models, content["poolings"], strict=True):
        _pooling(model).load_state_dict(pooling)
    return tuple(content["vectors"]), content["stage_inputs"]


def _pooling(model: Classifier) -> nn.Module:
    """Find the pooling of *model*; an empty module for networks of timm without one."""
    return model._modules.get("pooling") or nn.Identity()
