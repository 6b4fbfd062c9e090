"""Train recipes over the same seeds; interrupted comparisons can be continued.

The two runs of a pair have the same seed: the same order and augmentation of the same images, and the same
random initial weights for every tensor that both networks have (usually the backbone). Start weights, such
as those of ImageNet, are not shared: they belong to their recipe. The number of seeds is recorded before the
first run, because adding seeds after a look at the results would invalidate the intervals. The weights of the
last epoch are evaluated, because selecting the best epoch on the held-out images would bias the comparison on
the same images.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sopdeploy.checkpoint import build_classifier, read_checkpoint
from sopdeploy.comparison.verdict import Comparison, Results, compare_results
from sopdeploy.data.base import Split
from sopdeploy.data.sources import open_data
from sopdeploy.errors import ConfigError
from sopdeploy.evaluation.prediction import predict_images
from sopdeploy.files import atomic_write
from sopdeploy.models.base import is_in
from sopdeploy.training.callbacks import Callback
from sopdeploy.training.distributed.strategy import Strategy, select_device
from sopdeploy.training.loop import train
from sopdeploy.training.procedure import select_split
from sopdeploy.training.recipe import Recipe, read_recipe
from sopdeploy.training.run import create_run
from sopdeploy.training.run_folder import RunFolder
from sopdeploy.training.start_weights import InitialModel, create_initial_model

PLAN = "plan.json"


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
    _write_plan(destination, {"recipes": list(recipes), "seeds": seeds})
    correct: dict[str, list[NDArray[np.bool_]]] = {name: [] for name in recipes}
    for seed in range(seeds):
        weights: dict[str, Tensor] | None = None
        for name, recipe in recipes.items():
            seeded = recipe.model_copy(update={"seed": seed})
            if weights is None:  # those of the first recipe
                strategy = Strategy(select_device(seeded.device))
                weights = random_weights(create_initial_model(seeded, data.train.labels, strategy))
            on_run(name, seed)
            folder = destination / name / f"seed-{seed}"
            train_from(weights, seeded, folder, data, callback)
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


def _write_plan(destination: Path, plan: dict[str, object]) -> None:
    """Write *plan* to *destination*; raise `ConfigError` if another plan is already there."""
    path = destination / PLAN
    try:
        if path.exists():
            if json.loads(path.read_bytes()) != plan:
                raise ConfigError(
                    f"{path}: another comparison was started here; recipes and seeds cannot change after the "
                    "first run, give the same ones or choose another folder",
                    setting="out",
                )
            return
        destination.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as partial:
            partial.write_text(json.dumps(plan) + "\n", encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path}: cannot be used ({error}); choose another folder", setting="out"
        ) from error


def train_from(
    weights: Mapping[str, Tensor], recipe: Recipe, path: Path, data: Split, callback: Callback | None
) -> None:
    """Train *recipe* in the folder *path*, or continue the run there.

    A new run starts with those tensors of *weights* that match its own in name, shape and dtype, unless start
    weights set its own. This initial state is its first checkpoint, from which it is resumed.
    """
    strategy = Strategy(select_device(recipe.device))
    folder = RunFolder(path, strategy)
    if not folder.holds_run():
        folder.check_free()
        initial = create_initial_model(recipe, data.train.labels, strategy)
        matching = {
            name: weights[name]
            for name, own in random_weights(initial).items()
            if name in weights and (weights[name].shape, weights[name].dtype) == (own.shape, own.dtype)
        }
        initial.model.load_state_dict(matching, strict=False)
        folder.save_last(create_run(recipe, data.train, strategy, initial=initial))
    train(recipe, path, resume=True, callback=callback)


def random_weights(initial: InitialModel) -> dict[str, Tensor]:
    """Return the tensors of the parts of *initial* that its start weights do not set."""
    tensors: dict[str, Tensor] = initial.model.state_dict()
    if initial.start is None:
        return tensors
    return {name: tensor for name, tensor in tensors.items() if is_in(name, *initial.start.new)}


def predict_last_epoch(recipe: Recipe, path: Path, data: Split) -> NDArray[np.bool_]:
    """Return, for each held-out image (N,), whether `last.pt` in *path* classifies it correctly."""
    last = path / "last.pt"
    checkpoint = read_checkpoint(last)
    model = build_classifier(checkpoint, last).to(select_device(recipe.device))
    scores = predict_images(model, checkpoint, data.held_out, workers=recipe.workers)
    return np.asarray([score.correct for score in scores])  # type: ignore[union-attr]
