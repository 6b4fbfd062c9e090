"""Every kind of validation error, through every way in, is one short line that names the key."""

from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import pytest
from pydantic_core import InitErrorDetails
from pydantic_core._pydantic_core import list_all_errors

from sopdeploy.base.config import (
    OtherVersionError,
    StrictModel,
    describe_problem,
    first_problem,
    shown,
    validate_format,
)
from sopdeploy.base.plugins import POOLINGS
from sopdeploy.bundle.manifest import Manifest
from sopdeploy.errors import ConfigError, first_line
from sopdeploy.layers.pooling.base import PoolingConfig
from sopdeploy.training.settings.recipe import read_recipe
from sopdeploy.version import __version__
from sopdeploy_service.settings import load_settings

CONVOLUTION = "Given groups=1, weight of size [8, {0}, 3, 3], expected input[4, 3, 9, 9] to have {0} channels"
# What torch says of mistakes that users make, and a word of the advice
ADVICE = {
    "Found no NVIDIA driver on your system. Please check it at http://x.org": ".to(x.device)",
    CONVOLUTION.format(1): "channels of preprocess",
    CONVOLUTION.format(4): "4 channels",
}
FIRST_LINES = {
    "no kernel for x. Please file an issue on github.\nmore": "RuntimeError: no kernel for x.",
    "\nPlease report a bug to PyTorch: https://x.org\nsizes differ": "RuntimeError: sizes differ",
    "Please file an issue.": "RuntimeError",
    "": "RuntimeError",
}


@pytest.mark.parametrize("text", ADVICE)
def test_a_mistake_that_torch_does_not_explain_has_advice(text: str) -> None:
    said = first_line(RuntimeError(text))

    assert ADVICE[text] in said
    assert "Please" not in said


@pytest.mark.parametrize("text", FIRST_LINES)
def test_what_a_library_asks_of_its_users_is_not_told(text: str) -> None:
    assert first_line(RuntimeError(text)) == FIRST_LINES[text]


KINDS = {str(kind["type"]): kind for kind in list_all_errors()}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_validation_error_is_one_line_with_place_and_value(kind) -> None:
    context: dict[str, Any] = dict(KINDS[kind].get("example_context") or {})
    if kind in ("value_error", "assertion_error"):
        context["error"] = ValueError("not a name")
    details = InitErrorDetails(type=kind, loc=("a", "b"), input="zzz", ctx=context)  # type: ignore[typeddict-item]
    text = first_problem(pydantic.ValidationError.from_exception_data("M", [details]))

    assert text.startswith("a.b: ")
    assert text.endswith(f" (got {shown('zzz')})")
    assert "\n" not in text


@pytest.mark.parametrize("text", ["x" * 10**6, "a\nb\x1b[31m"])
def test_what_others_send_makes_no_message_long(text) -> None:
    values = {"optimizer": {"kind": text}, "names": [text] * 3}
    with pytest.raises(pydantic.ValidationError) as caught:
        Config.model_validate(values)

    for problem in caught.value.errors():
        described = describe_problem(problem, values)
        assert described.isprintable()
        assert len(described) < 1000


class Sgd(StrictModel):
    kind: Literal["sgd"] = "sgd"
    lr: Annotated[float, pydantic.Field(gt=0, le=2.0)] = 1.0


class Adam(StrictModel):
    kind: Literal["adam"]
    lr: Annotated[int, pydantic.Field(strict=True)] | list[str] = 1


class Config(StrictModel):
    optimizer: Annotated[Sgd | Adam, pydantic.Field(discriminator="kind")]
    names: tuple[str, ...] = pydantic.Field(default=(), max_length=2)
    options: dict[int, bool] = pydantic.Field(default_factory=dict)


SGD = {"kind": "sgd"}
# values and the key of the first wrong one
KEYS: list[tuple[Any, str]] = [
    ({}, "optimizer"),
    ({"optimizer": {}}, "optimizer"),
    ({"optimizer": {"kind": "sdg"}}, "optimizer"),
    ({"optimizer": 3}, "optimizer"),
    ({"optimizer": SGD | {"lr": 0}}, "optimizer.lr"),
    ({"optimizer": SGD | {"momentum": 1}}, "optimizer.momentum"),
    ({"optimizer": {"kind": "adam", "lr": "a"}}, "optimizer.lr"),
    ({"optimizer": SGD, "names": ["a", 1]}, "names.1"),
    ({"optimizer": SGD, "names": ["a", "b", "c"]}, "names"),
    ({"optimizer": SGD, "options": {"a": True}}, "options.a"),
    ({"optimizer": SGD, "options": {1: "x"}}, "options.1"),
]


@pytest.mark.parametrize(("values", "key"), KEYS, ids=str)
def test_a_problem_names_the_key_without_what_unions_insert(values, key) -> None:
    with pytest.raises(pydantic.ValidationError) as caught:
        Config.model_validate(values)
    assert first_problem(caught.value, values).startswith(f"{key}: ")


class Median(PoolingConfig):
    kind: Literal["median-of-a-plug-in"] = "median-of-a-plug-in"


def test_a_pooling_of_an_unknown_kind_names_all_with_plug_ins(monkeypatch) -> None:
    monkeypatch.setattr(POOLINGS, "registered", {})
    POOLINGS.register_config(Median, PoolingConfig)
    names = "'gap', 'flatten', 'isqrt', .*'median-of-a-plug-in'"

    for wrong in ("pooling.iterations=3", "pooling=isqr"):
        with pytest.raises(ConfigError, match=rf"pooling: .*{names}"):
            read_recipe("digits-plain", [f"model.config.{wrong}"])


def test_every_way_in_ends_in_one_line(tmp_path, monkeypatch) -> None:
    def recipe_file() -> object:
        (tmp_path / "mine.toml").write_text('base = "digits-plain"\nbatch_size = "many"\n')
        return read_recipe(tmp_path / "mine.toml")

    def settings_file() -> object:
        (tmp_path / "settings.toml").write_text('queue_size = "many"\n')
        return load_settings(tmp_path / "settings.toml")

    def environment() -> object:
        monkeypatch.setenv("SOPDEPLOY_QUEUE_SIZE", "many")
        return load_settings()

    ways = {
        "batch_size: ": recipe_file,
        "schedule: ": lambda: read_recipe("digits-plain", ["schedule={gamma=1}"]),
        "data: ": lambda: read_recipe("digits-plain", [f"data={{path='{Path('x')}'}}"]),
        "queue_size: ": settings_file,
        "settings: queue_size: ": environment,
        "project: ": lambda: validate_format(Manifest, {"version": 1}),
    }
    for text, enter in ways.items():
        with pytest.raises((ConfigError, ValueError)) as caught:
            enter()
        assert text in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("written_by", "is_of_another_version"), [(__version__, False), ("0.9", True), (None, True)]
)
def test_an_unknown_field_is_a_mistake_only_in_this_version_s_file(
    written_by: str | None, is_of_another_version: bool
) -> None:
    class Record(StrictModel):
        version: int = 1
        written_by: str | None = None
        image: str

    fields = {"version": 1, "written_by": written_by, "no_such_field": 1}
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - both classes of it
        validate_format(Record, fields)
    assert isinstance(caught.value, OtherVersionError) == is_of_another_version
