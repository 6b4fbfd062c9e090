"""Train recipes over the same seeds and compare them (`sopdeploy compare-recipes`).

The two runs of a pair have the same seed: the same order and augmentation of the same images, and for a
network with and without branches the same random initial weights of the backbone. The weights of the last
epoch are evaluated, because selecting the best epoch on the held-out images would bias the comparison on the
same images.

Letters: S seeds, N held-out images.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
from numpy.typing import NDArray

from sopdeploy.checkpoint import build_classifier, read_checkpoint
from sopdeploy.config import StrictModel
from sopdeploy.data.base import Split
from sopdeploy.data.sources import open_data
from sopdeploy.errors import ConfigError
from sopdeploy.evaluation.prediction import predict_images
from sopdeploy.evaluation.statistics import student
from sopdeploy.training.callbacks import Callback
from sopdeploy.training.distributed.strategy import select_device
from sopdeploy.training.procedure import select_procedure
from sopdeploy.training.recipe import Recipe, read_recipe
from sopdeploy.training.train import train_recipe

NO_EFFECT = "no effect detected"


class Arm(StrictModel):
    """The top-1 accuracies of a recipe by seed, and their mean and sample standard deviation."""

    name: str
    model: str
    top1: tuple[float, ...]
    mean: float
    sd: float


class Pair(StrictModel):
    """Top-1 of `second` minus top-1 of `first`, paired by seed, as fractions.

    `low` and `high` are Student's 95 % interval over seeds, which decides the verdict. `wins`, `ties` and
    `losses` count seeds.
    """

    first: str
    second: str
    differences: tuple[float, ...]
    mean: float
    sd: float
    low: float
    high: float
    wins: int
    ties: int
    losses: int
    verdict: str


class RecipeComparison(StrictModel):
    """The comparison of all other recipes with the first one; `num_images` counts the held-out images."""

    seeds: tuple[int, ...]
    num_images: int
    arms: tuple[Arm, ...]
    pairs: tuple[Pair, ...]


def compare_recipes(
    sources: Sequence[str],
    destination: Path,
    *,
    seeds: int,
    overrides: Sequence[str] = (),
    callback: Callback | None = None,
    on_run: Callable[[str, int], None] = lambda _name, _seed: None,
) -> RecipeComparison:
    """Train the recipes *sources* with *overrides* over *seeds* seeds and compare them.

    The folder of a run in *destination* is `<recipe>/seed-<n>`; finished runs are reused and interrupted ones
    continued. *on_run* receives the name and seed of each run before it starts. Raises `ConfigError` for
    recipes that cannot be compared, and the errors of `train`.
    """
    recipes = _read_recipes(sources, overrides)
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
        if select_procedure(recipe, data).recipe.procedure.kind != "loop":
            raise ConfigError(
                f"{name}: a comparison needs held-out images; compare the training loop with "
                "--set procedure.kind=loop"
            )
    correct: dict[str, list[NDArray[np.bool_]]] = {name: [] for name in recipes}
    for seed in range(seeds):
        for name, recipe in recipes.items():
            seeded, folder = recipe.model_copy(update={"seed": seed}), destination / name / f"seed-{seed}"
            on_run(name, seed)
            last = train_recipe(seeded, folder, resume="auto", callback=callback).last
            correct[name].append(_predict_correctly(last, seeded, data))
    networks = {name: recipe.model.name for name, recipe in recipes.items()}
    return compare_results(networks, {name: np.stack(rows) for name, rows in correct.items()})


def _read_recipes(sources: Sequence[str], overrides: Sequence[str]) -> dict[str, Recipe]:
    """Read two or more recipes, by name; raise `ConfigError` if they cannot be compared."""
    if len(sources) < 2:
        raise ConfigError("a comparison needs at least two recipes; `sopdeploy recipes` lists some")
    recipes: dict[str, Recipe] = {}
    for source in sources:
        if (Path(source) / "best.pt").is_file():
            raise ConfigError(
                f"{source}: a run, not a recipe; `sopdeploy runs` lists the estimates of all runs, and "
                f"`sopdeploy eval {source}/best.pt --data DIR` measures one on images of your choice"
            )
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


def _predict_correctly(last: Path, recipe: Recipe, data: Split) -> NDArray[np.bool_]:
    """Return, for each held-out image (N,), whether the checkpoint *last* classifies it correctly."""
    checkpoint = read_checkpoint(last)
    model = build_classifier(checkpoint, last).to(select_device(recipe.device))
    scores = predict_images(model, checkpoint, data.held_out, workers=recipe.workers)
    return np.asarray([score.correct for score in scores])  # type: ignore[union-attr]


def compare_results(
    networks: Mapping[str, str], correct: Mapping[str, NDArray[np.bool_]]
) -> RecipeComparison:
    """Compare at least two recipes by their correct predictions (S, N); *networks* names their networks."""
    arms = []
    for name, correct_SN in correct.items():
        top1 = correct_SN.mean(axis=1).tolist()
        arms.append(Arm(name=name, model=networks[name], top1=top1, mean=fmean(top1), sd=stdev(top1)))
    first, *others = correct
    num_seeds, num_images = correct[first].shape
    return RecipeComparison(
        seeds=tuple(range(num_seeds)),
        num_images=num_images,
        arms=tuple(arms),
        pairs=tuple(_compare_pair(first, second, correct) for second in others),
    )


def _compare_pair(first: str, second: str, correct: Mapping[str, NDArray[np.bool_]]) -> Pair:
    gain_SN = correct[second].astype(np.int8) - correct[first].astype(np.int8)
    differences = gain_SN.mean(axis=1).tolist()
    mean, (low, high) = fmean(differences), student(differences)
    verdict = NO_EFFECT
    if low > 0 or high < 0:
        verdict = (
            f"{second} is {'better' if mean > 0 else 'worse'} than {first} by "
            f"{100 * abs(mean):.2f} points ({100 * low:+.2f} to {100 * high:+.2f})"
        )
    return Pair(
        first=first,
        second=second,
        differences=differences,
        mean=mean,
        sd=stdev(differences),
        low=low,
        high=high,
        wins=sum(value > 0 for value in differences),
        ties=sum(value == 0 for value in differences),
        losses=sum(value < 0 for value in differences),
        verdict=verdict,
    )
