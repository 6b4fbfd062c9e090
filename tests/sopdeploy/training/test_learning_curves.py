"""What a run writes beside its checkpoints: its recipe, and curves for TensorBoard."""

import json
from pathlib import Path

import pytest

from sopdeploy import train
from sopdeploy.base.files import LAST
from sopdeploy.training.callback import Callback
from sopdeploy.training.diagnostics import EpochRow
from sopdeploy.training.settings.recipe import Recipe, read_recipe, recipe_file
from sopdeploy.training.settings.recipe_files import list_recipes

DSOP = ("workers=0", "threads=1")


class Stop(Callback):
    """Stops the run, as Ctrl-C does, after the first epoch."""

    def on_epoch_end(self, row: EpochRow) -> None:
        raise KeyboardInterrupt


def curves(folder: Path) -> dict[str, list[int]]:
    """Return the steps of each curve that TensorBoard shows of *folder*."""
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    ).EventAccumulator(str(folder))
    accumulator.Reload()
    return {
        name: [point.step for point in accumulator.Scalars(name)]
        for name in accumulator.Tags()["scalars"]
    }


@pytest.mark.slow
def test_tensorboard_has_the_curves_of_the_network_and_of_each_branch(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(recipe="digits-dsop", out=run, tensorboard=True, set=(*DSOP, "epochs=2"))

    columns = (run / "history.csv").read_text().splitlines()[0].split(",")
    found = curves(run / "tensorboard")
    assert set(found) == set(columns)
    assert "top1" in found
    assert any(name.endswith("_top1") and name != "main_top1" for name in found)
    assert set(map(tuple, found.values())) == {(1, 2)}


@pytest.mark.slow
def test_a_resumed_run_continues_its_curves(tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = (*DSOP, "epochs=2")
    with pytest.raises(KeyboardInterrupt):
        train(recipe="digits-dsop", out=run, tensorboard=True, set=settings, callback=Stop())
    assert (run / LAST).exists()
    train(recipe="digits-dsop", out=run, tensorboard=True, set=settings, resume="always")

    assert curves(run / "tensorboard")["top1"] == [1, 2]


@pytest.mark.parametrize("name", list_recipes())
def test_the_file_of_a_recipe_is_read_back_as_the_same_recipe(
    name: str, tmp_path: Path
) -> None:
    recipe = read_recipe(name)
    path = tmp_path / "recipe.toml"
    path.write_text(recipe_file(json.loads(recipe.model_dump_json())), encoding="utf-8")
    assert read_recipe(path) == recipe


@pytest.mark.slow
def test_a_run_is_repeated_by_the_recipe_in_its_folder(tmp_path: Path) -> None:
    first = train(recipe="digits-plain", out=tmp_path / "first", set=(*DSOP, "epochs=1"))
    again = train(recipe=tmp_path / "first" / "recipe.toml", out=tmp_path / "again")

    assert isinstance(read_recipe(tmp_path / "again" / "recipe.toml"), Recipe)
    assert (again.best_top1, again.model) == (first.best_top1, first.model)
