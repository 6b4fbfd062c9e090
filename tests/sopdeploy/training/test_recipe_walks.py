"""Every packaged recipe with its data source: train, stop, resume, evaluate and export a small network.

The export takes most of the time, so recipes with the same small network are exported once. The default run
exports the networks that no other of its tests exports; `tests/export` exports DSoP and iSQRT-COV.
"""

from pathlib import Path
from typing import Any

import onnx
import pytest

from sopdeploy.bundle.folder import open_bundle
from sopdeploy.bundle.manifest import BatchRange
from sopdeploy.checkpoint import read_checkpoint
from sopdeploy.evaluation.prediction import score_checkpoint
from sopdeploy.models.registry import create_model
from sopdeploy.training.loop import train
from sopdeploy.training.recipe import Recipe, list_recipes, read_recipe
from sopdeploy_export.options import ExportOptions
from sopdeploy_export.pipeline import export
from tests.gpu_graphs import accepted
from tests.sopdeploy.data.small_data import (
    tar_of,
    write_cifar,
    write_classes,
    write_photos,
    write_places,
)
from tests.sopdeploy.training.runs import interrupt
from tests.sopdeploy.training.small_recipes import EXPORTED_AS, SMALL, few_blocks

BATCH_OF_ONE = BatchRange(optimum=1, maximum=1)  # exports one graph instead of two


def test_every_recipe_is_covered_and_exported_itself_or_as_another() -> None:
    assert set(SMALL) == set(list_recipes())
    for name, other in EXPORTED_AS.items():
        assert other not in EXPORTED_AS
        assert small_recipe(name).model == small_recipe(other).model


def small_recipe(name: str, *settings: str) -> Recipe:
    size = [] if read_recipe(name).data.kind == "digits" else ["batch_size=4"]
    return read_recipe(name, ["epochs=1", "workers=0", *size, *SMALL[name], *settings])


def write_data(name: str, root: Path, monkeypatch: Any) -> list[str]:
    """Write data for a recipe; return the settings that select it."""
    kind = read_recipe(name).data.kind
    if kind == "digits":
        return ["batch_size=104"]  # two steps of `few_digits`
    path = root
    if kind.startswith("cifar"):
        write_cifar(root, kind, monkeypatch)
    elif kind == "places365":
        write_places(root, monkeypatch)
    else:
        path = tar_of(write_photos(root), root / "all.tar") if "gsop" in name else write_photos(root)
    return [f"data.path={path}"]


# Recipes that start from another one.
BEFORE = {
    "fine-grained-isqrt-resnet50": ("imagenet-isqrt-resnet50", "start"),
    "imagenet-dsop-two-phase": ("imagenet-resnet50", "start"),
}


def train_and_evaluate(name: str, root: Path, monkeypatch: Any) -> Path:
    """Train the small network of a recipe with an interruption; evaluate and return its checkpoint."""
    settings = write_data(name, root / "data", monkeypatch)
    if name in BEFORE:
        before, key = BEFORE[name]
        first = read_recipe(before, [*SMALL[before], *settings, "epochs=1", "batch_size=8", "workers=0"])
        settings = [*settings, f"{key}.weights={train(first, root / 'before').best}"]
    recipe, out = small_recipe(name, *settings), root / "run"
    interrupt(recipe, out, "step", 0, 0)
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


@pytest.mark.usefixtures("few_digits")
@pytest.mark.parametrize("name", sorted(SMALL))
def test_a_recipe_trains_resumes_and_is_evaluated(name, tmp_path, monkeypatch) -> None:
    few_blocks(monkeypatch)
    train_and_evaluate(name, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.usefixtures("few_digits")
@pytest.mark.parametrize("name", sorted(SMALL.keys() - EXPORTED_AS.keys()))
def test_a_recipe_leads_from_its_data_to_a_bundle(name, tmp_path, monkeypatch, record_property) -> None:
    few_blocks(monkeypatch)
    best = train_and_evaluate(name, tmp_path, monkeypatch)
    stored = read_checkpoint(best)
    network = create_model(stored.model, num_classes=len(stored.labels), **stored.config)
    options = ExportOptions(detach=bool(network.training_only), max_batch=1)
    exported = export(best, tmp_path / "bundles", options)
    assert exported.parity.passed
    bundle = open_bundle(exported.path)
    assert bundle.labels == stored.labels
    accepted(record_property, stored.model, "fp32", onnx.load(bundle.onnx))
