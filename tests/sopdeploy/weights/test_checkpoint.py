"""Checkpoints: round trips, atomic writes and rejected content."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sopdeploy.base.files import atomic_write, expand_user
from sopdeploy.errors import CheckpointError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.models.registry import create_model
from sopdeploy.weights import checkpoint as module
from sopdeploy.weights.checkpoint import (
    Checkpoint,
    build_classifier,
    read_checkpoint,
    write_checkpoint,
)
from sopdeploy.weights.tensor_files import load_plain
from tests.sopdeploy.training.runs import same_bits

WHERE = Path("ckpt.pt")


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    torch.manual_seed(3)
    return create_model("dsop-resnet8", num_classes=3, base_width=4).state_dict()


@pytest.fixture
def checkpoint(weights: dict[str, Tensor]) -> Checkpoint:
    return Checkpoint(
        model="dsop-resnet8",
        config={"base_width": 4},
        weights=dict(weights),
        labels=("ant", "bee", "çat [x] 🐈"),
        preprocess=Preprocess(
            resize=18, crop=16, interpolation="bicubic", background=(1, 2, 3)
        ),
        training={
            "epoch": 3,
            "best": {"top1": 0.5},
            "seed": 7,
            "none": None,
            "list": [1, 2.5, "x"],
        },
    )


def rewritten(
    path: Path, checkpoint: Checkpoint, change: Callable[[dict[str, Any]], object]
) -> Path:
    """Write *checkpoint*, apply *change* to its content and save it with torch."""
    write_checkpoint(path, checkpoint)
    content = load_plain(path, path.read_bytes())
    change(content)
    torch.save(content, path)
    return path


def test_a_checkpoint_is_read_as_it_was_written(tmp_path: Path, checkpoint: Checkpoint) -> None:
    path = tmp_path / "deep" / "run" / "ckpt.pt"
    write_checkpoint(path, checkpoint)
    found = read_checkpoint(path)

    assert same_bits(found.weights, checkpoint.weights)
    assert replace(found, weights={}) == replace(checkpoint, weights={})
    assert found.resume is None

    momentum = {"state": {0: {"momentum": torch.randn(5)}}}
    resume = {"optimizer": momentum, "random": torch.get_rng_state(), "n": 3}
    write_checkpoint(path, replace(checkpoint, resume=resume, training={"epoch": 2}))

    assert same_bits(read_checkpoint(path).resume, resume)
    assert read_checkpoint(path).training == {"epoch": 2}
    assert [file.name for file in path.parent.iterdir()] == ["ckpt.pt"]


Change = Callable[[dict[str, Any]], object]

HEADERS: dict[str, tuple[Change, str]] = {
    "no format": (lambda c: c.pop("format"), "not a sopdeploy checkpoint"),
    "a newer version": (lambda c: c.update(version=2), "version: "),
    "an extra key": (lambda c: c.update(extra=1), "extra: "),
    "an extra key, and a list as its version": (
        lambda c: c.update(extra=1, training={"versions": {"sopdeploy": []}}),
        "extra: ",
    ),
    "duplicate labels": (lambda c: c.update(labels=["a", "b", "a"]), "labels: "),
    "too few thresholds": (
        lambda c: c.update(decision={"activation": "sigmoid", "thresholds": [0.5]}),
        "1 thresholds for 3 classes",
    ),
    "a crop larger than resize": (
        lambda c: c["preprocess"].update(crop=99),
        r"crop \(99\) is larger",
    ),
    "a number among the weights": (
        lambda c: c["weights"].update(bias=3),
        "weights.bias: .*Tensor",
    ),
}


@pytest.mark.parametrize("case", HEADERS)
def test_invalid_content_is_rejected(tmp_path: Path, checkpoint: Checkpoint, case: str) -> None:
    change, message = HEADERS[case]
    path = rewritten(tmp_path / "ckpt.pt", checkpoint, change)

    with pytest.raises(CheckpointError, match=message) as caught:
        read_checkpoint(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


OVERSIZED = {
    "any width": ("dsop-resnet8", {"base_width": 100}, "more weights than the file"),
    "any number of blocks": (
        "srsop-resnet18",
        {"blocks_per_stage": 3000},
        "more weights than the file",
    ),
    "a width without a size in bytes": ("dsop-resnet8", {"base_width": 10**18}, "Storage size"),
}


@pytest.mark.parametrize(("model", "config", "message"), OVERSIZED.values(), ids=OVERSIZED)
def test_a_network_that_its_file_cannot_fill_is_not_built(
    checkpoint: Checkpoint,
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    config: dict[str, int],
    message: str,
) -> None:
    monkeypatch.setattr(module, "_MORE_NUMBERS", 10_000)
    monkeypatch.setattr(module, "_MORE_PARAMETERS", 10)
    assert build_classifier(checkpoint, WHERE)

    with pytest.raises(CheckpointError, match=f"{WHERE}: {model}.*{message}"):
        build_classifier(replace(checkpoint, model=model, config=config), WHERE)


def with_weight(name: str, value: Tensor) -> Change:
    return lambda weights: weights.update({name: value})


def last_value(name: str, value: float) -> Change:
    def change(weights: dict[str, Any]) -> None:
        weights[name] = weights[name].clone()
        weights[name].view(-1)[-1] = value

    return change


WEIGHTS: dict[str, tuple[Change, str]] = {
    "a missing tensor": (lambda w: w.pop("fc.weight"), "fc.weight is missing"),
    "an unknown tensor": (with_weight("zzz.weight", torch.ones(2)), "zzz.weight"),
    "another shape": (with_weight("fc.bias", torch.ones(4)), r"fc\.bias is \(4,\), not \(3,\)"),
    "not a number": (last_value("fc.weight", float("nan")), r"fc\.weight .*not finite"),
    "another dtype": (with_weight("fc.bias", torch.ones(3).double()), "float64 strided"),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_wrong_weights_are_rejected_by_name(checkpoint: Checkpoint, case: str) -> None:
    change, message = WEIGHTS[case]
    change(checkpoint.weights)

    with pytest.raises(CheckpointError, match=message) as caught:
        build_classifier(checkpoint, WHERE)
    assert str(caught.value).startswith("ckpt.pt: ")


MODELS: dict[str, tuple[str, Any, str]] = {
    "an unknown name": ("model", "dsop-resnet9", "did you mean dsop-resnet"),
    "an unknown config key": ("config", {"widht": 4}, "widht"),
    "a list as kind": ("config", {"pooling": {"kind": []}}, r"pooling.*'\[\]'"),
    "another number of labels": ("labels", ("a", "b"), r"is \(3, .*, not \(2,"),
}


@pytest.mark.parametrize("case", MODELS)
def test_unknown_networks_and_configs_are_rejected(checkpoint: Checkpoint, case: str) -> None:
    field, value, message = MODELS[case]

    with pytest.raises(CheckpointError, match=message) as caught:
        build_classifier(replace(checkpoint, **{field: value}), WHERE)
    assert "\n" not in str(caught.value)


def test_a_file_is_replaced_after_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("before")
    with atomic_write(path) as partial:
        partial.write_text("after")
        assert partial.parent == tmp_path
        assert path.read_text() == "before"

    assert path.read_text() == "after"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("problem", [OSError("full"), KeyboardInterrupt()])
def test_an_error_keeps_the_old_file(tmp_path: Path, problem: BaseException) -> None:
    path = tmp_path / "a.csv"
    path.write_text("before")
    with suppress(OSError, KeyboardInterrupt), atomic_write(path) as partial:
        partial.write_text("half")
        raise problem

    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_the_home_of_an_unknown_user_is_not_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    paths = {"~/a": "/home/ann/a", "~nobody-here/a": "~nobody-here/a", "a/~": "a/~"}

    assert {path: str(expand_user(path)) for path in paths} == paths
