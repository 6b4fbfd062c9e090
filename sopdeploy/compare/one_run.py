"""One run of a comparison: begun with given weights, gone on with, and asked after its last epoch."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sopdeploy.checkpoint import build_classifier, read_checkpoint
from sopdeploy.data.base import Split
from sopdeploy.errors import DataError
from sopdeploy.evaluate import scores_of
from sopdeploy.recipe import Recipe
from sopdeploy.train import train
from sopdeploy.training.parallel import Alone, choose_device
from sopdeploy.training.progress import Progress
from sopdeploy.training.run import assemble, fresh_model
from sopdeploy.training.run_folder import RunFolder
from sopdeploy.whole import whole

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
    parallel = Alone(choose_device(recipe.device))
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
    scores = scores_of(model, checkpoint.labels, data.held_out, checkpoint.preprocess, workers=recipe.workers)
    right = np.asarray([one.right for one in scores])
    try:
        with whole(kept) as partial, partial.open("wb") as file:
            np.save(file, right, allow_pickle=False)
    except OSError as problem:
        raise DataError(f"{kept}: cannot be written ({problem.strerror})") from problem
    return right
