"""Weight files and builders of users: what is read, what is removed from names, and each error."""

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from sopdeploy.errors import CertificateError, ConfigError, WeightsError
from sopdeploy.files import read_class_names
from sopdeploy.images.preprocess import Preprocess
from sopdeploy_commands.app import app
from sopdeploy_commands.bundles.export import read_preprocess
from sopdeploy_export.user_network.loading import load_weights, network_builder
from tests.export.user_network.networks import Exits, Sketch, Small, export_small, trained

MODULE = "tests.export.user_network.networks"
STATE = trained(Small()).state_dict()


def prefixed(prefix: str) -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in STATE.items()}


READ: dict[str, tuple[Any, str | None, str]] = {
    "a state dict": (STATE, None, ""),
    "a training checkpoint of timm": (
        {"epoch": 3, "args": argparse.Namespace(lr=0.1), "state_dict": STATE},
        None,
        "state_dict",
    ),
    "an average beside the weights": (
        {"model": prefixed("x."), "model_ema": STATE},
        "model_ema",
        "model_ema",
    ),
    "data parallel and compiled": (prefixed("_orig_mod.module."), None, ""),
    "averaged": (prefixed("module.") | {"n_averaged": torch.tensor(3)}, None, ""),
}


@pytest.mark.parametrize("case", READ)
def test_a_table_is_found_and_prefixes_are_removed(case: str, tmp_path: Path) -> None:
    content, table, name = READ[case]
    torch.save(content, tmp_path / "w.pth")
    network = Small()
    assert load_weights(network, tmp_path / "w.pth", table)[0] == name
    assert all(torch.equal(value, STATE[key]) for key, value in network.state_dict().items())


def without(name: str) -> dict[str, torch.Tensor]:
    return {key: value for key, value in STATE.items() if key != name}


WRONG: dict[str, tuple[Any, str | None, str]] = {
    "a pickled module": (Small(), None, r"could run code; save the network's state_dict\(\) alone"),
    "two tables": (
        {"model": STATE, "model_ema": STATE},
        None,
        r"several tables of tensors \(model, model_ema\)",
    ),
    "another table": ({"model": STATE}, "ema", r"weights_key='ema': .* has only model"),
    "a table of a single one": (STATE, "model", r"is a single table of tensors; omit it"),
    "no table": ({"epoch": 3}, None, r"holds no table of tensors"),
    "a missing tensor": (without("fc.bias"), None, r"fc\.bias is missing; \d+ of \d+ tensors fit"),
    "an unknown tensor": (STATE | {"head.bias": torch.ones(1)}, None, r"the network has no head\.bias"),
    "another shape": (STATE | {"fc.bias": torch.ones(7)}, None, r"fc\.bias is \(7,\) in the file and \(4,\)"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_file_that_does_not_fit_is_rejected(case: str, tmp_path: Path) -> None:
    content, table, message = WRONG[case]
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=message):
        load_weights(Small(), tmp_path / "w.pth", table)


@pytest.mark.parametrize(
    ("import_path", "settings", "message"),
    [
        ("torch.nn", (), r"^network='torch\.nn': write package\.module:callable"),
        ("no_such_module:build", (), r"cannot be imported \(ModuleNotFoundError"),
        ("torch.nn:NoSuch", (), r"cannot be imported \(AttributeError"),
        ("torch.nn.functional:__name__", (), r"is a str, not a function or a class"),
        (f"{MODULE}:Small", ("width=3",), r"cannot be built \(TypeError"),
        ("builtins:dict", (), r"returned a dict, not a torch\.nn\.Module"),
        (f"{MODULE}:Small", ("aux",), r"^aux: write key=value"),
    ],
)
def test_a_builder_that_cannot_be_used_is_one_line(
    import_path: str, settings: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        network_builder("network", import_path, settings)()


def test_options_of_a_builder_are_toml_values_or_text() -> None:
    settings = ("aux=false", "depth=18", "widths=[8, 16]", "act=relu")
    built = network_builder("network", f"{MODULE}:Keeps", settings)()
    assert vars(built)["options"] == {"aux": False, "depth": 18, "widths": [8, 16], "act": "relu"}


PUBLISHED: dict[str, tuple[Any, Preprocess]] = {
    "timm": (
        Preprocess.from_timm({"input_size": (3, 224, 224), "crop_pct": 0.9, "interpolation": "bicubic"}),
        Preprocess(resize=248, crop=224, interpolation="bicubic"),
    ),
    "timm, squashed": (
        Preprocess.from_timm({"input_size": (3, 96, 96), "crop_pct": 1.0, "crop_mode": "squash"}),
        Preprocess(resize=96, crop=96, fit="squash"),
    ),
    "timm, padded with the mean color": (
        Preprocess.from_timm({"input_size": (3, 96, 96), "crop_mode": "border", "mean": (0.5, 0.4, 0.0)}),
        Preprocess(resize=96, crop=96, fit="pad", mean=(0.5, 0.4, 0.0), background=(128, 102, 0)),
    ),
}


@pytest.mark.parametrize("case", PUBLISHED)
def test_published_preprocessing_is_converted(case: str) -> None:
    found, expected = PUBLISHED[case]
    assert found == expected


@pytest.mark.parametrize("mode", ["squash", "border"])
def test_a_crop_after_squashing_or_padding_is_refused(mode: str) -> None:
    with pytest.raises(ConfigError, match=rf"crop_mode '{mode}' with crop_pct 0\.9 is not supported"):
        Preprocess.from_timm({"crop_mode": mode, "crop_pct": 0.9})


def test_preprocessing_of_torchvision_is_converted() -> None:
    models = pytest.importorskip("torchvision.models")
    found = Preprocess.from_torchvision(models.ResNet50_Weights.IMAGENET1K_V2.transforms())
    assert (found.resize, found.crop, found.interpolation) == (232, 224, "bilinear")
    with pytest.raises(ConfigError, match=r"does not resize and crop"):
        Preprocess.from_torchvision(nn.Identity())


@pytest.mark.parametrize("text", ["[" * 100_000, '{"resize": 0}', "x"])
def test_a_file_that_holds_no_preprocessing_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "rules.json").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"^preprocess='.*rules\.json': cannot be read \("):
        read_preprocess(str(tmp_path / "rules.json"))


def test_the_command_exports_a_weight_file_and_inspect_names_the_unused_part(tmp_path: Path) -> None:
    torch.save({"model": STATE}, tmp_path / "w.pth")
    (tmp_path / "names.txt").write_text("a\nb\nc\nd\n", encoding="utf-8")
    (tmp_path / "rules.json").write_text('{"resize": 12, "crop": 12}', encoding="utf-8")
    weights, rules = str(tmp_path / "w.pth"), ("--preprocess", str(tmp_path / "rules.json"))
    network = ("--network", f"{MODULE}:Small")
    inspected = CliRunner().invoke(app, ["inspect", weights, *network, *rules])
    assert inspected.exit_code == 0
    assert "unused   aux" in inspected.stdout
    out, labels = ("--out", str(tmp_path / "out")), ("--labels", str(tmp_path / "names.txt"))
    parts = ("--plain", f"{MODULE}:Small", "--plain-option", "aux=false", "--training-only", "aux*")
    exported = CliRunner().invoke(app, ["export", weights, *network, *parts, *labels, *rules, *out])
    assert exported.exit_code == 0, exported.output
    assert "trained = detached = plain" in exported.stdout
    assert (tmp_path / "out" / "latest").readlink().name.startswith("Small-")


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments)
    return f"{result.exit_code} {result.output}"


def test_the_command_that_inspect_prints_exports_without_the_exits_that_the_output_does_not_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(trained(Exits()).state_dict(), "w.pth")
    Path("labels.txt").write_text("a\nb\nc\nd\n", encoding="utf-8")
    Path("rules.json").write_text('{"resize": 12, "crop": 12}', encoding="utf-8")
    given = ("w.pth", "--network", f"{MODULE}:Exits", "--preprocess", "rules.json")
    assert "choose one as the logits: 0 (B, 4), 1.0 (B, 4), 1.1 (B, 4)" in run("inspect", *given)
    inspected = json.loads(CliRunner().invoke(app, ["inspect", *given, "--logits-key", "0", "--json"]).stdout)
    assert inspected["unused"] == ["heads.0", "heads.1"], "the code reads the length of `heads`"
    proposed = run("export", *given, "--logits-key", "0", "--detach", "--labels", "labels.txt")
    assert "add --training-only heads.0 --training-only heads.1" in proposed
    exported = run(*shlex.split(inspected["command"])[1:])
    assert exported.startswith("0 ")
    assert "removed  heads.0, heads.1 (4 tensors" in exported
    assert "trained = detached = rebuilt: equal graphs" in exported
    assert "no plain network was given" in exported


def test_a_builder_that_draws_what_the_weight_file_does_not_hold_is_refused(tmp_path: Path) -> None:
    network = trained(Sketch())
    torch.save(network.state_dict(), tmp_path / "w.pth")
    with pytest.raises(CertificateError, match=r"signs differs from the plain network's"):
        export_small(network, tmp_path / "out", rebuild=Sketch)


@pytest.mark.parametrize("name", ["names.txt", "names.json"])
def test_a_byte_order_mark_is_no_part_of_the_first_class_name(tmp_path: Path, name: str) -> None:
    text = {"names.txt": "cat\r\ndog\r\n", "names.json": '["cat", "dog"]'}[name]
    (tmp_path / name).write_bytes(text.encode("utf-8-sig"))
    assert read_class_names(tmp_path / name) == ("cat", "dog")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--labels", "names.txt"), "--labels: only for a network of your own; try --network"),
        (("--network", f"{MODULE}:Small"), "--labels: missing"),
    ],
)
def test_options_that_do_not_fit_together_are_one_line(
    arguments: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    result = CliRunner().invoke(app, ["export", str(tmp_path / "w.pth"), *arguments])
    assert result.exit_code == 2
    assert message in result.output
