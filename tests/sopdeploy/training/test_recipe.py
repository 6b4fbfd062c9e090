"""Recipes: the packaged ones, overrides, and errors on one line."""

import operator
import re
import shlex
from pathlib import Path

import pytest

from sopdeploy.errors import ConfigError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.models.registry import make_config
from sopdeploy.training.settings.recipe import change_recipe, flatten, read_recipe
from sopdeploy.training.settings.recipe_files import list_recipes, recipe_text


@pytest.mark.parametrize("name", list_recipes())
def test_a_packaged_recipe_is_valid_and_explains_every_value(name) -> None:
    recipe = read_recipe(name)
    assert name.split("-", 1)[0] in recipe.data.kind or recipe.data.kind == "folder"
    assert change_recipe(recipe.model_dump(mode="json"), [], name) == recipe
    for line in recipe_text(name).splitlines():
        if " = " in line and not line.startswith(("#", "summary")):
            assert re.search(r" # \S.+", line), f"{line} has no comment"


def test_gsop_jitters_scale_and_color_as_he_et_al_do() -> None:
    recipe = read_recipe("imagenet-gsop-resnet50")
    augment = {"kind": "random-side", "flip": 0.5, "crop": None, "sides": (256, 480)}
    assert recipe.augment.model_dump() == augment
    assert recipe.color.lighting == 0.1


def test_the_imagenet_recipe_follows_the_paper() -> None:
    recipe = read_recipe("imagenet-dsop-resnet50")
    assert (recipe.epochs, recipe.batch_size) == (90, 256)

    augment = {"kind": "random-side", "flip": 0.5, "crop": None, "sides": (256, 512)}
    assert recipe.augment.model_dump() == augment

    rates = [
        recipe.optimizer.lr * recipe.schedule.factor(epoch, 90)
        for epoch in (0, 29.99, 30, 60, 89.99)
    ]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.001, 0.001])

    sgd = {"kind": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": False}
    assert recipe.optimizer.model_dump() == {**sgd, "weight_decay": 1e-4, "clip_norm": 0.0}


def test_gated_recipes_weight_the_balance_loss_as_the_paper() -> None:
    gated = [read_recipe("imagenet64-gmsop-resnet18"), read_recipe("places365-gmsop-resnet18")]
    configs = [make_config(recipe.model.name, recipe.model.config) for recipe in gated]
    assert [config.model_dump()["balance_weight"] for config in configs] == [100.0, 100.0]
    assert [recipe.batch_size for recipe in gated] == [256, 256]  # which divides the weight


OVERRIDES = [
    (["epochs=3"], "epochs", 3),
    (["optimizer.lr = 0.5"], "optimizer.lr", 0.5),
    (["optimizer={lr=0.2, momentum=0.5}"], "optimizer.kind", "sgd"),
    (["preprocess.mean=[0.1, 0.2, 0.3]"], "preprocess.mean", (0.1, 0.2, 0.3)),
    (["device=cpu"], "device", "cpu"),
    (["epochs=3", "epochs=4"], "epochs", 4),
    (['schedule={kind = "milestones"}'], "schedule.kind", "milestones"),
    (["data={kind='folder'}", "data.path=my photos/2024"], "data.path", Path("my photos/2024")),
    (["procedure.kind=fine_tune", "ema.decay=0.5"], "ema.decay", 0.5),
    (["ema.decay=0.5", "ema=null"], "ema", None),
]


@pytest.mark.parametrize(
    ("overrides", "key", "value"), OVERRIDES, ids=[o[0] for o, *_ in OVERRIDES]
)
def test_an_override_changes_one_value(overrides, key, value) -> None:
    assert operator.attrgetter(key)(read_recipe("digits-dsop", overrides)) == value


@pytest.mark.parametrize("name", ["photos", "imagenet-resnet50"])  # the second one names both
def test_another_crop_alone_scales_the_resize_with_it(name: str) -> None:
    rules = read_recipe(name).preprocess
    crop = rules.crop // 2
    scaled = read_recipe(name, [f"preprocess.crop={crop}"]).preprocess
    given = read_recipe(name, [f"preprocess.crop={crop}", "preprocess.resize=300"])

    assert scaled.resize == Preprocess.scaled_resize(crop, rules.resize, rules.crop)
    assert scaled.resize != rules.resize
    assert given.preprocess.resize == 300


INVALID_OVERRIDES = [
    ("optimiser.lr=1", "digits-dsop: optimiser: "),
    (
        "optimizer.momentun=1",
        "did you mean optimizer.momentum?",
    ),
    ("LR=1", "did you mean optimizer.lr?"),
    ("zzz=1", "digits-dsop: zzz: "),
    (
        "optimizer={kind='adam', lr=1}",
        "optimizer: ",
    ),
    (
        "optimizer={kind='adamw', lr=1, momentum=0.9}",
        "optimizer.momentum: ",
    ),
    ("optimizer={kind='adamw'}", "optimizer.lr: "),
    ("optimizer=3", "optimizer"),
    (
        "optimizer={lr=1, nesterov=true, momentum=0}",
        "optimizer: nesterov",
    ),
    (
        "schedule={kind='milestones', milestones=[2, 1]}",
        "schedule.milestones: ",
    ),
    (
        "schedule={kind='milestones', milestones=['a']}",
        "schedule.milestones.0: ",
    ),
    ("start.weights=3", "start.weights: "),
    (
        "data.kind=digit",
        "'digits', 'folder', 'cifar10'",
    ),
    (
        "model.name=dsop-resnt8",
        "did you mean dsop-resnet8",
    ),
    ("model.config.depht=8", "dsop-resnet8: depht: "),
    ("model.config.depth=9", "depth must be 6n + 2"),
    ("ema={decay=1.0}", "ema.decay: "),
    ("model.remove_branches_at=99", "remove_branches_at: "),
    ("optimizer=null", "optimizer: "),
    ("epochs=0", "epochs: "),
    ("preprocess={crop=99, resize=16}", "crop (99)"),
    ("epochs", "epochs: write key=value"),
    ("epochs.a=1", "epochs.a: "),
]


@pytest.mark.parametrize(
    ("override", "message"), INVALID_OVERRIDES, ids=[o for o, _ in INVALID_OVERRIDES]
)
def test_an_invalid_override_is_explained_on_one_line(override, message) -> None:
    with pytest.raises(ConfigError) as error:
        read_recipe("digits-dsop", override.split("\n"))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_errors_in_a_recipe_file_name_the_file(tmp_path) -> None:
    path, text = tmp_path / "mine.toml", recipe_text("digits-dsop")
    path.write_text(text)
    assert read_recipe(path) == read_recipe("digits-dsop") == read_recipe(str(path))

    contents = {
        text.replace("epochs", "epoch").encode(): "epoch",
        b"epochs = ": "not TOML",
        b"\xff\xfe": "cannot be read",
        b'base = "mine"': "base: .*'mine'",
        b"": "epochs: ",
        None: "cannot be read",
    }
    for content, message in contents.items():
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ConfigError, match=message) as error:
            read_recipe(path)
        assert str(path) in str(error.value)


def test_a_base_gives_missing_values_but_none_of_another_kind(tmp_path) -> None:
    path, base = tmp_path / "mine.toml", read_recipe("digits-dsop")
    text = 'base = "digits-dsop"\nsummary = "mine"\nepochs = 3\n[optimizer]\nkind = "radam"\nlr = 0.01\n'
    path.write_text(f'{text}[preprocess]\ncrop = 12\n[model]\nname = "resnet8"\n')
    preprocess = base.preprocess.model_copy(update={"crop": 12})
    expected = {"summary": "mine", "epochs": 3, "preprocess": preprocess}
    found = read_recipe(path)

    assert found.optimizer.model_dump(exclude_defaults=True) == {"kind": "radam", "lr": 0.01}

    unchanged = {"model": base.model, "optimizer": base.optimizer}
    assert found.model_copy(update=unchanged) == base.model_copy(update=expected)


def test_a_value_is_set_in_a_table_that_is_absent() -> None:
    recorded = read_recipe("digits-dsop").model_dump(mode="json")
    changes = [("ema.decay", 0.5), ("start.weights", "none")]
    assert (
        dict(changes).items()
        <= dict(flatten(change_recipe(recorded, changes, "run").model_dump())).items()
    )


def settings_in_comments() -> list[tuple[str, list[str]]]:
    """List the recipe and the settings of every `--set` line in the comments of recipes."""
    lines = [(name, line) for name in list_recipes() for line in recipe_text(name).splitlines()]
    found = [
        (name, shlex.split(line.removeprefix("#")))
        for name, line in lines
        if line.startswith("#   --set ")
    ]
    return [(name, [word for word in words if word != "--set"]) for name, words in found]


@pytest.mark.parametrize(("name", "settings"), settings_in_comments(), ids=str)
def test_the_settings_in_the_comments_of_a_recipe_are_valid(name, settings) -> None:
    assert read_recipe(name, settings) != read_recipe(name)


@pytest.mark.parametrize(
    ("settings", "config"),
    [
        ([], {"conv5_stride": 2}),
        (["model.name=isqrt-resnet50"], {"conv5_stride": 2}),
        (["model.name=dsop-resnet8"], {}),
        (["model.name=dsop-resnet8", "model.config.iterations=2"], {"iterations": 2}),
    ],
)
def test_another_network_drops_the_values_that_it_does_not_have(settings, config) -> None:
    assert read_recipe("imagenet-distilled-resnet50", settings).model.config == config


def test_the_same_network_keeps_a_misspelled_value_which_is_named() -> None:
    recorded = {"model": {"name": "resnet8", "config": {"depht": 8}}}
    with pytest.raises(ConfigError, match="run: resnet8: depht: "):
        change_recipe(recorded, [("model.name", "resnet8")], "run")


@pytest.mark.parametrize("name", list_recipes())
def test_no_recipe_guesses_its_time_on_a_gpu_which_reproduce_estimates(name: str) -> None:
    assert "GPU" not in read_recipe(name).summary
