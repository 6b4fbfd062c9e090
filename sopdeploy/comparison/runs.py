"""Recipes over the same seeds, run by run; a comparison that was stopped goes on where it was.

A pair of runs has the same seed: the same order of the same pictures with the same augmentation, and the same
start weights wherever two networks have a tensor of one name and shape, the backbone that is. Seeds are 0, 1
and so on, and their number is written down before the first run: to add some after a look at the result
would make every interval wrong. The last epoch counts, never the best one on the pictures that judge.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sopdeploy.checkpoint import build_classifier, read_checkpoint
from sopdeploy.comparison.verdict import Comparison, Results, judge
from sopdeploy.data.base import Split
from sopdeploy.data.sources import open_data
from sopdeploy.errors import ConfigError, DataError
from sopdeploy.evaluation.prediction import score_images
from sopdeploy.files import atomic_write
from sopdeploy.training.callbacks import Progress
from sopdeploy.training.distributed.strategy import SingleProcess, choose_device
from sopdeploy.training.loop import train
from sopdeploy.training.recipe import Recipe, read_recipe
from sopdeploy.training.run import assemble, fresh_model
from sopdeploy.training.run_folder import RunFolder

ANSWERS = "last-right.npy"


def start_weights(recipe: Recipe, data: Split) -> dict[str, Tensor]:
    """Return the weights that *recipe* begins with by itself."""
    return fresh_model(recipe, len(data.train.labels)).state_dict()


def train_from(
    donor: Mapping[str, Tensor], recipe: Recipe, path: Path, data: Split, progress: Progress | None
) -> None:
    """Run *recipe* to its end in the folder *path*, or what is left of it.

    A new run begins with *donor*'s tensors wherever it has one of the same name and shape, and with its own
    elsewhere: that state is its first checkpoint, from which it goes on like any other run.
    """
    parallel = SingleProcess(choose_device(recipe.device))
    folder = RunFolder(path, parallel)
    if not folder.holds_run():
        folder.must_be_free()
        model = fresh_model(recipe, len(data.train.labels))
        own = model.state_dict()
        given = {name: donor[name] for name, value in own.items() if fits(donor.get(name), value)}
        model.load_state_dict({**own, **given})
        folder.save_last(assemble(recipe, data.train, model, recipe.model.full_config(), parallel))
    train(recipe, path, resume=True, progress=progress)


def fits(given: Tensor | None, own: Tensor) -> bool:
    """Say whether *given* can stand where *own* does."""
    return given is not None and given.shape == own.shape and given.dtype == own.dtype


def last_answers(recipe: Recipe, path: Path, data: Split) -> NDArray[np.bool_]:
    """Return which held-out pictures (N,) the network of the last epoch gets right; the file is kept."""
    last, kept = path / "last.pt", path / ANSWERS
    if kept.exists() and kept.stat().st_mtime >= last.stat().st_mtime:
        right: NDArray[np.bool_] = np.load(kept, allow_pickle=False).astype(bool)
        if len(right) == len(data.held_out):
            return right
    checkpoint = read_checkpoint(last)
    model = build_classifier(checkpoint, last).to(choose_device(recipe.device))
    scores = score_images(
        model, checkpoint.labels, data.held_out, checkpoint.preprocess, workers=recipe.workers
    )
    right = np.asarray([one.correct for one in scores])
    try:
        with atomic_write(kept) as partial, partial.open("wb") as file:
            np.save(file, right, allow_pickle=False)
    except OSError as problem:
        raise DataError(f"{kept}: cannot be written ({problem.strerror})") from problem
    return right


PLAN = "plan.json"
FEWEST = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Contender:
    """A recipe that takes part, and its name, which is that of its folder."""

    name: str
    recipe: Recipe

    def at(self, seed: int) -> Recipe:
        """Return the recipe with *seed*."""
        return self.recipe.model_copy(update={"seed": seed})


def compare(
    sources: Sequence[str],
    destination: Path,
    *,
    seeds: int,
    overrides: Sequence[str] = (),
    progress: Progress | None = None,
    on_run: Callable[[str, int], None] = lambda _name, _seed: None,
) -> Comparison:
    """Run the recipes *sources*, with *overrides* laid over each, over *seeds* seeds; return what they say.

    Runs lie in *destination* as `<recipe>/seed-0`; what is finished there is not run again. *on_run* is told
    which run begins. Raises `ConfigError` for recipes that cannot be paired, and what `train` raises.
    """
    contenders = read_contenders(sources, overrides)
    if seeds < FEWEST:
        raise ConfigError(f"--seeds {seeds}: an interval needs {FEWEST} seeds at least; 5 is a good number")
    data = open_data(contenders[0].recipe.data)
    keep_plan(destination, contenders, seeds)
    right: dict[str, list[np.ndarray]] = {one.name: [] for one in contenders}
    for seed in range(seeds):
        donor = start_weights(contenders[0].at(seed), data)
        for one in contenders:
            on_run(one.name, seed)
            folder = destination / one.name / f"seed-{seed}"
            recipe = one.at(seed)
            train_from(donor, recipe, folder, data, progress)
            right[one.name].append(last_answers(recipe, folder, data))
    results = [
        Results(name=one.name, model=one.recipe.model.name, right=np.stack(right[one.name]))
        for one in contenders
    ]
    return judge(range(seeds), results)


def read_contenders(sources: Sequence[str], overrides: Sequence[str]) -> list[Contender]:
    """Return the recipes to compare; raises `ConfigError` where there are too few or they do not pair."""
    if len(sources) < FEWEST:
        raise ConfigError("a comparison needs two recipes at least; `sopdeploy recipes` lists some")
    found = [Contender(name=Path(source).stem, recipe=read_recipe(source, overrides)) for source in sources]
    names = [one.name for one in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"two recipes are called {twice}; rename one of the files")
    first = found[0]
    for one in found[1:]:
        if one.recipe.data != first.recipe.data:
            raise ConfigError(
                f"{one.name} and {first.name} have other data; answers are paired picture by picture, "
                "give both the same with --set data.path=DIR"
            )
    return found


def keep_plan(destination: Path, contenders: Sequence[Contender], seeds: int) -> None:
    """Write down what is compared before anything runs; raises `ConfigError` for another plan there."""
    plan = {"recipes": [one.name for one in contenders], "seeds": seeds}
    path = destination / PLAN
    try:
        if path.exists():
            if json.loads(path.read_bytes()) != plan:
                raise ConfigError(
                    f"{path}: another comparison began here; recipes and seeds are fixed before the "
                    "first run, give the same ones or choose another --out"
                )
            return
        destination.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as partial:
            partial.write_text(json.dumps(plan) + "\n", encoding="utf-8")
    except (OSError, ValueError) as problem:
        raise ConfigError(f"{path}: cannot be used ({problem}); choose another --out") from problem
