"""The public functions of docs/python.md take a path as text or as `Path` alike."""

import importlib
import inspect
import re
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import sopdeploy
from sopdeploy.bundle.folder import open_bundle
from sopdeploy.client import Client
from sopdeploy.errors import SopdeployError
from sopdeploy_commands.bundles.verify import verify
from sopdeploy_service.server.process import run_server
from sopdeploy_service.settings import Settings, load_settings

PAGE = Path(__file__).parents[2] / "docs" / "python.md"


def public_functions() -> Iterator[Callable[..., Any]]:
    for name in re.findall(r"^::: (\S+)", PAGE.read_text(encoding="utf-8"), re.MULTILINE):
        module, _, attribute = name.rpartition(".")
        try:
            found = getattr(importlib.import_module(module), attribute)
        except AttributeError:
            found = importlib.import_module(name)
        members = (
            vars(found).values() if isinstance(found, type | types.ModuleType) else [found]
        )
        functions = (inspect.unwrap(one) for one in members if inspect.isfunction(one))
        yield from (one for one in functions if not one.__name__.startswith("_"))


def test_a_parameter_that_is_a_path_may_be_text() -> None:
    checked = 0
    for function in public_functions():
        for name, parameter in inspect.signature(function).parameters.items():
            annotation = inspect.formatannotation(parameter.annotation)
            annotation = annotation.replace("pathlib._local.", "pathlib.")  # Python 3.13
            if "Callable[" not in annotation:  # it is called with a path
                found = re.findall(r"([\w.]+ \| )?\b(?:pathlib\.)?Path\b", annotation)
                checked += len(found)
                assert {"str | "}.issuperset(found), (
                    f"{function.__qualname__}: {name}: {annotation}"
                )
    assert checked > 10


# Each with a path that does not exist.
CALLS: dict[str, Callable[[Any], object]] = {
    "train, data": lambda path: sopdeploy.train(path, progress=False),
    "train, recipe": lambda path: sopdeploy.train(recipe=path, progress=False),
    "evaluate": lambda path: sopdeploy.evaluate(path, path),
    "export": lambda path: sopdeploy.export(path),
    "predict": lambda path: sopdeploy.predict(path, path),
    "classify": lambda path: sopdeploy.classify(path, path, path),
    "classify, sources": lambda path: sopdeploy.classify(path, [path], path),
    "verify": verify,
    "open_bundle": open_bundle,
    "serve": sopdeploy.serve,
    "serve, several": lambda path: sopdeploy.serve([path]),
    "serve, config": lambda path: sopdeploy.serve("b", config=path),
    "run_server": lambda path: run_server([path], Settings()),
    "load_settings": load_settings,
    "load_settings, keep": lambda path: load_settings(
        keys=path, keep=path, require_signature=path
    ).model_dump(),
    "the client": lambda path: Client("http://127.0.0.1:9").classify(path),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_path_gives_the_same_as_its_text(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def outcome(path: str | Path) -> object:
        try:
            return CALLS[name](path)
        except SopdeployError as error:
            return type(error), str(error)

    path = tmp_path / "not there"
    assert outcome(str(path)) == outcome(path)
    assert outcome("not there.toml") == outcome(Path("not there.toml"))
