"""Every packaged recipe through its real loader: two steps, a stop, a resume, an evaluation, an export.

The networks are small ones of the same family; the settings are those of the recipe wherever they fit. Nine
tenths of a walk are its export, so a network that several recipes end in is exported for one of them.
"""

from pathlib import Path
from typing import Any

import pytest

from sopdeploy.bundle.folder import open_bundle
from sopdeploy.bundle.manifest import BatchRange
from sopdeploy.checkpoint import read_checkpoint
from sopdeploy.evaluation.prediction import score_checkpoint
from sopdeploy.models.registry import create_model
from sopdeploy.training.loop import train
from sopdeploy.training.recipe import Recipe, list_recipes, read_recipe
from sopdeploy.training.signals import TrainingStoppedError
from sopdeploy_export.pipeline import ExportOptions, export
from tests.sopdeploy.data.small_data import (
    tar_of,
    write_cifar,
    write_classes,
    write_photos,
    write_places,
    write_small_imagenet,
)
from tests.sopdeploy.training.runs import RecordingCallback
from tests.sopdeploy.training.small_recipes import EXPORTED_AS, SMALL, few_blocks

ALONE = BatchRange(optimum=1, maximum=1)  # one graph of each network instead of two, without symbols


def test_every_recipe_is_walked() -> None:
    assert set(SMALL) == set(list_recipes())


@pytest.mark.parametrize("name", EXPORTED_AS)
def test_a_recipe_that_is_not_exported_has_the_network_of_one_that_is(name: str) -> None:
    other = EXPORTED_AS[name]
    assert other not in EXPORTED_AS
    assert small_recipe(name).model == small_recipe(other).model


def small_recipe(name: str, *settings: str) -> Recipe:
    size = [] if read_recipe(name).data.kind == "digits" else ["batch_size=4"]
    return read_recipe(name, ["epochs=1", "workers=0", *size, *SMALL[name], *settings])


@pytest.fixture(autouse=True)
def _few_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    few_blocks(monkeypatch)


def data_of(name: str, kind: str, root: Path, monkeypatch: Any) -> list[str]:
    """Write data for a recipe; return the settings that point to it."""
    if kind == "digits":
        return []
    if kind.startswith("cifar"):
        write_cifar(root, kind, monkeypatch)
        return [f"data.path={root}"]
    if kind == "imagenet64":
        return [f"data.path={write_small_imagenet(root)}"]
    if kind == "places365":
        return [f"data.path={write_places(root)}"]
    photos = write_photos(root)
    return [f"data.path={tar_of(photos, root / 'all.tar') if 'gsop' in name else photos}"]


def trained_before(recipe: str, overrides: list[str], root: Path) -> list[str]:
    """Return the settings that name weights of an earlier run, where the recipe needs such."""
    needs = {"imagenet-dsop-two-phase": "start", "imagenet-distilled-resnet50": "teacher"}
    if recipe == "fine-grained-isqrt-resnet50":
        before, model, key = "imagenet-isqrt-resnet50", SMALL["imagenet-isqrt-resnet50"], "start"
    elif recipe in needs:
        before, model, key = "imagenet-resnet50", SMALL["imagenet-resnet50"], needs[recipe]
    else:
        return []
    data = [setting for setting in overrides if setting.startswith("data.")]
    run = train(
        read_recipe(before, [*model, *data, "epochs=1", "batch_size=8", "workers=0"]), root / "before"
    )
    return [f"{key}.weights={run.best}"]


def walk(name: str, root: Path, monkeypatch: Any) -> Path:
    """Train a recipe's small network: a step, a stop, a resume, an evaluation; return its best checkpoint."""
    settings = data_of(name, read_recipe(name).data.kind, root / "data", monkeypatch)
    recipe = small_recipe(name, *settings, *trained_before(name, settings, root))
    out = root / "run"
    with pytest.raises(TrainingStoppedError):
        train(recipe, out, callback=RecordingCallback(stop_at=("step", 0, 0)))
    assert read_checkpoint(out / "last.pt").resume["position"]["step"] == 1
    result = train(recipe, out, resume=True)
    stored = read_checkpoint(result.best)
    assert result.epochs == 1
    assert stored.training["recipe"]["summary"] == recipe.summary
    assert (stored.model, stored.config) == (recipe.model.name, recipe.model.full_config())
    _, scores = score_checkpoint(
        result.best, write_classes(root / "evaluation", stored.labels, 1), on_image=lambda _done, _all: None
    )
    assert len(scores) == len(stored.labels)
    return result.best


@pytest.mark.parametrize("name", sorted(SMALL))
def test_a_recipe_walks_from_its_data_to_a_bundle(name, tmp_path, monkeypatch) -> None:
    best = walk(name, tmp_path, monkeypatch)
    if name in EXPORTED_AS:
        return
    stored = read_checkpoint(best)
    network = create_model(stored.model, num_classes=len(stored.labels), **stored.config)
    options = ExportOptions(detach=bool(network.training_only), batch=ALONE)
    exported = export(best, tmp_path / "bundles", options)
    assert exported.parity.passed
    assert open_bundle(exported.path).labels == stored.labels
