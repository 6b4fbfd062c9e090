"""Short runs whose result must not depend on the number of processes."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from sopdeploy.data.batches import shuffled_batches
from sopdeploy.data.photos.photo import ArrayImages
from sopdeploy.models.gmsop import GMSOPResNet
from sopdeploy.training.distributed import Strategy, select_device
from sopdeploy.training.loop.gradient import train_step
from sopdeploy.training.settings.recipe import Recipe, read_recipe
from tests.sopdeploy.training.runs import start_run

NETWORKS = {
    "dsop": [
        "model.name=dsop-resnet8",
        "model.config={base_width=4, aux_blocks=[0, 1, 1], aux_widths=[4, 6, 6], keep_unused_branches=true}",
    ],
    "gmsop": [
        "model.name=gmsop-16-8-resnet18",
        "model.config={blocks_per_stage=1, components=4, chosen=2, component_widths=[6, 5], "
        "gate_widths=[6, 5], conv5_stride=1, balance_weight=10, dropout=0}",
    ],
}
OPTIMIZERS = {
    "sgd": ["optimizer={lr=0.05, momentum=0.9, weight_decay=5e-4, clip_norm=5.0}"],
    # GM-SOP's stem has a bias before a batch norm. Its gradient is rounding, which eps=1e-8
    # would amplify.
    "adamw": ["optimizer={kind='adamw', lr=1e-3, eps=1e-6}"],
}
SAMPLES, CLASSES, SIDE = 52, 4, 8  # four steps of 13 samples: two processes compute 6 and 7

Case = Callable[[], dict[str, Tensor]]


def build_recipe(network: str, optimizer: str, *overrides: str) -> Recipe:
    """Build a recipe of four steps per epoch, changed by *overrides*."""
    small = [
        f"preprocess.resize={SIDE}",
        f"preprocess.crop={SIDE}",
        "batch_size=14",
        "device=cpu",
    ]
    small += ["schedule={kind='milestones', milestones=[40]}"]
    return read_recipe(
        "digits-plain", [*small, *NETWORKS[network], *OPTIMIZERS[optimizer], *overrides]
    )


def dataset() -> ArrayImages:
    """Create noise images whose brightness depends on the class."""
    random = np.random.default_rng(0)
    targets = np.arange(SAMPLES) % CLASSES
    noise = random.integers(0, 156, (SAMPLES, SIDE, SIDE, 3))
    return ArrayImages(
        tuple("abcd"), (noise + 25 * targets[:, None, None, None]).astype(np.uint8), targets
    )


def several_classes(data: ArrayImages) -> ArrayImages:
    """Give each image of *data* its class and every third image also the next class."""
    targets = np.eye(len(data.labels), dtype=np.float32)[data.targets]
    targets[::3] += np.roll(targets[::3], 1, axis=1)
    return replace(data, targets=targets)


def learn(
    recipe: Recipe, steps: int, dtype: torch.dtype = torch.float64, *, multi_label: bool = False
) -> dict[str, Tensor]:
    """Return all weights and buffers after *steps* steps, in this process and those it is joined with.

    Batch norms use their running statistics, because a process computes those of its own
    images.
    """
    data = several_classes(dataset()) if multi_label else dataset()
    run = start_run(recipe, data, Strategy(select_device(recipe.device)))
    run.model.to(dtype)
    run.normalize.to(dtype)
    if run.teacher is not None:
        run.teacher.model.to(dtype)
    if run.average is not None:
        run.average.model.to(dtype)
    for module in run.trained().modules():
        if isinstance(module, _BatchNorm):
            module.eval()
    if isinstance(
        run.model, GMSOPResNet
    ):  # without noise, which every process draws for its own images
        run.model.gate.get_submodule("noise").register_forward_hook(
            lambda _module, _inputs, noise: 0 * noise
        )
        # make the gate's rows different: rounding decides ties of components
        random = torch.Generator().manual_seed(1)
        for weight in (
            run.model.gate.weight,
            run.model.gate.get_submodule("noise").get_parameter("weight"),
        ):
            weight.data.add_(torch.randn(weight.shape, generator=random).to(weight))
    done = 0
    while done < steps:
        augmented = run.augmentations.training_images(
            dataset(), recipe.preprocess, recipe.seed, run.position.epoch
        )
        samples = run.augmentations.num_copies * len(augmented)
        batches = shuffled_batches(samples, recipe.batch_size, recipe.seed, run.position.epoch)
        for samples in batches[: steps - done]:
            loaded = run.strategy.shard(samples)
            images = torch.from_numpy(augmented.pixels(loaded))
            batch = images, torch.from_numpy(data.targets[np.array(loaded) % SAMPLES])
            run.unread.append(
                train_step(run, batch, num_samples=len(samples), steps=len(batches))
            )
            run.position.step += 1
            run.read_steps()
            done += 1
        run.position = run.position.model_copy(
            update={"epoch": run.position.epoch + 1, "step": 0}
        )
    average = run.average.model.state_dict() if run.average is not None else {}
    return {
        **run.trained().state_dict(),
        **{f"average of {name}": mean for name, mean in average.items()},
    }


SHORT_CASES: dict[str, Case] = {}
for _network in NETWORKS:
    _averaged = build_recipe(_network, "sgd", "ema={}")
    SHORT_CASES |= {
        f"{_network} sgd float32 1 step": partial(
            learn, build_recipe(_network, "sgd"), 1, torch.float32
        ),
        f"{_network} adamw float64 3 steps": partial(learn, build_recipe(_network, "adamw"), 3),
        f"{_network} with an average, float64 3 steps": partial(learn, _averaged, 3),
    }

SHORT_CASES["gmsop several classes per image, float64 3 steps"] = partial(
    learn, build_recipe("gmsop", "sgd", "ema={}"), 3, multi_label=True
)
SHORT_CASES["doubled, colored, float64 3 steps"] = partial(
    learn,
    build_recipe(
        "dsop",
        "sgd",
        "augment={kind='pad-crop', pad=4, doubled=true}",
        "color={lighting=0.1}",
    ),
    3,
)
