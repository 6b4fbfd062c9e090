"""The small scale: train every row on a few digits, with a reduced network, in minutes on a CPU.

The result is not the experiment of the paper. It shows that a row runs from its recipe to its figures.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sopdeploy.backbones.alexnet_vgg import AlexNetConfig, VGGConfig
from sopdeploy.backbones.efficientnet import EfficientNetConfig
from sopdeploy.backbones.resnet import ResNetConfig
from sopdeploy.bundle.folder import staging
from sopdeploy.config import StrictModel
from sopdeploy.data.datasets.libraries import open_digits
from sopdeploy.models.registry import entry, make_config
from sopdeploy.training.recipe import Recipe, format_toml

EPOCHS, BATCH_SIZE = 4, 32
LEARNING_RATES = {"sgd": 0.05, "rmsprop": 0.001, "radam": 0.005, "adamw": 0.002, "adahessian": 0.02}
STATEMENT = (
    "Small scale: not the experiment of the paper. Few small images, narrow networks and a few epochs; the "
    "measured errors say nothing about the printed ones."
)
IMAGES = "small-images/digits"  # folder of the images
IMAGES_PER_CLASS = {"train": 40, "val": 20}
POOLED_CHANNELS = 32
CHANNELS = 16  # channels of a branch's covariance


def _divided(divisor: int, least: int) -> Callable[[Any], Any]:
    """Build a function that divides a number, or each number of a sequence; results are at least *least*."""

    def reduce(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [reduce(number) for number in value]
        return max(least, value // divisor) if value else value

    return reduce


_REDUCTIONS: dict[str, Callable[[Any], Any]] = {  # option of a network, and the function that reduces it
    "depth": lambda depth: {8: 8, 18: 18, 20: 20, 34: 18}.get(depth, 26),
    "base_width": lambda width: 16 if width == 64 else 8,
    "blocks": lambda blocks: min(blocks, 4) if blocks < 18 else 3,
    "widen": lambda factor: min(factor, 2),
    "blocks_per_stage": lambda blocks: -(-blocks // 4),
    "cardinality": _divided(4, 1),
    "group_width": _divided(8, 1),
    "component_widths": _divided(16, 8),
    "gate_widths": _divided(16, 8),
    "cov_width": _divided(4, 32),
    "final_width": _divided(8, 8),
    "width": _divided(4, 8),
    "words": _divided(8, 2),
    "aux_blocks": _divided(4, 1),
    "aux_widths": _divided(8, 8),
}


def small_overrides(recipe: Recipe, images: Path) -> list[str]:
    """Build the changes, as for `sopdeploy train --set`, that reduce *recipe* and use the folder *images*."""
    name, config = small_network(recipe)
    side = 16 if entry(name).image_size == 32 else 32
    kind = recipe.optimizer.kind
    overrides = [
        *([f"model.name={name}"] if name != recipe.model.name else []),
        f"model.config={format_toml(config)}",
        f"data={format_toml({'kind': 'folder', 'path': str(images)})}",
        f"epochs={EPOCHS}",
        f"batch_size={BATCH_SIZE}",
        "accumulate=1",
        "workers=0",
        f"preprocess.resize={side}",
        f"preprocess.crop={side}",
        f'augment={{kind="pad-crop", pad={side // 16}}}',
        f"optimizer.lr={LEARNING_RATES[kind]}",
        "optimizer.clip_norm=5.0",
        'schedule={kind="one-cycle", rise=0.3}',
    ]
    if recipe.start is not None and recipe.start.learn == "all":
        overrides.append("start.weights=none")
    if recipe.teacher is not None and recipe.teacher.model is not None:
        teacher = recipe.model_copy(update={"model": recipe.teacher.model})
        network, options = small_network(teacher)
        overrides.append(f"teacher.model={format_toml({'name': network, 'config': options})}")
    if recipe.ema is not None:
        overrides.append("ema.decay=0.9")
    return overrides


def write_small_images(folder: Path) -> None:
    """Write a few of the bundled digits to *folder* as images; an existing folder is not changed."""
    if folder.exists():
        return
    split = open_digits()
    with staging(folder.parent) as partial:
        for part, images in (("train", split.train), ("val", split.held_out)):
            for target, label in enumerate(images.labels):
                (partial / part / label).mkdir(parents=True)
                for index in np.flatnonzero(images.targets == target)[: IMAGES_PER_CLASS[part]].tolist():
                    images[index][0].convert("RGB").save(partial / part / label / f"{index:06}.png")
        partial.chmod(0o755)
        partial.rename(folder)


def small_network(recipe: Recipe) -> tuple[str, dict[str, Any]]:
    """Choose the reduced network of *recipe*; return its name and its non-default options.

    VGG-16, which has no narrow form, is replaced by ResNet-8 with the same pooling.
    """
    name, config = recipe.model.name, dict(recipe.model.config)
    full = make_config(name, config)
    values: dict[str, Any] = {key: getattr(full, key) for key in type(full).model_fields}
    pooling = _small_pooling(values["pooling"]) if "pooling" in values else {"kind": "gap"}
    if isinstance(full, VGGConfig):
        return "resnet8", {"base_width": 8, "pooling": pooling}
    for key, value in values.items():
        if value is not None and key in _REDUCTIONS:
            config[key] = _REDUCTIONS[key](value)
        elif key == "aux_blocks" and isinstance(full, ResNetConfig):
            config[key] = [1, 1, 1, 1]
        elif key == "aux_widths" and not isinstance(full, EfficientNetConfig):
            config[key] = [CHANNELS] * {224: 4, 32: 3}[entry(name).image_size]
    if isinstance(full, AlexNetConfig):
        config["classifier"] = "linear"
    if pooling["kind"] != "gap":
        config["pooling"] = pooling
    return name, config


def _small_pooling(pooling: StrictModel) -> dict[str, Any]:
    """Limit the channels of a covariance."""
    values = pooling.model_dump(mode="json")
    return values | ({"width": min(values["width"], POOLED_CHANNELS)} if "width" in values else {})
