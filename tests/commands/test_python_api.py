"""The Python API gives the results of the command line, with the same defaults."""

import asyncio
import inspect
import json
import subprocess
import sys
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import sopdeploy
from sopdeploy.errors import ConfigError, DataError, command_line_option
from sopdeploy.training.settings.recipe import change_recipe, flatten
from sopdeploy.training.settings.recipe_files import read_values
from sopdeploy_commands.app import app
from sopdeploy_commands.train_request import TrainOptions, configure, read_changes
from tests.support.service import picture_bytes, write_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundles"))


def test_an_error_names_arguments_in_python_and_options_in_a_shell() -> None:
    with pytest.raises(ConfigError, match=r"^max_batch: "):
        sopdeploy.export("ckpt.pt", max_batch=0)

    error = CliRunner().invoke(app, ["export", "ckpt.pt", "--max-batch", "0"])
    assert error.exit_code == 2
    assert error.stdout == ""
    assert error.stderr.count("\n") == 1
    assert "--max-batch: " in error.stderr


ERRORS = {
    "max_batch=0: too small": ("--max-batch 0: too small", {"setting": "max_batch", "value": 0}),
    "x; try detach=True or allow_numerical_error=False": (
        "x; try --detach or --no-allow-numerical-error",
        {"remedies": {"detach": True, "allow_numerical_error": False}},
    ),
    "out: x; try precision='fp32'": (
        "--out: x; try --precision fp32", {"setting": "out", "remedies": {"precision": "fp32"}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("message", ERRORS)
def test_an_error_writes_settings_as_python_or_as_the_command_line(message: str) -> None:
    on_the_command_line, settings = ERRORS[message]
    error = ConfigError("too small" if "too small" in message else "x", **settings)

    assert (str(error), error.describe(command_line_option)) == (message, on_the_command_line)


def test_settings_can_be_lists_and_an_empty_table_enables_what_is_optional() -> None:
    given = {
        "augment": {"scale": [0.5, 1.0]},
        "ema": {},
        "optimizer": {},
        "model": {"config": {}},
    }
    recipe = change_recipe(read_values("photos"), list(flatten(given)), "photos")

    assert recipe.augment.scale == (0.5, 1.0)
    assert recipe.ema is not None


def test_paths_images_and_arrays_give_the_predictions_of_the_command(
    bundle: Path, tmp_path: Path
) -> None:
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for path, color in zip(paths, ((200, 30, 60), (10, 90, 30)), strict=True):
        path.write_bytes(picture_bytes(color, kind="PNG"))

    images = [Image.open(path) for path in paths]
    arrays = np.stack([np.asarray(image) for image in images])
    shown = CliRunner().invoke(app, ["predict", str(bundle), *map(str, paths), "--json"])
    found = sopdeploy.predict(bundle, paths)

    assert [one.model_dump(mode="json") for one in found] == json.loads(shown.stdout)
    classes = [one.classes for one in found]

    for several in (map(str, paths), images, arrays, list(arrays)):
        assert [one.classes for one in sopdeploy.predict(bundle, several)] == classes

    for single in (paths[0], str(paths[0]), images[0], arrays[0]):
        assert [one.classes for one in sopdeploy.predict(bundle, single)] == classes[:1]

    (best,) = sopdeploy.predict(bundle, arrays[0], top_k=1)
    assert (best.image, len(best.classes)) == ("image 0", 1)


@pytest.mark.parametrize("name", ["2024-06-01", "true", "a # b"])
def test_a_folder_or_weight_file_is_never_a_toml_value(name: str) -> None:
    recipe = configure(read_changes(Path(name), None, TrainOptions(pretrained=name)))[0]

    assert str(getattr(recipe.data, "path", None)) == name
    assert recipe.start is not None
    assert str(recipe.start.weights) == name


def test_user_errors_are_sopdeploy_errors(bundle: Path) -> None:
    with pytest.raises(ConfigError, match="no training data"):
        sopdeploy.train()
    with pytest.raises(ConfigError, match=r"epoch: .* epochs"):
        sopdeploy.train(recipe="digits-plain", epoch=3)

    async def serve_in_a_loop() -> None:
        sopdeploy.serve(bundle)

    with pytest.raises(ConfigError, match="event loop"):
        asyncio.run(serve_in_a_loop())


PUBLIC_FUNCTIONS = [
    name for name in sopdeploy.__all__ if inspect.isfunction(getattr(sopdeploy, name))
]
PATHS = [
    (name, parameter.name)
    for name in PUBLIC_FUNCTIONS
    for parameter in inspect.signature(
        inspect.unwrap(getattr(sopdeploy, name))
    ).parameters.values()
    if parameter.annotation in (str | Path, str | Path | None)
]


@pytest.mark.parametrize(("name", "parameter"), PATHS)
def test_what_is_not_a_path_is_an_error_that_names_the_argument(
    name: str, parameter: str
) -> None:
    with pytest.raises(ConfigError, match=f"^{parameter}: "):
        getattr(sopdeploy, name)(**{parameter: object()})


@pytest.mark.parametrize(
    ("name", "arguments", "error"),
    [
        ("train", {"data": 5}, "data: "),
        ("train", {"data": {"kind": "digits"}}, "data: "),
        ("serve", {"bundles": 5}, "bundles: "),
        ("serve", {"bundles": ["bundle", 5]}, "bundles: "),
        ("create_model", {"name": "resnet20", "num_classes": 2.5}, "num_classes: "),
        ("list_models", {"pattern": None}, "pattern: "),
        ("dsop", {"taps": "layer2"}, "taps: "),
        ("dsop", {"taps": 5}, "taps: "),
    ],
)
def test_a_wrong_type_is_one_line(name: str, arguments: dict[str, Any], error: str) -> None:
    with pytest.raises(ConfigError) as raised:
        getattr(sopdeploy, name)(**arguments)

    assert str(raised.value).startswith(error)
    assert "\n" not in str(raised.value)


def test_numbers_of_numpy_and_other_paths_are_accepted(tmp_path: Path) -> None:
    assert sopdeploy.describe("resnet20", num_classes=np.int64(3)).num_classes == 3

    class Place:
        def __fspath__(self) -> str:
            return str(tmp_path)

    with pytest.raises(DataError, match="class folders"):
        sopdeploy.train(Place())  # type: ignore[arg-type]


@pytest.mark.parametrize("labels", [np.array(["a", "b"]), {"a": 0, "b": 1}.keys(), iter("ab")])
def test_several_values_may_be_an_array_or_a_set(tmp_path: Path, labels: Any) -> None:
    # The wrong argument is read after the others.
    with pytest.raises(ConfigError, match=r"^preprocess: "):
        sopdeploy.export_network(
            None,  # type: ignore[arg-type]
            training_only="aux",
            labels=labels,
            preprocess=None,  # type: ignore[arg-type]
            destination=tmp_path,
            name="net",
        )


@pytest.mark.parametrize("name", PUBLIC_FUNCTIONS)
def test_a_public_function_can_be_sent_to_another_process(name: str) -> None:
    # Raises an error for an object that is not found under its name.
    assert ForkingPickler.dumps(getattr(sopdeploy, name))


def test_importing_sopdeploy_is_light_and_serving_needs_no_torch() -> None:
    code = (
        "import sys, sopdeploy; first = sorted(sys.modules); sopdeploy.predict, sopdeploy.serve; "
        "print([n for n in ('torch', 'numpy', 'PIL', 'fastapi', 'pydantic') if n in first], "
        "[n for n in ('torch', 'torchvision', 'onnx', 'sklearn', 'timm', 'jinja2') if n in sys.modules], "
        "sopdeploy.layers.ISqrtCov.__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )

    assert done.stdout == "[] [] ISqrtCov\n"
