"""Settings that a procedure does not read are errors, and random weights are trained or named."""

import shutil
from pathlib import Path
from typing import Any

import pytest

import sopdeploy
from sopdeploy.errors import ConfigError
from sopdeploy.training.records.results import LoopResult
from sopdeploy.training.settings.recipe import FewShotRecipe, change_recipe, read_recipe
from tests.sopdeploy.training.runs import paint

TINY = (
    "model.name=resnet8",
    "model.config.base_width=2",
    "preprocess.resize=16",
    "preprocess.crop=16",
)
FEW_SHOT = "procedure.kind=few_shot"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return paint(tmp_path / "photos", 4)


def test_a_recipe_for_several_procedures_has_the_settings_of_the_selected_one(
    photos: Path,
) -> None:
    settings = [f"data.path={photos}", "start.weights=none", "start.head_factor=3", *TINY]
    whole = read_recipe("photos", settings)
    record = {**whole.model_dump(mode="json"), "procedure": {"kind": "few_shot"}}  # as by 0.3
    few_shot = change_recipe(record, [], "run")

    assert isinstance(few_shot, FewShotRecipe)
    assert few_shot.model_dump().keys() < whole.model_dump().keys()
    assert few_shot == read_recipe("photos", [*settings[:2], *TINY, FEW_SHOT])


@pytest.mark.parametrize("kind", ["loop", "auto", "fine_tune"])
def test_a_run_of_few_images_can_be_followed_by_a_training_loop(
    photos: Path, kind: str
) -> None:
    settings = [f"data.path={photos}", "start.weights=none", *TINY]
    few_shot = read_recipe("photos", [*settings, FEW_SHOT]).model_dump(mode="json")
    followed = change_recipe(few_shot, [("procedure.kind", kind)], "run")

    assert followed == read_recipe("photos", [*settings, f"procedure.kind={kind}"])


NOT_READ: list[tuple[dict[str, Any], str]] = [
    ({"set": ("data.hold_out=0.4",)}, "data.hold_out: "),
    ({"data.hold_out_seed": 3}, "data.hold_out_seed: "),
    ({"set": ('start={weights="none", learn="classifier"}',)}, "start.learn: "),
    ({"save": {"every_minutes": 1}}, "save: .*procedure.kind=loop"),
    (
        {"set": ("model.name=dsop-resnet8", "model.config.aux_widths=[8,8,8]")},
        "model.config.aux_widths: ",
    ),
    ({"set": ("model={name='resnet8', remove_branches_at=1}",)}, "remove_branches_at"),
]


@pytest.mark.parametrize(("settings", "message"), NOT_READ)
def test_a_setting_that_few_photographs_do_not_need_is_refused(
    photos: Path, settings: dict[str, Any], message: str
) -> None:
    texts = (*TINY, FEW_SHOT, *settings.pop("set", ()))
    with pytest.raises(ConfigError, match=message):
        sopdeploy.train(
            photos, out=photos.parent / "run", weights="none", set=texts, **settings
        )
    assert not (photos.parent / "run").exists()


@pytest.mark.parametrize("key", ["data.hold_out=0.4", "data.hold_out_seed=1"])
def test_the_part_to_hold_out_is_refused_where_the_data_have_one(
    photos: Path, key: str
) -> None:
    (photos / "val").mkdir()
    (photos / "train").mkdir()
    for label in ("blue", "green", "red"):
        shutil.copytree(photos / label, photos / "val" / label)
        (photos / label).rename(photos / "train" / label)

    with pytest.raises(ConfigError, match=key.partition("=")[0]):
        sopdeploy.train(photos, weights="none", out=photos.parent / "run", set=(*TINY, key))


def test_random_weights_are_trained_as_a_whole(photos: Path) -> None:
    settings = (*TINY, "epochs=1")
    result = sopdeploy.train(photos, weights="none", out=photos.parent / "run", set=settings)
    assert isinstance(result.procedure, LoopResult)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained")
    settings = (*TINY, "epochs=1")
    return sopdeploy.train(
        paint(folder / "photos", 4), weights="none", out=folder / "run", set=settings
    ).best


REDUCED = "{kind='isqrt', width=4}"  # of 8 channels
# What pretrained weights leave random, and how the network is trained then.
AFTER_PRETRAINING = {
    "nothing": ((), "few_shot"),
    "auxiliary branches": (("model.name=dsop-resnet8", "epochs=1"), "loop"),
    "a pooling without parameters": (("model.config.pooling=isqrt",), "few_shot"),
    "a pooling with a convolution": ((f"model.config.pooling={REDUCED}", "epochs=1"), "loop"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", AFTER_PRETRAINING)
def test_parts_that_start_random_beside_pretrained_weights_are_trained(
    photos: Path, pretrained: Path, case: str
) -> None:
    changes, kind = AFTER_PRETRAINING[case]
    settings = (*TINY, *changes)
    many = paint(photos.parent / "many", 9)  # so many that look alike are not copies
    result = sopdeploy.train(many, weights=pretrained, out=photos.parent / "run", set=settings)

    assert isinstance(result.procedure, LoopResult) is (kind == "loop")


@pytest.mark.parametrize("kind", ["few_shot", "fine_tune"])
def test_a_head_on_random_weights_that_a_user_selects_is_refused(
    photos: Path, kind: str
) -> None:
    settings = (*TINY, f"procedure.kind={kind}")
    message = f"^procedure {kind}: .*random; procedure.kind=loop"
    with pytest.raises(ConfigError, match=message):
        sopdeploy.train(photos, weights="none", out=photos.parent / "run", set=settings)
    assert not (photos.parent / "run").exists()


CROPS = [
    ((), "preprocess.crop=288", (329, 288)),
    ((), "preprocess.crop=112", (128, 112)),
    (("preprocess.resize=64", "preprocess.crop=32"), "preprocess.crop=48", (96, 48)),
    ((), "preprocess={crop=288}", (329, 288)),
]


@pytest.mark.parametrize(("before", "change", "sides"), CROPS)
def test_a_crop_alone_scales_the_side_before_it(
    tmp_path: Path, before: tuple[str, ...], change: str, sides: tuple[int, int]
) -> None:
    base = tmp_path / "base.toml"
    table = "".join(f"{text.removeprefix('preprocess.')}\n" for text in before)
    base.write_text(f'base = "photos"\n[data]\npath = "x"\n[preprocess]\n{table}')
    rules = read_recipe(base, [change]).preprocess

    assert (rules.resize, rules.crop) == sides
