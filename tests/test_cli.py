"""The command line as a user meets it: help, JSON, and mistakes answered on one line."""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.text import Text
from typer.main import get_command
from typer.testing import CliRunner

import sopdeploy
from sopdeploy.cli.app import BESIDE, WALK, app
from sopdeploy.cli.console import plain
from sopdeploy.errors import ConfigError
from sopdeploy.models.registry import CATALOG, FAMILIES, title
from sopdeploy.training.recipe import Recipe, list_recipes

ROOT = Path(sopdeploy.__file__).parents[1]
COMMANDS: Any = get_command(app)
FUZZ = settings(max_examples=200, deadline=None, database=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def sopdeploy_cli(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def as_json(*arguments: str) -> Any:
    found = sopdeploy_cli(*arguments, "--json")
    assert (found.exit_code, found.stderr) == (0, "")
    return json.loads(found.stdout)


def refusal(*arguments: str) -> str:
    """Return the one line that a mistake is answered with."""
    found = sopdeploy_cli(*arguments)
    assert found.exit_code == 2, found.output or repr(found.exception)
    assert found.stdout == ""
    assert found.stderr.startswith("error: ")
    assert found.stderr.count("\n") == 1
    assert list(Path.cwd().iterdir()) == []
    return found.stderr


@pytest.mark.parametrize("verb", COMMANDS.commands)
def test_the_help_of_every_verb_shows_an_example_that_parses(verb: str) -> None:
    found = sopdeploy_cli(verb, "--help")
    assert found.exit_code == 0
    example = re.search(rf"Example:\s+sopdeploy {verb}", found.stdout)
    assert example, found.stdout


@pytest.mark.parametrize("verb", COMMANDS.commands)
def test_every_option_says_what_it_is(verb: str) -> None:
    silent = [p.name for p in COMMANDS.commands[verb].params if not getattr(p, "help", None)]
    assert silent == []


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_names_every_verb(flag: str) -> None:
    found = sopdeploy_cli(flag)
    assert found.exit_code == 0
    assert all(verb in found.stdout for verb in COMMANDS.commands)


def test_without_a_verb_the_walk_is_shown_in_order() -> None:
    found = sopdeploy_cli()
    assert (found.exit_code, found.stderr) == (0, "")
    walk = re.findall(r"^ +\d +sopdeploy (\w+)", found.stdout, re.MULTILINE)
    assert walk == ["demo", "train", "export", "verify", "predict", "serve", "doctor"]
    assert max(map(len, found.stdout.splitlines())) <= 110


def test_the_walk_and_what_stands_beside_it_are_all_the_verbs() -> None:
    walk = [shlex.split(command)[1:] for command, _ in WALK]
    beside = [verb for verbs in BESIDE.values() for verb in verbs]
    assert sorted([verb for verb, *_ in walk] + beside) == sorted(COMMANDS.commands)
    for verb, *arguments in walk:
        assert COMMANDS.commands[verb].make_context(verb, arguments).args == []


# What each shell sends for `sopdeploy ex<Tab>`.
ASKED = {
    "bash": {"COMP_WORDS": "sopdeploy ex", "COMP_CWORD": "1"},
    "zsh": {"_TYPER_COMPLETE_ARGS": "sopdeploy ex"},
    "fish": {"_TYPER_COMPLETE_ARGS": "sopdeploy ex", "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
}


@pytest.mark.parametrize("shell", ASKED)
def test_the_tab_key_completes_a_verb(shell: str) -> None:
    asked = {**os.environ, **ASKED[shell], "_SOPDEPLOY_COMPLETE": f"complete_{shell}"}
    found = subprocess.run(
        [sys.executable, "-c", "from sopdeploy.cli.app import main; main()"],
        cwd=ROOT,
        env=asked,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "export" in found.stdout
    assert "train" not in found.stdout
    assert "\x1b" not in found.stdout
    assert "[bold]" not in found.stdout


def test_completion_is_installed_into_the_home_folder_for_the_program_of_this_name(tmp_path: Path) -> None:
    known = {"HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    found = subprocess.run(
        [sys.executable, "-c", "from sopdeploy.cli.app import main; main()", "--install-completion", "bash"],
        cwd=ROOT,
        env={**os.environ, **known},
        capture_output=True,
        text=True,
        check=True,
    )
    script = tmp_path / ".bash_completions" / "sopdeploy.sh"
    assert script.as_posix() in found.stdout
    assert "complete -o default -F _sopdeploy_completion sopdeploy" in script.read_text(encoding="utf-8")


def test_the_version_is_that_of_the_package() -> None:
    assert sopdeploy_cli("--version").stdout == f"sopdeploy {sopdeploy.__version__}\n"


HEAVY = ("torch", "torchvision", "onnx", "onnxruntime", "onnxscript", "fastapi", "uvicorn", "sklearn", "timm")
SHOW_HELP = f"""
import sys
from sopdeploy.cli.app import (main)
sys.argv = ["sopdeploy", "--help"]
try:
    main()
finally:
    print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)
"""


def test_help_loads_nothing_heavy(record_property: Any) -> None:
    started = time.monotonic()
    found = subprocess.run(
        [sys.executable, "-W", "error", "-c", SHOW_HELP], capture_output=True, text=True, check=True
    )
    seconds = time.monotonic() - started
    record_property("seconds", seconds)
    sys.stdout.write(f"sopdeploy --help took {seconds:.2f} s\n")
    assert found.stderr.strip() == "[]"
    assert "Usage" in found.stdout


def test_the_module_and_the_script_are_the_same_command_line() -> None:
    script = Path(sys.executable).with_name("sopdeploy")
    commands = [[sys.executable, "-m", "sopdeploy"], *([[str(script)]] if script.exists() else [])]
    for command in commands:
        found = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
        assert found.stdout == f"sopdeploy {sopdeploy.__version__}\n"


MISTYPED = {"exprt": "export", "trian": "train", "verfy": "verify", "serv": "serve", "model": "models"}


@pytest.mark.parametrize("verb", MISTYPED)
def test_a_mistyped_verb_is_answered_with_the_nearest_one(verb: str) -> None:
    found = sopdeploy_cli(verb)
    assert found.exit_code == 2
    assert re.search(rf"No such command '{verb}'.*Did you mean.*{MISTYPED[verb]}", found.stderr, re.DOTALL)


def test_models_lists_the_catalog() -> None:
    found = as_json("models")
    assert [row["name"] for row in found] == list(CATALOG)
    assert all(row["summary"] for row in found)
    table = sopdeploy_cli("models").stdout
    assert all(name in table for name in CATALOG)


def test_models_are_grouped_by_what_they_are() -> None:
    lines = sopdeploy_cli("models").stdout.splitlines()
    first = {next(iter(family.ENTRIES)): title(family) for family in FAMILIES}
    for name, heading in first.items():
        assert lines[lines.index(heading) + 1].split()[0] == name
    assert not [line for line in lines if len(line) > 160]


def test_a_pooling_is_short_for_the_models_switch() -> None:
    short = as_json("describe", "resnet20", "--pooling", "isqrt")
    assert short == as_json("describe", "resnet20", "--set", "pooling=isqrt")
    assert short["config"]["pooling"]["kind"] == "isqrt"


def test_training_takes_the_pooling_too(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Recipe] = []

    def stop_at_once(recipe: Recipe, *_: Any, **__: Any) -> None:
        seen.append(recipe)
        raise ConfigError("enough")

    monkeypatch.setattr("sopdeploy.training.loop.train", stop_at_once)
    assert "enough" in refusal("train", "--recipe", "digits-plain", "--pooling", "netvlad")
    assert seen[0].model.full_config()["pooling"] == {"kind": "netvlad", "words": 64}


def test_describe_shows_the_printed_figure_beside_ours() -> None:
    text = sopdeploy_cli("describe", "gmsop-16-8-wrn36-2").stdout
    assert "training parameters 15.7 M, here 17.8092 M (misprint: the released code builds 17.8)" in text


def test_recipes_lists_every_recipe_with_its_summary() -> None:
    found = as_json("recipes")
    assert [row["name"] for row in found] == list_recipes()
    assert all(row["summary"] for row in found)
    assert all(name in sopdeploy_cli("recipes").stdout for name in list_recipes())


# What DSoP on ResNet-18 trains and ships, with the stride of the paper's text and of its table.
COUNTS = {(): (100_494_536, 11_689_512), ("--set", "aux_stride=table"): (100_577_224, 11_689_512)}


@pytest.mark.parametrize("options", COUNTS)
def test_describe_counts_what_trains_and_what_ships(options: tuple[str, ...]) -> None:
    found = as_json("describe", "dsop-resnet18", *options)
    counts = (found["training"]["parameters"], found["shipped"]["parameters"])
    assert counts == COUNTS[options]
    text = sopdeploy_cli("describe", "dsop-resnet18", *options).stdout
    assert all(f"{count:,}" in text for count in counts)


def test_describe_takes_size_and_classes() -> None:
    found = as_json("describe", "dsop-resnet8", "--num-classes", "7", "--image-size", "24")
    assert (found["num_classes"], found["image_size"]) == (7, 24)


TOML = "recipe.toml"
MISTAKES: dict[str, tuple[tuple[str, ...], str]] = {
    "an unknown model": (
        ("describe", "dsop-resnet80"),
        "'dsop-resnet80' is not in the catalog; did you mean",
    ),
    "a model like no other": (("describe", "vgg"), "`sopdeploy models` lists them all"),
    "an unknown key": (("describe", "dsop-resnet18", "--set", "aux_strid=table"), "aux_strid: unknown key"),
    "an unknown value": (("describe", "dsop-resnet18", "--set", "aux_stride=tabel"), "aux_stride: .*'tabel'"),
    "a value of another type": (("describe", "dsop-resnet18", "--set", "iterations=many"), "iterations: "),
    "an unknown pooling": (("describe", "resnet18", "--pooling", "isqr"), "there are gap, isqrt, mpncov"),
    "a pooling to train that is unknown": (
        ("train", "--recipe", "digits-plain", "--pooling", "x"),
        "pooling 'x': no such pooling; there are gap, isqrt",
    ),
    "a pooling where the end is the network's own": (
        ("describe", "psdr-resnet50", "--pooling", "isqrt"),
        "psdr-resnet50: pooling: ",
    ),
    "no value": (("describe", "dsop-resnet18", "--set", "aux_stride"), "write key=value"),
    "the name as a key": (("describe", "dsop-resnet18", "--set", "name=x"), "name: unknown key"),
    "classes as a key": (("describe", "dsop-resnet18", "--set", "num_classes=3"), "num_classes: unknown key"),
    "size as a key": (("describe", "dsop-resnet18", "--set", "image_size=3"), "image_size: unknown key"),
    "nothing to learn from": (("train",), "--data DIR .* or --recipe NAME"),
    "an unknown recipe": (("train", "--recipe", "digits-dsp"), "did you mean digits-dsop"),
    "a recipe file that is not there": (("train", "--recipe", TOML), "recipe.toml: cannot be read"),
    "a recipe's unknown key": (
        ("train", "--recipe", "digits-dsop", "--set", "optimizer.lt=1"),
        "did you mean optimizer.lr",
    ),
    "a folder that is not there": (("train", "--data", "photos"), "photos"),
    "a checkpoint that is not there": (("export", "ckpt.pt"), "ckpt.pt: no such file"),
    "a checkpoint to measure": (("eval", "ckpt.pt", "--data", "photos"), "ckpt.pt: no such file"),
    "a service with views": (
        ("eval", "http://x", "--data", "d", "--tta", "flip"),
        "answers pictures as they are",
    ),
    "a checkpoint with a runtime": (("eval", "c.pt", "--data", "d", "--runtime", "auto"), "only a bundle"),
    "a folder that is no bundle": (("eval", ".", "--data", "d"), "without a manifest.json"),
    "a run that is not there": (("report", "nowhere"), "nowhere: holds no run"),
    "one recipe to compare": (("compare", "digits-plain"), "two recipes at least"),
    "an unknown logger": (("train", "--recipe", "digits-plain", "--log", "x"), "--log x: none of"),
    "a bundle that is not there": (("verify", "bundle"), "bundle: no bundle here"),
    "a bundle to ask": (("predict", "bundle", "photo.jpg"), "bundle: no bundle here"),
    "a bundle to serve": (("serve", "bundle", "--port", "0"), "bundle: no bundle here"),
    "a port beyond the last": (("serve", "bundle", "--port", "99999"), "port"),
    "a path in brackets": (("verify", "[bold]x[/]"), re.escape("[bold]x[/]: no bundle here")),
    "a path with a sign": (("verify", "a:dog:b"), "a:dog:b: no bundle here"),
    "a path that steers the terminal": (("verify", "a\x1b[31mb"), re.escape("a?[31mb: no bundle here")),
    "a path of two lines": (("verify", "a\nb"), "a b: no bundle here"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line_with_what_where_and_what_to_do(case: str) -> None:
    arguments, message = MISTAKES[case]
    assert re.search(message, refusal(*arguments))


@pytest.mark.parametrize("name", ["SOPDEPLOY_PORT", "SOPDEPLOY_THREADS"])
def test_a_wrong_setting_in_the_environment_is_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "many")
    assert name.removeprefix("SOPDEPLOY_").lower() in refusal("serve", "bundle").lower()


USAGE = {
    "an unknown option": ("models", "--jsn"),
    "an argument too many": ("models", "more"),
    "no checkpoint": ("export",),
    "no picture": ("predict", "bundle"),
    "a batch of none": ("export", "ckpt.pt", "--max-batch", "0"),
    "a number that is none": ("serve", "bundle", "--port", "http"),
}


@pytest.mark.parametrize("case", USAGE)
def test_wrong_usage_ends_with_2_and_says_where_help_is(case: str) -> None:
    found = sopdeploy_cli(*USAGE[case])
    assert found.exit_code == 2
    assert found.stdout == ""
    assert "--help" in found.stderr or "-h" in found.stderr


@FUZZ
@given(st.text(st.characters(categories=["L", "N", "P", "S", "Zs", "Cc"]), max_size=30).filter(str.strip))
def test_text_from_outside_is_shown_as_it_is_on_one_line(text: str) -> None:
    text = text.rstrip("\\") + "."  # rich shows a backslash at the very end twice
    shown = Text.from_markup(f"[bold]error:[/] {plain(text)} [dim]end[/]", emoji=False).plain
    expected = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
    assert shown == f"error: {expected} end"


def test_a_closed_pipe_is_no_traceback() -> None:
    command = f"{sys.executable} -m sopdeploy --help | true"
    found = subprocess.run(
        ["/bin/sh", "-c", command], capture_output=True, text=True, check=False, env=os.environ
    )
    assert "Traceback" not in found.stderr
