"""Every packaged recipe with its data source: train, stop, resume and evaluate a small network."""

import csv
from pathlib import Path
from typing import Any

import pytest

from sopdeploy.evaluation.checkpoint_scores import score_checkpoint
from sopdeploy.models.registry import make_config
from sopdeploy.models.second_order_head import tuned_name
from sopdeploy.training.settings.recipe import read_recipe
from sopdeploy.training.settings.recipe_files import list_recipes
from sopdeploy.training.train import train_recipe
from sopdeploy.weights.checkpoint import read_checkpoint
from tests.sopdeploy.training.runs import interrupt
from tests.sopdeploy.training.small_recipes import SMALL, few_blocks
from tests.support.slow import mostly_slow
from tests.support.small_data import write_cifar, write_classes, write_photos, write_places


def write_data(name: str, root: Path, monkeypatch: Any) -> list[str]:
    """Write data for a recipe; return the settings that select it."""
    kind = read_recipe(name).data.kind
    if kind == "digits":
        return ["batch_size=104"]  # two steps of `few_digits`
    if kind.startswith("cifar"):
        write_cifar(root, kind, monkeypatch)
    elif kind == "places365":
        write_places(root, monkeypatch)
    elif read_recipe(name).procedure.kind == "fine_tune":  # enough to compare two networks
        write_classes(root / "train", ("cat", "dog"), 4)
        write_classes(root / "val", ("cat", "dog"), 4, seed=500)
    else:
        write_photos(root)
    return [f"data.path={root}"]


# One recipe of each family and procedure; `make test-all` trains all.
QUICK = (
    *(name for name in list_recipes() if name.startswith(("digits-", "photos"))),
    *("fine-tune-dsop", "imagenet-dsop-resnet50", "imagenet-gsop-resnet50"),
    "imagenet64-gmsop-resnet18",
)
# Recipes that start from another one.
BEFORE = {
    "fine-grained-isqrt-resnet50": "imagenet-isqrt-resnet50",
    "fine-grained-two-phase": "imagenet-isqrt-resnet50",
    "imagenet-dsop-two-phase": "imagenet-resnet50",
}


@pytest.mark.usefixtures("few_digits", "allow_random_features")
@pytest.mark.parametrize("name", mostly_slow(list_recipes(), *QUICK))
def test_a_recipe_trains_resumes_and_is_evaluated(name, tmp_path, monkeypatch) -> None:
    few_blocks(monkeypatch)
    short = [*write_data(name, tmp_path / "data", monkeypatch), "epochs=1", "workers=0"]
    if read_recipe(name).data.kind != "digits":
        short.append("batch_size=4")
    if name in BEFORE:
        before = read_recipe(BEFORE[name], [*SMALL[BEFORE[name]], *short, "batch_size=8"])
        short.append(f"start.weights={train_recipe(before, tmp_path / 'before').best}")
    if read_recipe(name).first_phase:
        short.append("epochs=2")
    recipe, out = read_recipe(name, [*SMALL[name], *short]), tmp_path / "run"
    interrupt(recipe, out, "step", 0, 0)

    assert read_checkpoint(out / "last.pt").resume["position"]["step"] == 1

    result = train_recipe(recipe, out, resume=True)
    stored = read_checkpoint(result.best)
    assert result.num_epochs == recipe.epochs
    assert stored.training["recipe"]["summary"] == recipe.summary

    config = make_config(recipe.model.name, recipe.model.config).model_dump(mode="json")
    if recipe.procedure.kind == "fine_tune":
        last = read_checkpoint(result.last)
        assert last.model == tuned_name(recipe.model.name)
        assert {key: last.config[key] for key in config.keys() - {"head", "branch"}} == {
            key: value for key, value in config.items() if key not in ("head", "branch")
        }
    else:
        assert (stored.model, stored.config) == (recipe.model.name, config)

    scores = score_checkpoint(
        result.best, write_classes(tmp_path / "evaluation", stored.labels, 1)
    ).predictions
    assert len(scores) == len(stored.labels)


@pytest.mark.nightly
@pytest.mark.parametrize("family", ["isqrt", "gsop", "gmsop"])
def test_a_small_recipe_of_each_family_learns_a_few_images(
    family, tmp_path, monkeypatch
) -> None:
    write_cifar(tmp_path / "data", "cifar10", monkeypatch)
    settings = [f"data.path={tmp_path / 'data'}", "epochs=6", "batch_size=10", "workers=0"]
    settings += [
        "optimizer.lr=0.01",
        "augment={kind='center', flip=0.0}",
        "schedule={kind='milestones'}",
    ]
    result = train_recipe(read_recipe(f"cifar10-{family}-resnet20", settings), tmp_path / "run")
    with result.history.open(encoding="utf-8") as file:
        losses = [float(row["train_main"]) for row in csv.DictReader(file)]

    assert len(losses) == 6
    assert losses[-1] < 0.8 * losses[0]
