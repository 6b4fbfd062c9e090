"""Components that images use in a GM-GAP network, with and without the balance loss (GM-SOP, Figure 2 left).

    python benchmarks/gate_usage.py [--quick] [--json]

Trains GM-GAP with 16 components of which 4 are chosen (as in Figure 2) on 8 x 8 digits with the settings of
the recipe `imagenet64-gmsop-resnet18` and its alpha of 100, with alpha = 0, and with other gates (seed 0). A
component is in use if at least 1 % of the 359 held-out images select it. `rarest` is the part of the training
images, with noise, that select the rarest component (25 % if all are equal), `four busiest` the part of all
their selections that four components receive. `--quick` uses one seed and few epochs.
"""

import tempfile
from pathlib import Path

import torch
from measure import Result, parse, report

from sopdeploy.checkpoint import build_classifier, read_checkpoint
from sopdeploy.data.base import PreprocessedDataset
from sopdeploy.data.batches import load_batches, sequential_batches
from sopdeploy.data.sources import open_data
from sopdeploy.layers.normalize import Normalize
from sopdeploy.training.loop import train
from sopdeploy.training.recipe import Recipe, read_recipe

EPOCHS, MILESTONES = 20, [13, 17]  # two and six sevenths of the run, nearly as in section 3.2
DIGITS = [
    "model.name=gmgap-16-8-resnet18",
    "model.config.chosen=4",
    "model.config.component_widths=[64]",
    "model.config.blocks_per_stage=1",
    "model.config.conv5_stride=1",
    "model.config.evaluation=dense",  # the same numbers, faster for small images
    'data={kind="digits"}',
    "preprocess.resize=8",
    "preprocess.crop=8",
    "augment.flip=0.0",
    "optimizer.lr=0.075",
    "workers=0",
    "threads=1",
    "device=cpu",
]
FULL = "model.config.component_widths=[512]"
CASES = {  # settings, and the number of seeds
    "alpha = 100": ([], 5),
    "alpha = 0": (["model.config.balance_weight=0"], 5),
    "alpha = 100, noise per image": (["model.config.noise_per=image"], 1),
    "alpha = 100, 512 channels": ([FULL], 5),
    "alpha = 100, 512 channels, gate without batch norm": ([FULL, "model.config.gate_norm=false"], 1),
}
SHARE = 0.01  # of the held-out images


def digits_recipe(seed: int, epochs: int = EPOCHS, milestones: list[int] = MILESTONES, *more: str) -> Recipe:
    """Build the recipe of one run."""
    times = [f"epochs={epochs}", f"schedule.milestones={milestones}", f"seed={seed}"]
    return read_recipe("imagenet64-gmsop-resnet18", [*DIGITS, *times, *more])


def usage(recipe: Recipe) -> tuple[int, float, float]:
    """Train *recipe*; count the components in use; the parts of the rarest and the busiest in percent."""
    data = open_data(recipe.data)
    with tempfile.TemporaryDirectory() as folder:
        result = train(recipe, Path(folder) / "run")
        model = build_classifier(read_checkpoint(result.last), result.last)
    counts = {}
    for name, images in {"held-out": data.held_out, "training": data.train}.items():
        dataset = PreprocessedDataset(images, recipe.preprocess)
        batches = sequential_batches(len(dataset), recipe.batch_size)
        normalize, counts[name] = Normalize(recipe.preprocess), torch.zeros(16)
        torch.manual_seed(0)
        for pixels, _ in load_batches(dataset, batches, 0, torch.device("cpu")):
            with torch.no_grad():
                features, _ = model.features(normalize(pixels))
                noisy = name == "training"
                weights_BN = model.noisy_gate(normalize(pixels))[1] if noisy else model.gate(features)
            counts[name] += (weights_BN > 0).sum(dim=0)
    counted = counts["training"].sort(descending=True).values
    rarest, busiest = counted[-1] / len(data.train), counted[:4].sum() / counted.sum()
    used = counts["held-out"] >= SHARE * len(data.held_out)
    return int(used.sum()), 100 * float(rarest), 100 * float(busiest)


def main() -> None:
    """Measure and print."""
    arguments = parse(__doc__)
    results = []
    for case, (settings, seeds) in CASES.items():
        for seed in range(1 if arguments.quick else seeds):
            epochs = (3, [2]) if arguments.quick else (EPOCHS, MILESTONES)
            used, rarest, busiest = usage(digits_recipe(seed, *epochs, *settings))
            results += [
                Result(case=f"{case}, seed {seed}: in use", ours=used, unit="of 16 components", runs=1),
                Result(case=f"{case}, seed {seed}: rarest", ours=rarest, unit="%", runs=1),
                Result(case=f"{case}, seed {seed}: four busiest", ours=busiest, unit="%", runs=1),
            ]
    report(results, as_json=arguments.json)


if __name__ == "__main__":
    main()
