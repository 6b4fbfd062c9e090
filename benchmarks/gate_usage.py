"""Components that images use in a GM-GAP network, with and without the balance loss (GM-SOP, Figure 2 left).

    python benchmarks/gate_usage.py [--quick] [--json]

Trains GM-GAP with 16 components of which 4 are chosen (as in Figure 2) on 8 x 8 digits with the settings of
the recipe `imagenet64-gmsop-resnet18` and its alpha of 100, with alpha = 0, and with other gates (seed 0).

The training records the first three values in the last epoch, the final network is used for the others:

- `in use`: components that received at least 1 % of the 1438 training images;
- `rarest`: fraction of the training images that the rarest component received (25 % if all are equal);
- `four busiest`: fraction of all selections that went to the four most frequent components;
- `full share`: components with at least 5 % of the gate's weights for the training images, with noise
  (6.25 % if all are equal);
- `held-out`: components that at least 1 % of the 359 held-out images select, without noise.

`--quick` uses one seed and few epochs.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from measure import Result, parse, report

from sopdeploy.checkpoint import build_classifier, read_checkpoint
from sopdeploy.data.batches import load_batches, sequential_batches
from sopdeploy.data.sources import open_data
from sopdeploy.layers.normalize import Normalize, images_format
from sopdeploy.photos.photo import PreprocessedDataset
from sopdeploy.training.checkpoints import read_resumed
from sopdeploy.training.recipe import Recipe, read_recipe
from sopdeploy.training.train import train_recipe

EPOCHS, MILESTONES = 20, [13, 17]  # two and six sevenths of the run, nearly as in section 3.2
DIGITS = [
    "model.name=gmgap-16-8-resnet18",
    "model.config.chosen=4",
    "model.config.component_widths=[64]",
    "model.config.blocks_per_stage=1",
    "model.config.conv5_stride=1",
    'data={kind="digits"}',
    "preprocess.resize=8",
    "preprocess.crop=8",
    "augment.flip=0.0",
    "optimizer.lr=0.075",
    "workers=0",
    "threads=1",
    "device=cpu",
]
FULL = "model.config.component_widths=[512]"  # as in the paper
LITERAL = "model.config.gate_widths=[512]"  # section 2.3: the architecture of a component
CASES = {  # settings, and the number of seeds
    "alpha = 100": ([], 5),
    "alpha = 0": (["model.config.balance_weight=0"], 5),
    "alpha = 100, noise per image": (["model.config.noise_per=image"], 1),
    "alpha = 100, 512 channels": ([FULL], 5),
    "alpha = 100, 512 channels, gate of 512 with batch norm": ([FULL, LITERAL], 5),
    "alpha = 100, 512 channels, literal gate": ([FULL, LITERAL, "model.config.gate_norm=false"], 5),
}
SELECTED = 0.01  # fraction of the images
WEIGHT = 0.05  # fraction of all weights


def digits_recipe(seed: int, epochs: int = EPOCHS, milestones: list[int] = MILESTONES, *more: str) -> Recipe:
    """Build the recipe of one run."""
    times = [f"epochs={epochs}", f"schedule.milestones={milestones}", f"seed={seed}"]
    return read_recipe("imagenet64-gmsop-resnet18", [*DIGITS, *times, *more])


def usage(recipe: Recipe) -> dict[str, tuple[float, str]]:
    """Train *recipe* and measure what the components receive: values with their units, by name."""
    data = open_data(recipe.data)
    with tempfile.TemporaryDirectory() as folder:
        result = train_recipe(recipe, Path(folder) / "run")
        checkpoint = read_checkpoint(result.last)
        position = read_resumed(checkpoint, result.last).position
        component_counts = sorted(position.history[-1].component_counts)
        model: Any = build_classifier(checkpoint, result.last)
    sums = {}
    for name, images in {"held-out": data.held_out, "training": data.train}.items():
        dataset = PreprocessedDataset(images, recipe.preprocess)
        batches = sequential_batches(len(dataset), recipe.batch_size)
        normalize = Normalize(recipe.preprocess, images_format(model))
        sums[name] = torch.zeros(16)
        torch.manual_seed(0)
        for pixels, _ in load_batches(dataset, batches, 0, torch.device("cpu")):
            with torch.no_grad():
                if name == "training":
                    _, weights = model.features_and_noisy_weights(normalize(pixels))
                    sums[name] += weights.sum(dim=0)
                else:
                    features, _ = model.feature_maps(normalize(pixels))
                    sums[name] += (model.gate(features) > 0).sum(dim=0)
    full = int((sums["training"] >= WEIGHT * sums["training"].sum()).sum())
    selected = int((sums["held-out"] >= SELECTED * len(data.held_out)).sum())
    used = sum(count >= SELECTED * len(data.train) for count in component_counts)
    return {
        "in use": (used, "of 16 components"),
        "rarest": (100 * component_counts[0] / len(data.train), "%"),
        "four busiest": (100 * sum(component_counts[-4:]) / sum(component_counts), "%"),
        "full share": (full, "of 16 components"),
        "held-out": (selected, "of 16 components"),
    }


def main() -> None:
    """Measure and print."""
    arguments = parse(__doc__)
    results = []
    for case, (settings, seeds) in CASES.items():
        for seed in range(1 if arguments.quick else seeds):
            epochs = (3, [2]) if arguments.quick else (EPOCHS, MILESTONES)
            usages = usage(digits_recipe(seed, *epochs, *settings))
            results += [
                Result(case=f"{case}, seed {seed}: {name}", ours=value, unit=unit, runs=1)
                for name, (value, unit) in usages.items()
            ]
    report(results, as_json=arguments.json)


if __name__ == "__main__":
    main()
