"""What a plug-in or a process registers: names, wrong objects, and modules that cannot be imported."""

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
from typer.testing import CliRunner, Result

import sopdeploy
from sopdeploy.base import plugins
from sopdeploy.bundle.folder import Bundle
from sopdeploy.data.sources import DataSource
from sopdeploy.errors import ConfigError
from sopdeploy.layers.pooling.base import PoolingConfig
from sopdeploy.models.registry import entry
from sopdeploy.training.settings.recipe import read_recipe
from sopdeploy.weights.checkpoint import read_checkpoint
from sopdeploy_commands.app import app
from sopdeploy_service.inference.loader import load_model
from sopdeploy_service.runtime.choice import may_use_gpu
from sopdeploy_service.settings import load_settings
from tests.support.service import bundle, bundle_path  # noqa: F401

TESTS = Path(__file__).parents[2]
Install = Callable[[str], None]
MODULES = {
    "raises": "raise RuntimeError('first line\\nsecond line')",
    "exits": "raise SystemExit(3)",
    "wrong": "import sopdeploy\nsopdeploy.register_pooling(1)",
    "unnamed": "from sopdeploy.layers.pooling.registry import *\nregister_pooling(PoolingConfig)",
    "two_names": "from typing import Literal\nfrom sopdeploy.layers.pooling.registry import *\n"
    "class Two(PoolingConfig):\n    kind: Literal['a', 'b']\nregister_pooling(Two)",
    "works": "import sopdeploy\nsopdeploy.register_runtime('acme', print)",
    "weights": (TESTS / "plugins" / "text_weights.py").read_text(encoding="utf-8"),
    "runtime": (TESTS / "plugins" / "reference_runtime.py").read_text(encoding="utf-8")
    + "import sopdeploy\nsopdeploy.register_runtime('onnx-reference', ReferenceRuntime)\n",
}


@pytest.fixture(autouse=True)
def _own_registries(monkeypatch: pytest.MonkeyPatch) -> None:
    for registry in (
        *(plugins.MODELS, plugins.POOLINGS, plugins.DATA_SOURCES),
        *(plugins.RUNTIMES, plugins.IMPORTERS),
    ):
        monkeypatch.setattr(registry, "registered", {})


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`install(lines)` writes the metadata of a package that names these modules, and `MODULES`."""
    monkeypatch.setenv(plugins.VARIABLE, "on")
    monkeypatch.syspath_prepend(tmp_path)
    for module, text in MODULES.items():
        (tmp_path / f"{module}_plugin.py").write_text(text, encoding="utf-8")
        monkeypatch.delitem(sys.modules, f"{module}_plugin", raising=False)

    def write(lines: str) -> None:
        folder = tmp_path / "acme-2.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(
            "Metadata-Version: 2.1\nName: acme\nVersion: 2.0\n", "utf-8"
        )
        (folder / "entry_points.txt").write_text(
            f"[sopdeploy.plugins]\n{lines}\n", encoding="utf-8"
        )
        plugins.plugin_entry_points.cache_clear()

    yield write
    plugins.plugin_entry_points.cache_clear()


# Module of a plug-in: the error, or the registry and what it got
PROBLEMS = {
    "missing_plugin": "ModuleNotFoundError",
    "raises_plugin": "RuntimeError: first line",
    "exits_plugin": "SystemExit: 3",
    "wrong_plugin": "pooling: 1 ",
    "unnamed_plugin": "pooling PoolingConfig: ",
    "two_names_plugin": "pooling Two: ",
}


@pytest.mark.parametrize("module", PROBLEMS)
def test_a_plug_in_that_cannot_be_imported_is_one_line(
    module: str, install: Install, caplog: pytest.LogCaptureFixture
) -> None:
    install(f"broken = {module}")
    with pytest.raises(ConfigError, match=r"'unknown': .*acme 2\.0 ") as caught:
        entry("unknown")
    message = str(caught.value)

    assert PROBLEMS[module] in message
    assert "\n" not in message
    assert entry("resnet18").image_size == 224
    with caplog.at_level(logging.WARNING):
        result = CliRunner().invoke(app, ["models"])

    assert (result.exit_code, result.stderr) == (0, "")
    [warning] = [
        record.getMessage() for record in caplog.records if "acme" in record.getMessage()
    ]
    assert message.endswith(warning)
    assert "resnet18" in result.stdout


def test_a_broken_plug_in_does_not_hide_another_one(install: Install) -> None:
    install("broken = raises_plugin\nworks = works_plugin")

    assert load_settings(runtime="acme").runtime == "acme"
    with pytest.raises(ConfigError, match=r"'other': .*acme 2\.0"):
        load_settings(runtime="other")


def test_a_name_that_another_module_has_registered_is_an_error(install: Install) -> None:
    install("works = works_plugin")
    sopdeploy.register_runtime("acme", load_settings)
    problems = plugins.import_plugins()
    [problem] = problems

    assert "runtime 'acme': sopdeploy_service.settings " in problem

    sopdeploy.register_runtime("acme", load_settings)  # the same module again, as in a notebook


def import_line(path: Path, model: str = "resnet8") -> Result:
    out = path.with_name("imported.pt")
    return CliRunner().invoke(app, ["import", str(path), "--as", model, "--out-file", str(out)])


def test_an_outside_package_imports_the_files_of_its_project(
    install: Install, tmp_path: Path
) -> None:
    network = sopdeploy.create_model("resnet8", num_classes=3)
    path = tmp_path / "weights.txt"
    lines = [
        f"{name} {' '.join(map(str, tensor.shape))}"
        for name, tensor in network.state_dict().items()
    ]
    path.write_text("\n".join(["ACME-WEIGHTS", *lines]), encoding="utf-8")
    before = import_line(path)

    assert (before.exit_code, len(before.stderr.splitlines())) == (2, 1)
    install("weights = weights_plugin")
    result = import_line(path)
    assert (result.exit_code, result.stderr) == (0, "")

    found = read_checkpoint(tmp_path / "imported.pt")
    assert (found.model, len(found.labels)) == ("resnet8", 3)
    assert all(float(tensor.sum()) == 0.0 for tensor in found.weights.values())


def test_a_checkpoint_names_the_outside_packages_of_its_network(install: Install) -> None:
    install("weights = weights_plugin")
    (point,) = plugins.installed_plugins()
    importer = vars(point.load())["TextWeights"]()

    assert plugins.plugin_versions(
        [importer, network := sopdeploy.create_model("resnet8")]
    ) == {"acme": "2.0"}
    assert plugins.plugin_versions([network]) == {}


def test_plug_ins_that_are_switched_off_are_not_found(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("works = works_plugin")
    monkeypatch.setenv(plugins.VARIABLE, "off")

    with pytest.raises(ConfigError, match=r"runtime: .*choose from"):
        load_settings(runtime="acme")
    # Of this wheel, so it is not a plug-in
    assert plugins.MODELS.find("lrbp-vgg16") is not None


def test_an_outside_package_adds_a_runtime_in_one_file(
    install: Install,
    bundle: Bundle,  # noqa: F811
) -> None:
    install("runtime = runtime_plugin")
    loaded = load_model(bundle.path, load_settings(runtime="onnx-reference"))

    assert loaded.runtime.name.startswith("onnx-reference")
    assert Path(bundle.onnx).read_bytes() == bundle.onnx.read()
    assert may_use_gpu(load_settings(runtime="onnx-reference")) is False
    with pytest.raises(ConfigError, match="devices=cpu"):
        load_settings(runtime="onnx-reference", devices="0")


# Of each registry: how a user meets it, the name
UNKNOWN: dict[str, tuple[Callable[[], object], str]] = {
    "network": (lambda: entry("resnet19"), "resnet18"),
    "pooling": (lambda: sopdeploy.create_model("resnet8", pooling="isqtr"), "isqrt"),
    "data source": (lambda: read_recipe("digits-plain", ["data.kind=digit"]), "digits"),
    "runtime": (lambda: load_settings(runtime="openvin"), "openvino"),
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_an_unknown_name_of_a_registry_names_the_nearest_one(kind: str) -> None:
    use, nearest = UNKNOWN[kind]
    with pytest.raises(ConfigError, match=rf"\b{nearest}\b"):
        use()


class Digits(DataSource):
    kind: Literal["digits"]


class Isqrt(PoolingConfig):
    kind: Literal["isqrt"] = "isqrt"


def test_what_is_registered_does_not_replace_what_the_project_has() -> None:
    sopdeploy.register_data_source(Digits)
    sopdeploy.register_pooling(Isqrt)
    recipe = read_recipe("digits-plain", ["model.config.pooling=isqrt"])

    assert not isinstance(recipe.data, Digits)

    network = sopdeploy.create_model(recipe.model.name, **recipe.model.config)
    assert not isinstance(network.config.pooling, Isqrt)
