"""The name of a family leads to its networks, its recipes and its page, wherever a name is expected."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import sopdeploy
from sopdeploy.errors import ConfigError
from sopdeploy.models.families import (
    PAGE,
    SECOND_ORDER,
    describe_options,
    find_family,
    names_of_family,
)
from sopdeploy.models.registry import entry, list_models
from sopdeploy.training.settings.recipe import read_recipe, recipe_keys
from sopdeploy.training.settings.recipe_files import SELECTORS, list_recipes, recipe_text
from sopdeploy_commands.app import app

SPELLINGS = {
    "gsop": "gsop",
    "GSoP": "gsop",
    "GM-SOP": "gmsop",
    "gm_sop": "gmsop",
    "iSQRT-COV": "isqrt",
    "isqrt": "isqrt",
    "DSoP": "dsop",
    "resnet50": None,
    "": None,
}


@pytest.mark.parametrize("text", SPELLINGS)
def test_a_family_is_found_in_each_of_its_spellings(text: str) -> None:
    assert find_family(text) == SPELLINGS[text]


@pytest.mark.parametrize("word", SECOND_ORDER)
def test_every_family_has_networks_recipes_and_a_section_of_the_page(word: str) -> None:
    assert names_of_family(word, list_models())
    assert names_of_family(word, list_recipes())

    root = Path(__file__).parents[3]
    assert f"\n## {SECOND_ORDER[word]}\n" in (root / PAGE).read_text(encoding="utf-8")


GIVEN: dict[str, Callable[[], Any]] = {
    "create_model": lambda: sopdeploy.create_model("gsop"),
    "recipe": lambda: read_recipe("gsop"),
    "--set model.name": lambda: read_recipe("digits-plain", ["model.name=gsop"]),
    "--set model": lambda: read_recipe("digits-plain", ["model=gsop"]),
    "model": lambda: sopdeploy.train(recipe="digits-plain", model="gsop"),
}


@pytest.mark.parametrize("case", GIVEN)
def test_an_error_about_a_family_names_its_members_and_the_page(case: str) -> None:
    names = list_recipes() if case == "recipe" else list_models()
    members = ", ".join(names_of_family("gsop", names))

    with pytest.raises(ConfigError) as caught:
        GIVEN[case]()

    other = "models" if case == "recipe" else "recipes"
    for text in (members, f"`sopdeploy {other} gsop`", PAGE):
        assert text in str(caught.value)


@pytest.mark.parametrize("command", ["models", "recipes"])
def test_the_lists_of_networks_and_recipes_can_be_those_of_a_family(command: str) -> None:
    names = list_models() if command == "models" else list_recipes()
    members = names_of_family("gmsop", names)

    output = CliRunner().invoke(app, [command, "gm-sop"]).output

    first_words = {line.split()[0] for line in output.splitlines() if line.strip()}
    assert first_words & set(names) == set(members)
    assert PAGE in output


def test_recipes_prints_the_file_of_a_recipe_as_it_is() -> None:
    result = CliRunner().invoke(app, ["recipes", "digits-dsop"])
    assert result.output == recipe_text("digits-dsop")


def test_an_unknown_recipe_is_an_error_that_says_what_lists_them() -> None:
    result = CliRunner().invoke(app, ["recipes", "zebra"])

    assert result.exit_code == 2
    assert "'zebra'" in result.output
    assert "`sopdeploy recipes`" in result.output


def test_a_text_selects_each_table_of_a_recipe_that_has_kinds() -> None:
    selectable = {
        key.partition(".")[0]: key
        for key in recipe_keys()
        if key.partition(".")[2] in ("kind", "name")
    }

    assert selectable == SELECTORS
    assert read_recipe("digits-plain", ["procedure=few_shot"]).procedure.kind == "few_shot"


NAMED: dict[str, tuple[str, dict[str, Any], str]] = {
    "of average pooling": ("resnet8", {}, "resnet8"),
    "with a changed option": ("resnet8", {"base_width": 4}, "resnet8 (base_width=4)"),
    "with a pooling": (
        "resnet8",
        {"pooling": "isqrt"},
        "resnet8 (pooling=isqrt, iterations=5, width=256)",
    ),
    "DSoP": (
        "dsop-resnet8",
        {"aux_widths": (8, 8, 16)},
        "dsop-resnet8 (aux_widths=[8, 8, 16], iterations=5)",
    ),
    "GM-SOP": (
        "gmsop-16-8-resnet18",
        {"components": 4, "chosen": 2},
        "gmsop-16-8-resnet18 (components=4, chosen=2, component_widths=[256, 128], iterations=5)",
    ),
    "with a second-order head": (
        "head:resnet8",
        {},
        "head:resnet8 (head=gap+isqrt, iterations=7, width=48)",
    ),
}


@pytest.mark.parametrize("case", NAMED)
def test_a_network_is_named_with_the_options_of_its_family(case: str) -> None:
    name, options, named = NAMED[case]
    config = entry(name).make_config(options)

    assert describe_options(name, config, options) == named
