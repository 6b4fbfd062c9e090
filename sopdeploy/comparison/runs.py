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
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sopdeploy.checkpoint import build_classifier, read_checkpoint
from sopdeploy.comparison.verdict import Comparison, Results, compare_results
from sopdeploy.data.base import Split
from sopdeploy.data.sources import open_data
from sopdeploy.errors import ConfigError, DataError
from sopdeploy.evaluation.prediction import score_images
from sopdeploy.files import atomic_write, writing
from sopdeploy.models.base import is_in
from sopdeploy.training.callbacks import Callback
from sopdeploy.training.distributed.strategy import SingleProcess, select_device
from sopdeploy.training.loop import train
from sopdeploy.training.procedure import select_split
from sopdeploy.training.recipe import Recipe, read_recipe
from sopdeploy.training.run import create_run
from sopdeploy.training.run_folder import RunFolder
from sopdeploy.training.start_weights import InitialModel, create_initial_model

PREDICTIONS = "last-right.npy"
PLAN = "plan.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class NamedRecipe:
    """A recipe of the comparison; `name` is also the name of the folder of its runs."""

    name: str
    recipe: Recipe


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
        raise ConfigError(f"--seeds {seeds}: an interval needs at least 2 seeds; 5 is a good number")
    data = open_data(recipes[0].recipe.data)
    if data.held_out.targets.ndim == 2:
        raise ConfigError(
            "a comparison counts images with one class each; give --set data.path=DIR without labels.csv"
        )
    for named in recipes:
        if select_split(named.recipe, data)[1]:
            raise ConfigError(
                f"{named.name}: its few-shot procedure holds no images out for a comparison; "
                "compare the training loop with --set few_shot.max_images=1"
            )
    _write_plan(destination, {"recipes": [named.name for named in recipes], "seeds": seeds})
    correct: dict[str, list[NDArray[np.bool_]]] = {named.name: [] for named in recipes}
    for seed in range(seeds):
        seeded = [(named.name, named.recipe.model_copy(update={"seed": seed})) for named in recipes]
        first = seeded[0][1]
        strategy = SingleProcess(select_device(first.device))
        weights = random_weights(create_initial_model(first, data.train.labels, strategy))
        for name, recipe in seeded:
            on_run(name, seed)
            folder = destination / name / f"seed-{seed}"
            train_from(weights, recipe, folder, data, callback)
            correct[name].append(predict_last_epoch(recipe, folder, data))
    results = [
        Results(name=named.name, model=named.recipe.model.name, correct=np.stack(correct[named.name]))
        for named in recipes
    ]
    return compare_results(range(seeds), results)


def read_recipes(sources: Sequence[str], overrides: Sequence[str]) -> list[NamedRecipe]:
    """Read two or more recipes; raise `ConfigError` if they cannot be compared."""
    if len(sources) < 2:
        raise ConfigError("a comparison needs at least two recipes; `sopdeploy recipes` lists some")
    recipes = [NamedRecipe(name=Path(name).stem, recipe=read_recipe(name, overrides)) for name in sources]
    names = [named.name for named in recipes]
    duplicate = next((name for name in names if names.count(name) > 1), None)
    if duplicate is not None:
        raise ConfigError(f"two recipes have the name {duplicate}; rename one of the files")
    first = recipes[0]
    for named in recipes[1:]:
        if named.recipe.data != first.recipe.data:
            raise ConfigError(
                f"{named.name} and {first.name} have different data, but results are paired image by image; "
                "give both the same with --set data.path=DIR"
            )
    return recipes


def _write_plan(destination: Path, plan: dict[str, object]) -> None:
    """Write *plan* to *destination*; raise `ConfigError` if another plan is already there."""
    path = destination / PLAN
    try:
        if path.exists():
            if json.loads(path.read_bytes()) != plan:
                raise ConfigError(
                    f"{path}: another comparison was started here; recipes and seeds cannot change after the "
                    "first run, give the same ones or choose another --out"
                )
            return
        destination.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as partial:
            partial.write_text(json.dumps(plan) + "\n", encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be used ({error}); choose another --out") from error


def train_from(
    weights: Mapping[str, Tensor], recipe: Recipe, path: Path, data: Split, callback: Callback | None
) -> None:
    """Train *recipe* in the folder *path*, or continue the run there.

    A new run starts with those tensors of *weights* that match its own in name, shape and dtype, unless start
    weights set its own. This initial state is its first checkpoint, from which it is resumed.
    """
    strategy = SingleProcess(select_device(recipe.device))
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
    """Return, for each held-out image (N,), whether the weights of the last epoch classify it correctly.

    The result is cached in the folder *path* of the run.
    """
    last, cached = path / "last.pt", path / PREDICTIONS
    if cached.exists() and cached.stat().st_mtime >= last.stat().st_mtime:
        correct: NDArray[np.bool_] = np.load(cached, allow_pickle=False).astype(bool)
        if len(correct) == len(data.held_out):
            return correct
    checkpoint = read_checkpoint(last)
    model = build_classifier(checkpoint, last).to(select_device(recipe.device))
    scores = score_images(model, checkpoint, data.held_out, workers=recipe.workers)
    correct = np.asarray([score.correct for score in scores])
    with writing(cached, DataError), atomic_write(cached) as partial, partial.open("wb") as file:
        np.save(file, correct, allow_pickle=False)
    return correct
