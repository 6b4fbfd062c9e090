"""Every packaged recipe through its real loader: two steps, a stop, a resume, an evaluation, an export.

The networks are small ones of the same family; the settings are those of the recipe wherever they fit.
"""

from pathlib import Path
from typing import Any

import pytest

from sopdeploy.checkpoint import read_checkpoint
from sopdeploy.evaluate import scores_of_checkpoint
from sopdeploy.models.catalog import create_model
from sopdeploy.recipe import list_recipes, read_recipe
from sopdeploy.train import train
from sopdeploy.training.stop import TrainingStoppedError
from sopdeploy_export.pipeline import ExportOptions, export
from tests.sopdeploy.runs import Onlooker
from tests.sopdeploy.small_data import (
    tar_of,
    write_cifar,
    write_classes,
    write_photos,
    write_places,
    write_small_imagenet,
)

HEADS = "aux_widths=[8,8,8], iterations=2"
DSOP = ["model.name=dsop-resnet8", f"model.config={{{HEADS}}}"]
PLAIN = ["model.name=resnet8", "model.config={}"]
GATED = (
    "blocks_per_stage=1, conv5_stride=1, components=4, chosen=2, component_widths=[6], gate_widths=[], "
    "iterations=2, balance_weight=0.390625"
)
AT_16 = ["preprocess.resize=20", "preprocess.crop=16"]
SIDES_16 = [*AT_16, "augment.sides=[20,30]"]
SMALL: dict[str, list[str]] = {
    "cifar10-dsop-resnet20": DSOP,
    "cifar100-dsop-resnet20": DSOP,
    "cifar100-dsop-preact-resnet": [f"model.config={{blocks=1, {HEADS}}}"],
    "cifar100-dsop-wrn": [f"model.config={{blocks=1, widen=1, {HEADS}}}"],
    "cifar100-dsop-resnext": [f"model.config={{cardinality=1, group_width=4, {HEADS}}}"],
    "digits-dsop": ["batch_size=720"],
    "digits-plain": ["batch_size=720"],
    "fine-grained-isqrt-resnet50": [
        "model.name=isqrt-resnet8",
        'model.config={pooling={kind="isqrt", width=8, iterations=2}}',
        *AT_16,
        "augment.sides=[20,20]",
    ],
    "imagenet-distilled-resnet50": [*PLAIN, *SIDES_16],
    "imagenet-dsop-efficientnet-b0": [
        "model.config={iterations=2}",
        "preprocess.resize=36",
        "preprocess.crop=32",
        "schedule.warmup_epochs=0.0",
    ],
    "imagenet-dsop-resnet18": [*DSOP, *SIDES_16],
    "imagenet-dsop-resnet50": [*DSOP, *SIDES_16],
    "imagenet-dsop-two-phase": [*DSOP, *SIDES_16],
    "imagenet-gsop-resnet50": [
        "model.name=gsop-net2-preact-resnet29",
        'model.config={blocks=2, cov_width=32, block_stages=["layer3"], final_width=8, iterations=2}',
        *AT_16,
    ],
    "imagenet-isqrt-resnet50": [
        "model.name=isqrt-resnet8",
        'model.config={pooling={kind="isqrt", width=8, iterations=2}}',
        *AT_16,
    ],
    "imagenet-psdr-resnet50": [
        "model.config={depth=18, width=8, iterations=2}",
        "preprocess.resize=36",
        "preprocess.crop=32",
        "augment.sides=[36,48]",
    ],
    "imagenet-resnet50": [*PLAIN, *SIDES_16],
    "imagenet64-gmsop-resnet18": [f"model.config={{{GATED}}}", "preprocess.crop=16", "preprocess.resize=20"],
    "photos-dsop": [*DSOP, *AT_16],
    "places365-gmsop-resnet18": [f"model.config={{{GATED}}}", *AT_16, "augment.sides=[20,20]"],
}
EXPORTED = {"cifar10-dsop-resnet20"}  # in every run; the others are slow


def test_every_recipe_is_walked() -> None:
    assert set(SMALL) == set(list_recipes())


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
    kind = read_recipe(name).data.kind
    overrides = [*SMALL[name], *data_of(name, kind, root / "data", monkeypatch)]
    overrides += trained_before(name, overrides, root)
    size = [] if kind == "digits" else ["batch_size=4"]
    recipe = read_recipe(name, ["epochs=1", "workers=0", *size, *overrides])
    out = root / "run"
    with pytest.raises(TrainingStoppedError):
        train(recipe, out, progress=Onlooker(stop_at=("stepped", 0, 0)))
    assert read_checkpoint(out / "last.pt").resume["position"]["step"] == 1
    result = train(recipe, out, resume=True)
    stored = read_checkpoint(result.best)
    assert result.epochs == 1
    assert stored.training["recipe"]["summary"] == recipe.summary
    _, scores = scores_of_checkpoint(
        result.best, write_classes(root / "measured", stored.labels), on_picture=lambda _done, _all: None
    )
    assert len(scores) == 2 * len(stored.labels)
    return result.best


@pytest.mark.parametrize("name", sorted(set(SMALL) - EXPORTED))
def test_a_recipe_walks_from_its_data_to_a_measured_network(name, tmp_path, monkeypatch) -> None:
    assert walk(name, tmp_path, monkeypatch).is_file()


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in EXPORTED else pytest.mark.slow) for name in sorted(SMALL)],
)
def test_a_recipe_walks_from_its_data_to_a_bundle(name, tmp_path, monkeypatch) -> None:
    best = walk(name, tmp_path, monkeypatch)
    stored = read_checkpoint(best)
    network = create_model(stored.model, num_classes=len(stored.labels), **stored.config)
    exported = export(best, tmp_path / "bundles", ExportOptions(detach=bool(network.training_only)))
    assert (exported.path / "model.onnx").is_file()
