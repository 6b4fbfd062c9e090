"""Features of a frozen network: the input of its classifier and, for fine-tuning, of its last stage.

Every image is seen in two deterministic views, the center crop of the service and its mirror image. The
result is stored in the run folder under a key of weights, preprocessing and pixels, so that an interrupted
run does not compute it again.
"""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sopdeploy.checkpoint import load_plain
from sopdeploy.data.base import ImagesDataset, LabeledImages
from sopdeploy.data.batches import load_batches, sequential_batches
from sopdeploy.errors import CheckpointError
from sopdeploy.files import atomic_write
from sopdeploy.images.preprocess import Preprocess, tta_views
from sopdeploy.layers.normalize import Normalize
from sopdeploy.models.base import Classifier, is_in
from sopdeploy.training.fine_tuning import classifier_name

BATCH = 16  # images, each with two views
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
        return tta_views(lambda rules: rules(image), self.preprocess, "flip"), index


def last_stage(model: Classifier) -> str:
    """Find the dotted name of the last stage of *model*, the unit of its last tap."""
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

    The models are in eval mode afterwards. Stage inputs above *max_gib* are not kept; 0 keeps none.
    *on_image* receives the numbers of images done and in total. The result is read from the file *cache* if
    it has the same key.
    """
    dataset, device = TwoViews(images, preprocess), next(models[0].parameters()).device
    batches = sequential_batches(len(images), BATCH)
    views = [views for views, _ in load_batches(dataset, batches, workers, torch.device("cpu"))]
    keys = tuple(hashlib.sha256(one[0].numpy().tobytes()).hexdigest()[:32] for part in views for one in part)
    key = _cache_key(models, preprocess, keys, max_gib)
    stored = _read_cache(cache, key)
    if stored is not None:
        on_image(len(images), len(images))
        return Features(*stored, keys)
    normalize = Normalize(preprocess).to(device)
    for model in models:
        model.eval()
    vectors: list[list[Tensor]] = [[] for _ in models]
    inputs: list[Tensor] = []
    keep, done = max_gib > 0, 0
    for part in views:
        with torch.no_grad():
            found, stage_input = _run(models, normalize(part.to(device).flatten(end_dim=1)))
        for collected, vector in zip(vectors, found, strict=True):
            collected.append(_by_image(vector))
        keep = keep and stage_input.nbytes * len(images) * VIEWS <= max_gib * GIB * len(stage_input)
        if keep:
            inputs.append(_by_image(stage_input))
        done += len(part)
        on_image(done, len(images))
    joined, tails = tuple(torch.cat(collected) for collected in vectors), torch.cat(inputs) if keep else None
    with atomic_write(cache) as partial:
        torch.save({"key": key, "vectors": list(joined), "stage_inputs": tails}, partial)
    return Features(joined, tails, keys)


def _run(models: Sequence[Classifier], images: Tensor) -> tuple[list[Tensor], Tensor]:
    """Compute the classifier's input (B, D) in each of *models*, and the input of the last stage."""
    first, vectors = models[0], []
    stage = first.get_submodule(last_stage(first))
    block = next(stage.children(), stage)  # our backbones call the blocks of a stage, timm's the stage
    with record_input(stage) as of_stage, record_input(block) as of_block:
        maps, _ = first.features(images)
    for model in models:
        with record_input(model.get_submodule(classifier_name(model))) as classifier:
            model.classify(maps.clone())
        vectors.append(classifier[0])
    return vectors, (of_stage or of_block)[0]


def _by_image(values: Tensor) -> Tensor:
    """Convert *values* (B * 2, ...) of both views to (B, 2, ...) float32 on the CPU."""
    return values.float().cpu().reshape(-1, VIEWS, *values.shape[1:])


@contextmanager
def record_input(module: nn.Module) -> Any:
    """Record the first input of each call of *module* in the list that is the context's value."""
    inputs: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _module, given: inputs.append(given[0].clone()))
    try:
        yield inputs
    finally:
        handle.remove()


def _cache_key(
    models: Sequence[Classifier], preprocess: Preprocess, keys: Sequence[str], max_gib: float
) -> str:
    """Hash what features depend on: weights outside classifier and branches, preprocessing and pixels."""
    digest = hashlib.sha256(f"{preprocess.model_dump_json()} {max_gib} {' '.join(keys)}".encode())
    for model in models:
        unused = (*model.training_only, classifier_name(model))
        for name, tensor in model.state_dict().items():
            if not is_in(name, *unused):
                digest.update(f"{name} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _read_cache(path: Path, key: str) -> tuple[tuple[Tensor, ...], Tensor | None] | None:
    """Read vectors and stage inputs from *path* if it holds those of *key*."""
    if not path.is_file():
        return None
    try:
        content = load_plain(path)
    except CheckpointError:
        return None
    if not isinstance(content, dict) or content.get("key") != key:
        return None
    return tuple(content["vectors"]), content["stage_inputs"]
