"""The Python API gives the results of the command line, with the same defaults."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import sopdeploy
from sopdeploy.cli.app import app
from sopdeploy.client import Client
from sopdeploy.commands.train import TrainOptions, configure
from sopdeploy.errors import (
    ConfigError,
    DataError,
    SopdeployError,
    command_line_option,
)
from sopdeploy.training.recipe import change_recipe, flatten
from sopdeploy.training.train import TrainingResult
from sopdeploy_export.results import Exported
from tests.export.once import proving_once
from tests.service.children import serving

SETTINGS: dict[str, Any] = {
    "epochs": 1,
    "batch_size": 4,
    "preprocess": {"resize": 9, "crop": 8},
    "model": {"name": "dsop-resnet8", "config": {"base_width": 2}},
}


def command(*arguments: object) -> Any:
    """Run a command with --json and return its output."""
    done = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert (done.exit_code, done.stderr) == (0, ""), done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write four images of each of two classes."""
    root, rng = tmp_path_factory.mktemp("data") / "photos", np.random.default_rng(0)
    for label in ("ant", "bee"):
        (root / label).mkdir(parents=True)
        for number in range(4):
            pixels = rng.integers(0, 256, (12, 14, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / label / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainingResult:
    return sopdeploy.train(photos, "photos-dsop", tmp_path_factory.mktemp("api") / "run", **SETTINGS)


@pytest.fixture(scope="module")
def exported(run: TrainingResult, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    with proving_once():
        return sopdeploy.export(run.best, tmp_path_factory.mktemp("bundles"), detach=True, max_batch=1)


@pytest.fixture(scope="module")
def bundle(exported: Exported) -> Path:
    return exported.path


def test_the_same_error_names_arguments_in_python_and_options_on_the_command_line() -> None:
    with pytest.raises(ConfigError, match=r"^max_batch: Input should be greater than or equal to 1"):
        sopdeploy.export("ckpt.pt", max_batch=0)
    error = CliRunner().invoke(app, ["export", "ckpt.pt", "--max-batch", "0"])
    assert (error.exit_code, error.stdout, error.stderr.count("\n")) == (2, "", 1)
    assert "--max-batch: Input should be greater than or equal to 1" in error.stderr


ERRORS = {
    "max_batch=0: too small": ("--max-batch 0: too small", {"setting": "max_batch", "value": 0}),
    "x; try detach=True or pt2=False": (
        "x; try --detach or --no-pt2", {"remedies": {"detach": True, "pt2": False}},
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


def test_settings_can_be_lists() -> None:
    recipe = change_recipe("photos", list(flatten({"augment": {"scale": [0.5, 1.0]}})))
    assert recipe.augment.scale == (0.5, 1.0)


def test_an_empty_table_enables_what_is_optional() -> None:
    given = list(flatten({"ema": {}, "optimizer": {}, "model": {"config": {}}}))
    assert given == [("ema", {})]
    assert change_recipe("digits-dsop", given).ema is not None


def test_paths_images_and_arrays_give_the_predictions_of_the_command_and_of_a_server(
    bundle: Path, photos: Path
) -> None:
    paths = sorted(photos.rglob("*.png"))[::3]
    images = [Image.open(path) for path in paths]
    arrays = np.stack([np.asarray(Image.open(path)) for path in paths])
    expected = command("predict", bundle, *paths)
    found = sopdeploy.predict(bundle, paths)
    assert [one.model_dump(mode="json") for one in found] == expected
    classes = [one.classes for one in found]
    for several in (map(str, paths), images, arrays, list(arrays)):
        assert [one.classes for one in sopdeploy.predict(bundle, several)] == classes
    for single in (paths[0], str(paths[0]), images[0], arrays[0]):
        assert [one.classes for one in sopdeploy.predict(bundle, single)] == classes[:1]
    (best,) = sopdeploy.predict(bundle, arrays[0], top_k=1)
    assert (best.image, len(best.classes)) == ("image 0", 1)
    with serving(str(bundle), "--threads", "1") as http, Client(str(http.base_url)) as client:
        answer = client.classify(paths[0])
    assert [(one.label, one.probability) for one in answer.classes] == [
        (one.label, pytest.approx(one.probability, abs=1e-6)) for one in classes[0]
    ]


BAD_IMAGES = {
    "float pixels": np.zeros((8, 8, 3)),
    "channels first": np.zeros((3, 8, 8), dtype=np.uint8),
    "another type": [b"bytes"],
    "a missing file": "missing.jpg",
}


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_what_is_no_image_is_one_error_line(case: str, bundle: Path) -> None:
    with pytest.raises(DataError, match=r"^(image 0|missing\.jpg): [^\n]*give|cannot be read"):
        sopdeploy.predict(bundle, BAD_IMAGES[case])


@pytest.mark.parametrize("name", ["2024-06-01", "true", "a # b"])
def test_a_folder_or_weight_file_is_a_name_and_never_a_toml_value(name: str) -> None:
    recipe = configure(name, None, TrainOptions(weights=name))[0]
    assert str(getattr(recipe.data, "path", None)) == name
    assert recipe.start is not None
    assert str(recipe.start.weights) == name


def test_user_errors_are_sopdeploy_errors(bundle: Path, photos: Path, tmp_path: Path) -> None:
    calls: dict[str, tuple[type[SopdeployError], Callable[[], Any]]] = {
        "no training data": (ConfigError, sopdeploy.train),
        "epoch: unknown key; did you mean epochs": (
            ConfigError, lambda: sopdeploy.train(recipe="digits-plain", epoch=3),
        ),
    }  # fmt: skip
    for message, (kind, call) in calls.items():
        with pytest.raises(kind, match=message):
            call()

    async def serve_in_a_loop() -> None:
        sopdeploy.serve(bundle)

    with pytest.raises(ConfigError, match="an event loop runs in this thread"):
        asyncio.run(serve_in_a_loop())


def test_importing_sopdeploy_is_light_and_serving_needs_no_torch() -> None:
    code = (
        "import sys, sopdeploy; first = sorted(sys.modules); sopdeploy.predict, sopdeploy.serve; "
        "print([n for n in ('torch', 'numpy', 'PIL', 'fastapi', 'pydantic') if n in first], "
        "[n for n in ('torch', 'torchvision', 'onnx', 'sklearn', 'timm', 'jinja2') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[] []\n"
