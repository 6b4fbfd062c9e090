"""Fine-tuning of EfficientNet-Lite0 on photographs: the last stages on stored outputs of the frozen ones.

The stem and the first three stages keep their ImageNet weights and statistics. Their outputs
for `VARIANTS` augmented crops and the center crop of every photograph are computed once, so
that a training step computes `blocks.3` to the classifier only. DSoP is
`dsop-timm:tf_efficientnet_lite0` with branches at the two of its four taps that are trained.

The classifier starts as the head that `train` fits to the frozen network (Kumar et al.,
"Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution", ICLR 2022),
and the network's batch norms keep their statistics.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from gain.task import Task
from sopdeploy.checkpoint import read_pytorch
from sopdeploy.config import StrictModel
from sopdeploy.data.augment import AugmentedDataset, RandomResizedCrop
from sopdeploy.data.batches import sequential_batches
from sopdeploy.errors import DataError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.models.dsop import DSoPConfig
from sopdeploy.models.dsop_networks import DSoPTimm
from sopdeploy.models.second_order_head import HeadConfig, SecondOrderHead
from sopdeploy.models.timm_networks import PlainTimm, TimmBackbone, TimmConfig
from sopdeploy.paths import check_is_weights
from sopdeploy.photos.folder import open_folder
from sopdeploy.photos.network_inputs import PreprocessedDataset
from sopdeploy.photos.photo import LabeledImages
from sopdeploy.seeds import derive_seed
from sopdeploy.training.few_shot.classifier import LinearProblem, Space, unit_length
from sopdeploy.training.few_shot.features import WIDTH
from sopdeploy.training.few_shot.scaling import Scaling
from sopdeploy.training.few_shot.targets import Targets
from sopdeploy.training.recipe import FewShotConfig

BACKBONE, FROZEN_BLOCKS = "tf_efficientnet_lite0", 3
SIDE, VARIANTS, BATCH = 128, 6, 32
MAX_PER_CLASS = 60  # photographs, by lot
HALF = (0.5, 0.5, 0.5)  # mean and standard deviation of the weights' input
RULES = Preprocess(resize=146, crop=SIDE, interpolation="bicubic", mean=HALF, std=HALF)
CROPS = RandomResizedCrop(kind="random-resized-crop", scale=(0.5, 1.0), flip=0.5)


class PhotosConfig(StrictModel):
    """Number of photographs of each class for training, and number of the others for testing.

    `maps` is the file of `write_maps`, `weights` the state dict of the network.
    """

    maps: Path
    weights: Path
    classes: int = 10
    per_class: int = 10
    test: int = 400


class LastStagesConfig(TimmConfig):
    """The network of the weights."""

    backbone: str = BACKBONE


class DSoPLastStagesConfig(LastStagesConfig, DSoPConfig):
    """Two branches at the taps behind the frozen stages, with the blocks and widths of `dsop-timm:NAME`."""

    aux_blocks: tuple[int, ...] = (0, 0, 2, 2)


class DSoPLastStages(DSoPTimm):
    """DSoP on the network whose first stages are frozen."""


class HeadLastStagesConfig(LastStagesConfig):
    """The head that `train` fits, on the last two taps."""

    head: HeadConfig = HeadConfig(taps=("blocks.4", "blocks.6"), width=WIDTH)


class HeadLastStages(SecondOrderHead, PlainTimm):
    """The network whose first stages are frozen, with a second-order head."""


def load_weights(network: TimmBackbone, file: Path) -> None:
    """Load the weights in *file* into *network*, except for those of the classifier."""
    stored, _ = read_pytorch(check_is_weights(file))
    own = network.state_dict()
    stored = {
        name: tensor for name, tensor in stored.items() if not name.startswith("classifier.")
    }
    unknown = [name for name in stored if name not in own]
    if unknown:
        raise DataError(
            f"{file}: {unknown[0]} is not in {BACKBONE}; give a state dict with timm's names"
        )
    network.load_state_dict(own | stored)


def first_stages(network: TimmBackbone) -> nn.Sequential:
    """Return the frozen part of *network*."""
    stem, norm = network.get_submodule("conv_stem"), network.get_submodule("bn1")
    blocks = [network.get_submodule(f"blocks.{number}") for number in range(FROZEN_BLOCKS)]
    return nn.Sequential(stem, norm, *blocks).eval()


def remove_first_stages(network: TimmBackbone) -> None:
    """Replace the frozen part of *network* by identities; its input is then the output of that part."""
    for name in ("conv_stem", "bn1", *(f"blocks.{number}" for number in range(FROZEN_BLOCKS))):
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, nn.Identity())


def write_maps(folder: Path, weights: Path, target: Path, limit: int = MAX_PER_CLASS) -> None:
    """Store the frozen part's outputs (N, 1 + VARIANTS, C, H, W), float16, and the labels of photographs.

    Position 0 is the center crop. *folder* has a folder of photographs for each class; of each
    class, at most *limit* are chosen by lot.
    """
    images = open_folder(folder).train
    random = np.random.default_rng(0)
    chosen = np.zeros(len(images), np.bool_)
    for label in range(len(images.labels)):
        chosen[random.permutation(np.flatnonzero(images.targets == label))[:limit]] = True
    images = images.select(chosen)
    network = TimmBackbone(LastStagesConfig(), len(images.labels))
    load_weights(network, weights)
    frozen = first_stages(network)
    maps = [compute_maps(frozen, images, variant) for variant in range(1 + VARIANTS)]
    partial = target.with_name(f"{target.stem}.part.npz")
    np.savez(partial, maps=np.stack(maps, axis=1), labels=images.targets)
    partial.replace(target)


def count_classes(maps: Path) -> int:
    """Count the classes of the photographs in the file of `write_maps`."""
    with np.load(maps) as stored:
        return len(np.unique(stored["labels"]))


@torch.no_grad()
def start_from_head(network: TimmBackbone, task: Task) -> None:
    """Fit the classifier of *network* to the center crops for training, as the few-shot procedure does."""
    network.eval()
    crops = task.train[:, 0]
    if isinstance(network, SecondOrderHead):
        own, maps = network.head_inputs(crops)
        pooled = network.pooled_head
        pooled.fit_projection([maps])
        parts = [own, *(pooled.pooling(tap)(maps[tap]) for tap in pooled.channels)]
        classifier = pooled.fc
    else:
        parts = [
            network.timm_network.forward_head(network.feature_maps(crops)[0], pre_logits=True)
        ]
        classifier = network.timm_network.get_classifier()
    weight, bias = fit_head(parts, task.labels)
    classifier.weight.copy_(weight)
    classifier.bias.copy_(bias)


def fit_head(parts: list[Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
    """Fit a linear discriminant to vectors with these *parts* (N, D_i); return its weight and bias."""
    arrays, classes = [part.numpy() for part in parts], labels.numpy()
    targets = Targets(np.eye(int(classes.max()) + 1)[classes], classes, activation="softmax")
    space = Space.of(arrays)
    problem = LinearProblem(
        space, space.project(np.concatenate(arrays, axis=1)), unit_length(arrays[0]), targets
    )
    folds = targets.folds(
        [str(index) for index in range(len(classes))], FewShotConfig().folds, 0
    )
    scaling = Scaling.fit([problem.cross_validate(folds)], targets)
    fitted = problem.fit_all(scaling)
    return torch.from_numpy(fitted.weight), torch.from_numpy(fitted.bias)


def keep_statistics(network: TimmBackbone) -> None:
    """Put the batch norms of *network*, except for those of branches, into eval mode."""
    for name, module in network.named_modules():
        if isinstance(module, nn.BatchNorm2d) and not name.startswith("branches."):
            module.eval()


@torch.inference_mode()
def compute_maps(frozen: nn.Module, images: LabeledImages, variant: int) -> np.ndarray:
    """Compute the outputs of *frozen* for one *variant* of all *images*; variant 0 is the center crop."""
    source: PreprocessedDataset | AugmentedDataset = PreprocessedDataset(images, RULES)
    if variant:
        source = AugmentedDataset(
            images, augmentation=CROPS, preprocess=RULES, seed=0, epoch=variant
        )
    outputs = []
    for members in sequential_batches(len(images), BATCH):
        pixels = torch.from_numpy(source.pixels(members))
        batch = (pixels.permute(0, 3, 1, 2).float() / 255 - HALF[0]) / HALF[0]
        outputs.append(frozen(batch).half().numpy())
    return np.concatenate(outputs)


def photos(config: PhotosConfig, seed: int) -> Task:
    """Draw the training photographs of *seed*; their maps are (B, 1 + VARIANTS, C, H, W)."""
    with np.load(config.maps) as stored:
        maps, labels = torch.from_numpy(stored["maps"]), torch.from_numpy(stored["labels"])
    generator = torch.Generator().manual_seed(derive_seed(seed, "subset"))
    drawn = []
    for label in range(int(labels.max()) + 1):
        members = (labels == label).nonzero().flatten()
        if len(members) <= config.per_class:
            raise DataError(
                f"class {label}: {len(members)} photographs; more than {config.per_class} needed"
            )
        drawn.append(
            members[torch.randperm(len(members), generator=generator)[: config.per_class]]
        )
    chosen = torch.cat(drawn)
    order = torch.randperm(len(labels), generator=generator)
    rest = order[~torch.isin(order, chosen)][: config.test]
    return Task(
        maps[chosen].float(),
        labels[chosen],
        maps[rest, 0].float(),
        labels[rest],
        rest,
        len(labels),
    )
