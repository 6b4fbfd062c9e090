"""Train recipes over the same seeds; interrupted comparisons can be continued.

The two runs of a pair have the same seed: the same order and augmentation of the same images, and for a
network with and without branches the same random initial weights of the backbone. The weights of the last
epoch are evaluated, because selecting the best epoch on the held-out images would bias the comparison on the
same images.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sopdeploy.checkpoint import build_classifier, read_checkpoint
from sopdeploy.comparison.verdict import Comparison, Results, compare_results
from sopdeploy.data.base import Split
from sopdeploy.data.sources import open_data
from sopdeploy.errors import ConfigError
from sopdeploy.evaluation.prediction import predict_images
from sopdeploy.training.callbacks import Callback
from sopdeploy.training.distributed.strategy import select_device
from sopdeploy.training.loop import train
from sopdeploy.training.procedure import select_split
from sopdeploy.training.recipe import Recipe, read_recipe


def compare(
    sources: Sequence[str],
    destination: Path,
    *,
    seeds: int,
    overrides: Sequence[str] = (),
    callback: Callback | None = None,
    on_run: Callable[[str, int], None] = lambda _name, _seed: None,
) -> Comparison:
    """Train the recipes *sources* with *overrides* over *seeds* seeds and compare them.

    The folder of a run in *destination* is `<recipe>/seed-<n>`; finished runs are reused. *on_run* receives
    the name and seed of each run before it starts. Raises `ConfigError` for recipes that cannot be compared,
    and the errors of `train`.
    """
    recipes = read_recipes(sources, overrides)
    if seeds < 2:
        raise ConfigError(
            "an interval needs at least 2 seeds; 5 is a good number", setting="seeds", value=seeds
        )
    data = open_data(next(iter(recipes.values())).data)
    if data.held_out.targets.ndim == 2:
        raise ConfigError(
            "a comparison counts images with one class each; give --set data.path=DIR without labels.csv"
        )
    for name, recipe in recipes.items():
        if select_split(recipe, data)[1]:
            raise ConfigError(
                f"{name}: its few-shot procedure holds no images out for a comparison; "
                "compare the training loop with --set few_shot.max_images=1"
            )
    correct: dict[str, list[NDArray[np.bool_]]] = {name: [] for name in recipes}
    for seed in range(seeds):
        for name, recipe in recipes.items():
            seeded, folder = recipe.model_copy(update={"seed": seed}), destination / name / f"seed-{seed}"
            on_run(name, seed)
            train(seeded, folder, resume="auto", callback=callback)
            correct[name].append(predict_last_epoch(seeded, folder, data))
    results = [
        Results(name=name, model=recipe.model.name, correct=np.stack(correct[name]))
        for name, recipe in recipes.items()
    ]
    return compare_results(range(seeds), results)


def read_recipes(sources: Sequence[str], overrides: Sequence[str]) -> dict[str, Recipe]:
    """Read two or more recipes, by name; raise `ConfigError` if they cannot be compared."""
    if len(sources) < 2:
        raise ConfigError("a comparison needs at least two recipes; `sopdeploy recipes` lists some")
    recipes: dict[str, Recipe] = {}
    for source in sources:
        name, recipe = Path(source).stem, read_recipe(source, overrides)
        if name in recipes:
            raise ConfigError(f"two recipes have the name {name}; rename one of the files")
        if recipes and recipe.data != next(iter(recipes.values())).data:
            raise ConfigError(
                f"{name} and {next(iter(recipes))} have different data, but results are paired image by "
                "image; give both the same with --set data.path=DIR"
            )
        recipes[name] = recipe
    return recipes


def predict_last_epoch(recipe: Recipe, path: Path, data: Split) -> NDArray[np.bool_]:
    """Return, for each held-out image (N,), whether `last.pt` in *path* classifies it correctly."""
    last = path / "last.pt"
    checkpoint = read_checkpoint(last)
    model = build_classifier(checkpoint, last).to(select_device(recipe.device))
    scores = predict_images(model, checkpoint, data.held_out, workers=recipe.workers)
    return np.asarray([score.correct for score in scores])  # type: ignore[union-attr]
