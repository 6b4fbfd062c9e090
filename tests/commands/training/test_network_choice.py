"""The choice among networks by cross-validation and time, with times that the tests set."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import sopdeploy
from sopdeploy.bundle.folder import open_bundle
from sopdeploy.errors import ConfigError, DataError, WeightsError
from sopdeploy.evaluation.metrics import Rate
from sopdeploy.evaluation.multi_label import MeanPrecision
from sopdeploy.models.choices import Choice, Choices, file_stem, read_choices
from sopdeploy.models.registry import CatalogModel, create_model, entry
from sopdeploy.models.second_order_head import head_name
from sopdeploy.models.timm_networks import import_timm
from sopdeploy.training.callback import Callback
from sopdeploy.training.recipe import Recipe, read_recipe
from sopdeploy.training.setup import Given
from sopdeploy_commands.training import network_choice
from sopdeploy_commands.training.network_choice import (
    Speed,
    Validated,
    fetch_weights,
    measure_networks,
)
from sopdeploy_commands.training.train import train
from sopdeploy_service.runtime.onnxruntime import OnnxRuntime
from sopdeploy_service.settings import Settings
from tests.sopdeploy.training.runs import paint, save_random
from tests.support.service import running

pytestmark = pytest.mark.usefixtures("allow_random_features")
IMAGES = 100
NAMES = ("resnet8", "resnet20", "preact-resnet110")


def validated(right: Sequence[int]) -> Validated:
    """A cross-validation in which the images whose numbers are in *right* are right."""
    mask = np.isin(np.arange(IMAGES), right)
    return Validated(Rate.of(int(mask.sum()), IMAGES), mask, np.arange(IMAGES))


def of_several_classes(value: float, low: float) -> Validated:
    """A cross-validation with several classes per image."""
    return Validated(
        MeanPrecision(value=value, low=low, high=1.0, count=IMAGES), None, np.arange(IMAGES)
    )


CHOICES: dict[str, tuple[dict[str, tuple[float, Validated]], float | None, str]] = {
    "the most accurate": (
        {"a": (9, validated(range(60))), "b": (1, validated(range(40)))},
        None,
        "a",
    ),
    "the fastest of equal ones": (
        {"a": (9, validated(range(60))), "b": (1, validated(range(60)))},
        None,
        "b",
    ),
    "the fastest of a few images' difference": (
        {"a": (9, validated(range(60))), "b": (1, validated(range(58)))},
        None,
        "b",
    ),
    "the most accurate one that is fast enough": (
        {
            "a": (9, validated(range(60))),
            "b": (5, validated(range(40))),
            "c": (1, validated([])),
        },
        5,
        "b",
    ),
    "by the interval of a mean precision": (
        {"a": (9, of_several_classes(0.9, 0.8)), "b": (5, of_several_classes(0.81, 0.7))},
        None,
        "b",
    ),
}


def set_results(
    patch: pytest.MonkeyPatch, found: dict[str, tuple[float, Validated]]
) -> list[str]:
    """Replace measurements and cross-validations by *found*; return the names that are cross-validated."""
    names: list[str] = []

    def score_network(recipe: Recipe, *_: Any) -> Validated:
        names.append(recipe.project or "")
        return found[names[-1]][1]

    speeds = {name: Speed(time, 1.0) for name, (time, _) in found.items()}
    patch.setattr(network_choice, "measure_networks", lambda *_: speeds)
    patch.setattr(network_choice, "score_network", score_network)
    patch.setattr(network_choice, "fetch_published", lambda *_, **_options: None)
    return names


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return paint(tmp_path / "photos", 4)


@pytest.mark.parametrize("case", CHOICES)
def test_the_choice_is(case: str, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, within, expected = CHOICES[case]
    names = set_results(monkeypatch, found)
    recipes = {
        name: read_recipe("photos", [f"data.path={photos}", f"project={name}"])
        for name in found
    }
    configured = {name: (recipe, Given()) for name, recipe in recipes.items()}
    scores = network_choice.choose_network(configured, within, Callback())
    assert [score.name for score in scores if score.chosen] == [expected]
    assert [score.name for score in scores if score.score is not None] == names
    assert names == [
        name for name, (time, _) in found.items() if within is None or time <= within
    ]


def test_the_error_names_the_fastest_network_if_none_is_fast_enough(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_results(monkeypatch, {"a": (9.04, validated([])), "b": (11, validated([]))})
    recipe = read_recipe("photos", [f"data.path={photos}"])
    message = "no network needs at most 5 ms; the fastest is a with 9.0 ms"
    with pytest.raises(ConfigError, match=message):
        network_choice.choose_network(
            {"a": (recipe, Given()), "b": (recipe, Given())}, 5, Callback()
        )


def test_a_run_trains_the_chosen_network_and_its_page_lists_all(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times, weights = dict(zip(NAMES, (7.0, 3.0, 90.0), strict=True)), photos.parent / "weights"
    weights.mkdir()
    for name in NAMES:
        save_random(weights / f"{name}.pt", name)
    monkeypatch.setattr(
        network_choice,
        "measure_networks",
        lambda *_: {name: Speed(ms, 1.5) for name, ms in times.items()},
    )
    result = train(
        photos,
        models=",".join(NAMES),
        within="10.5ms",
        weights=str(weights),
        out=photos.parent / "run",
        set=(
            "preprocess.resize=16",
            "preprocess.crop=16",
            "procedure.kind=few_shot",
            "procedure.group_copies=false",
        ),
    )
    assert [(one.name, one.score is None) for one in result.networks] == list(
        zip(NAMES, (0, 0, 1), strict=True)
    )
    assert result.model in {f"head:{one.name}" for one in result.networks if one.chosen}
    page = (photos.parent / "run" / "report.html").read_text(encoding="utf-8")
    assert page.count("too slow") == 1
    assert all(name in page for name in NAMES)
    monkeypatch.setattr(
        network_choice, "choose_network", None
    )  # nothing is measured for a folder in use
    with pytest.raises(ConfigError, match="holds a run"):
        train(photos, models=",".join(NAMES), out=photos.parent / "run")


@pytest.mark.slow
def test_networks_are_measured_without_weights_on_images_of_their_size(photos: Path) -> None:
    settings = ["model.name=resnet8", "model.config.base_width=2", "procedure.kind=few_shot"]
    recipe = read_recipe("photos", [f"data.path={photos}", *settings])
    assert recipe.start is not None  # its file is not read
    speed = measure_networks({"a": recipe}, 3, Callback())["a"]
    assert speed.milliseconds > 0
    assert 0 < speed.megabytes < 1
    assert (
        torch.tensor(1e-40) * torch.ones(1) > 0
    )  # training computes with denormal numbers as before


ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "a list and a network": (
        {"within": "20ms", "set": ("model.name=resnet8",)},
        "within: not with model.name, the name of one network",
    ),
    "several networks and a name in a table": (
        {"models": ["resnet8", "resnet20"], "model": {"name": "resnet18"}},
        "models: not with model.name, the name of one network",
    ),
    "several networks and a name as a key": (
        {"models": "resnet8,resnet20", "model.name": "resnet18"},
        "models: not with model.name, the name of one network",
    ),
    "several networks and no table": (
        {"models": "resnet8,resnet20", "set": ("model=3",)},
        "model.name: model is a value, not a table with keys",
    ),
    "several networks and a table that is set": (
        {"models": "resnet8,resnet20", "set": ('model={name="resnet18"}',)},
        "models: not with model.name, the name of one network",
    ),
    "a list and a run to resume": (
        {"within": "20ms", "resume": "always"},
        "within: not with resume",
    ),
    "a file for the networks of the list": (
        {"within": "20ms", "weights": "a.pth"},
        "give a folder, or one for",
    ),
    "a time without unit": (
        {"models": "resnet8", "within": "20"},
        "'20' is no time; give milliseconds",
    ),
    "fewer files than networks": (
        {"models": "resnet8,resnet20,resnet18", "weights": "a.pth,b.pth"},
        "weights: 2 for 3 networks; give a folder, or one for each",
    ),
    "a file for two networks": (
        {"models": "resnet8,resnet20", "weights": "a.pth"},
        "1 for 2 networks",
    ),
    "a run to resume": ({"models": "resnet8", "resume": "auto"}, "models: not with resume"),
    "an unknown network": (
        {"models": "resnet8, resnet9", "weights": "none, none"},
        "model 'resnet9' is not in the catalog",
    ),
    "a procedure without cross-validation": (
        {"models": "resnet8", "set": ("procedure.kind=loop",)},
        "models: resnet8: the procedure loop trains it",
    ),
}


def list_networks(monkeypatch: pytest.MonkeyPatch, names: Sequence[str]) -> None:
    """Replace the networks of the list."""
    facts = {"timm": "x", "license": "mit", "pixels": 16, "millions": 1.0, "top1": 50.0}
    choices = Choices(source="x", networks=tuple(Choice(name=name, **facts) for name in names))
    monkeypatch.setattr("sopdeploy_commands.training.request.read_choices", lambda: choices)


def save_weights(folder: Path, names: Sequence[str]) -> Path:
    """Write random weights in *folder*, named like the networks."""
    folder.mkdir()
    for name in names:
        torch.save(
            create_model(name, num_classes=1000).state_dict(), folder / f"{file_stem(name)}.pth"
        )
    return folder


def test_of_the_list_the_networks_with_a_file_in_the_folder_are_compared(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = (
        "timm:test_vit.r160_in1k",
        "timm:test_resnet.r160_in1k",
        "timm:test_convnext.r160_in1k",
    )
    list_networks(monkeypatch, names)
    monkeypatch.setattr(
        network_choice,
        "measure_networks",
        lambda recipes, *_: {name: Speed(1.0, 1.5) for name in recipes},
    )
    warnings: list[str] = []
    callback = Callback()
    monkeypatch.setattr(callback, "on_warning", warnings.append)
    folder = save_weights(photos.parent / "weights", names[:2])
    result = train(
        photos, within="9ms", weights=str(folder), out=photos.parent / "run", callback=callback
    )
    assert [one.name for one in result.networks] == list(names[:2])
    assert all(one.score is not None for one in result.networks)
    assert f"skipped, because {folder} lacks them: {names[2]}" in warnings


FOLDERS: dict[str, tuple[dict[str, str], Sequence[str], str]] = {
    "none of the list": (
        {"within": "9ms"},
        (),
        "no weights of resnet8, resnet20, preact-resnet110; name",
    ),
    "a named network": (
        {"models": "resnet8,resnet20"},
        NAMES[:1],
        "no weights of resnet20; name files like",
    ),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_without_weights_is_an_error_that_names_the_files(
    case: str, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, there, message = FOLDERS[case]
    list_networks(monkeypatch, NAMES)
    folder = save_weights(photos.parent / "weights", there)
    with pytest.raises(WeightsError, match=message) as error:
        train(photos, weights=str(folder), **options)
    assert error.value.setting == "weights"


def unreachable(*names: str) -> Any:
    """A stand-in for the download, in which the weights of *names* cannot be reached."""

    def fetch_published(model: CatalogModel, *, download: bool) -> None:
        if model.name in names:
            raise WeightsError(f"{model.name}: cannot be downloaded")

    return fetch_published


def recipes_of(photos: Path, names: Sequence[str]) -> dict[str, Recipe]:
    return {
        name: read_recipe("photos", [f"data.path={photos}", f"model.name={name}"])
        for name in names
    }


def test_weights_of_the_list_that_cannot_be_reached_are_named_and_skipped(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    callback = Callback()
    monkeypatch.setattr(callback, "on_warning", warnings.append)
    monkeypatch.setattr(network_choice, "fetch_published", unreachable(NAMES[0]))
    assert fetch_weights(recipes_of(photos, NAMES), callback, may_skip=True) == list(NAMES[1:])
    (warning,) = warnings
    assert warning.startswith(f"skipped, because their weights cannot be reached: {NAMES[0]} (")
    with pytest.raises(WeightsError, match=f"^{NAMES[0]}: cannot be downloaded$"):
        fetch_weights(recipes_of(photos, NAMES), callback, may_skip=False)  # named by the user


def test_if_no_weights_of_the_list_can_be_reached_the_error_says_what_to_do(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network_choice, "fetch_published", unreachable(*NAMES))
    with pytest.raises(
        WeightsError, match=r"no weights of .*like resnet8\.safetensors"
    ) as error:
        fetch_weights(recipes_of(photos, NAMES), Callback(), may_skip=True)
    assert error.value.remedies == {"weights": "FOLDER"}


def test_a_network_without_weights_is_in_the_table(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {
        "a": (9.0, validated(range(60))),
        "b": (1.0, validated(range(60))),
        "c": (99.0, validated([])),
    }
    set_results(monkeypatch, found)
    monkeypatch.setattr(network_choice, "fetch_weights", lambda *_, **_options: ["a"])
    recipes = {
        name: read_recipe("photos", [f"data.path={photos}", f"project={name}"])
        for name in found
    }
    configured = {name: (recipe, Given()) for name, recipe in recipes.items()}
    scores = network_choice.choose_network(configured, 10, Callback())
    assert [score.row()[1].partition(" %")[0] for score in scores] == [
        "60.0",
        "no weights",
        "too slow",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("choice", read_choices().networks, ids=lambda choice: choice.name)
def test_the_list_states_what_timm_says(choice: Choice) -> None:
    published = import_timm(choice.timm).get_pretrained_cfg(choice.timm)
    assert choice.license == published.license
    assert choice.license in {"apache-2.0", "mit", "bsd-3-clause"}  # any use is allowed
    assert published.input_size[-1] == entry(choice.name).image_size
    assert choice.resized == (choice.pixels != published.input_size[-1])
    with torch.device("meta"):
        size = {"image_size": choice.pixels} if choice.resized else {}
        network = create_model(choice.name, num_classes=published.num_classes or 1, **size)
    if not published.num_classes:  # learned without labels
        network.remove_classifier()
    assert (
        choice.millions
        == round(sum(weight.numel() for weight in network.parameters()) / 1e6, 2)
        < 90
    )
    assert entry(head_name(choice.name))  # the few-shot procedure has a head for it
    assert network.tap_channels  # which reads covariances


@pytest.mark.nightly
@pytest.mark.parametrize("choice", read_choices().networks, ids=lambda choice: choice.name)
def test_each_network_of_the_list_trains_exports_and_serves_with_random_weights(
    choice: Choice, tmp_path: Path
) -> None:
    photos = paint(tmp_path / "photos", 4)
    settings = (f"model.name={choice.name}", "start.weights=none", "procedure.kind=few_shot")
    size = (f"preprocess.crop={choice.pixels}", f"preprocess.resize={choice.pixels}")
    result = train(photos, out=tmp_path / "run", set=(*settings, *size))

    # A network with random weights can enlarge rounding: ConvNeXt's features hardly depend on the
    # image before it is trained.
    exported = sopdeploy.export(
        result.best,
        tmp_path / "bundles",
        detach=True,
        max_batch=1,
        allow_numerical_error=True,
    )
    bundle = open_bundle(exported.path)
    assert bundle.manifest.preprocess.crop == choice.pixels
    with running(OnnxRuntime(bundle, Settings(threads=1)), bundle, Settings()) as client:
        image = next(photos.glob("red/*.png"))
        answer = client.post(
            "/v1/classify", content=image.read_bytes(), headers={"Content-Type": "image/png"}
        )
    assert answer.status_code == 200
    assert {one["label"] for one in answer.json()["classes"]} == {"blue", "green", "red"}


@pytest.mark.parametrize("case", ERRORS)
def test_options_are_refused(case: str, photos: Path) -> None:
    options, message = ERRORS[case]
    with pytest.raises(ConfigError, match=message):
        train(photos, out=photos.parent / "run", **options)


@pytest.mark.parametrize("num_held_out", [0, 6])
def test_a_fraction_to_hold_out_is_refused_where_the_data_have_held_out_images(
    photos: Path, num_held_out: int
) -> None:
    values = [f"data.path={photos}", "procedure.kind=fine_tune", "data.hold_out=0.5"]
    given = Given(keys=("data.hold_out",))
    configured = {"a": (read_recipe("photos", values), given)}
    data: Any = SimpleNamespace(train=range(60), held_out=range(num_held_out))
    if num_held_out:
        with pytest.raises(ConfigError, match=r"^data\.hold_out: without effect, because"):
            network_choice.select_procedures(configured, data)
    else:
        assert list(network_choice.select_procedures(configured, data)) == ["a"]


def test_weights_that_cannot_be_reached_are_named_before_anything_is_measured(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network_choice, "fetch_published", unreachable(NAMES[1]))
    monkeypatch.setattr(network_choice, "measure_networks", None)
    with pytest.raises(WeightsError, match=f"^{NAMES[1]}: cannot be downloaded$"):
        train(photos, models=",".join(NAMES), within="9ms", out=photos.parent / "run")


def test_unknown_images_may_be_in_a_flat_folder_and_a_missing_one_is_named(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flat = photos.parent / "flat"
    shutil.copytree(next(photos.iterdir()), flat)
    settings = ("model.name=resnet8", "preprocess.crop=16", "procedure.kind=few_shot")
    callback, warnings = Callback(), list[str]()
    monkeypatch.setattr(callback, "on_warning", warnings.append)
    next(flat.iterdir()).rename(flat / f"{0:032x}.png")  # as a server names what it keeps
    given = {"weights": "none", "unknown": str(flat), "set": settings}
    train(photos, out=photos.parent / "run", callback=callback, **given)
    assert any("1 photo left out, because a server kept them" in line for line in warnings)
    with pytest.raises(DataError, match="no such folder; give a folder with JPEG or PNG files"):
        train(
            photos, weights="none", unknown=str(flat / "missing"), out=photos.parent / "other"
        )
