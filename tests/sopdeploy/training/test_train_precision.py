"""Precision, accumulation, layout and compiler: what may be switched without another run coming out."""

from functools import partial
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from sopdeploy.checkpoint import build_classifier, read_checkpoint
from sopdeploy.errors import ConfigError, TrainingError
from sopdeploy.training.distributed.batch_sharding import shard_step
from sopdeploy.training.distributed.strategy import SingleProcess
from sopdeploy.training.loop import compute_gradient, train
from sopdeploy.training.precision import MAX_SKIPPED_STEPS, Precision
from sopdeploy.training.signals import TrainingStoppedError
from tests.sopdeploy.training.runs import RecordingCallback, same_run, short_recipe

pytestmark = pytest.mark.usefixtures("few_digits")

CPU = torch.device("cpu")
ONE = ("epochs=1",)
COMBINATIONS = list(product(["fp32", "bf16", "fp16"], [False, True], [False, True]))


def run_and_look(folder, *overrides: str) -> None:
    result = train(short_recipe(*ONE, *overrides), folder)
    for path in (result.best, result.last):
        checkpoint = read_checkpoint(path)
        names = [*checkpoint.weights, *(checkpoint.resume or {}).get("weights", {})]
        assert not [name for name in names if "module." in name or "_orig_mod." in name]
        assert {str(t.dtype) for t in checkpoint.weights.values()} <= {"torch.float32", "torch.int64"}
        build_classifier(checkpoint, path)


@pytest.mark.parametrize(("precision", "averaged", "channels_last"), COMBINATIONS)
def test_any_combination_ends_with_plain_float32_weights(
    tmp_path, precision, averaged, channels_last
) -> None:
    switches = [f"precision='{precision}'", f"channels_last={str(channels_last).lower()}"]
    run_and_look(tmp_path / "run", *switches, *(["ema={}"] if averaged else []), "accumulate=2")


@pytest.mark.parametrize(("precision", "averaged"), list(product(["fp32", "bf16"], [False, True])))
def test_a_wrapped_network_leaves_the_same_kind_of_checkpoint(
    tmp_path, monkeypatch, precision, averaged
) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # traces, compiles nothing
    switches = ["compile=true", f"precision='{precision}'", *(["ema={}"] if averaged else [])]
    run_and_look(tmp_path / "run", *switches)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_compiled_network_learns_and_leaves_the_same_kind_of_checkpoint(tmp_path, precision) -> None:
    run_and_look(tmp_path / "run", "compile=true", f"precision='{precision}'", "ema={}")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_run_in_half_precision_is_resumed_bit_for_bit_with_its_scale(tmp_path, precision) -> None:
    recipe = short_recipe(f"precision='{precision}'", "epochs=2")
    train(recipe, tmp_path / "whole")
    with pytest.raises(TrainingStoppedError):
        train(recipe, tmp_path / "stopped", callback=RecordingCallback(("step", 1, 2)))
    train(recipe, tmp_path / "stopped", resume=True)
    assert same_run(tmp_path / "stopped", tmp_path / "whole")


def step_with(precision: Precision, weight: nn.Parameter, gradient: float) -> bool:
    """Do one step of SGD whose gradient is *gradient*; return whether it was done."""
    optimizer = torch.optim.SGD([weight], lr=1.0)
    precision.scaler.scale((weight * gradient).sum()).backward()
    precision.scaler.unscale_(optimizer)
    assert weight.grad is not None
    return precision.step(optimizer, finite=bool(weight.grad.isfinite().all()))


def test_a_step_whose_gradient_overflows_is_left_out_and_the_scale_halved() -> None:
    precision, weight = Precision("fp16", CPU), nn.Parameter(torch.zeros(1))
    assert not step_with(precision, weight, float("inf"))
    assert weight.item() == 0.0
    assert precision.state_dict()["scaler"]["scale"] == 2.0**15
    weight.grad = None
    again = Precision("fp16", CPU)
    again.load_state_dict(precision.state_dict())
    assert again.state_dict() == precision.state_dict()
    assert again.skipped == 1
    assert step_with(again, weight, 0.5)
    assert weight.item() == -0.5
    assert again.skipped == 0


def test_too_many_steps_left_out_in_a_row_are_an_error() -> None:
    precision, weight = Precision("fp16", CPU), nn.Parameter(torch.zeros(1))
    for _ in range(MAX_SKIPPED_STEPS - 1):
        assert not step_with(precision, weight, float("nan"))
        weight.grad = None
    with pytest.raises(TrainingError, match=f"overflowed float16 in {MAX_SKIPPED_STEPS} steps in a row"):
        step_with(precision, weight, float("nan"))


class Pieces(nn.Module):
    """A network that couples no samples."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 3)
        self.sizes: list[int] = []

    def forward(self, images: torch.Tensor) -> Any:
        self.sizes.append(len(images))
        return self.fc(images.flatten(1))

    def loss_weights(self) -> dict[str, float]:
        return {"main": 1.0}


def gradient(accumulate: int, samples: int) -> tuple[torch.Tensor, float, list[int]]:
    torch.manual_seed(0)
    model = Pieces().double()
    run: Any = SimpleNamespace(
        recipe=SimpleNamespace(accumulate=accumulate, loss=SimpleNamespace(label_smoothing=0.1)),
        precision=Precision("fp32", CPU),
        strategy=SingleProcess(CPU),
        network=model,
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        teacher=None,
    )
    images = torch.randn(samples, 3, 2, 2, dtype=torch.float64)
    pieces = shard_step(range(samples), run.recipe, run.strategy).micro_batches
    loss = compute_gradient(run, (images, torch.arange(samples) % 3), pieces)
    assert model.fc.weight.grad is not None
    return model.fc.weight.grad, float(loss.total), model.sizes


@pytest.mark.parametrize(
    ("accumulate", "samples", "sizes"),
    [(2, 7, [4, 3]), (3, 7, [3, 2, 2]), (4, 7, [3, 2, 2]), (4, 2, [2]), (2, 1, [1])],
)
def test_pieces_of_unequal_size_give_the_gradient_of_the_whole(accumulate, samples, sizes) -> None:
    whole, loss, _ = gradient(1, samples)
    pieces, same_loss, seen = gradient(accumulate, samples)
    assert seen == sizes
    torch.testing.assert_close(pieces, whole)
    assert same_loss == pytest.approx(loss, rel=1e-6)


def test_more_pieces_than_pairs_of_samples_are_refused() -> None:
    with pytest.raises(ConfigError, match="accumulate: each micro-batch needs two samples"):
        short_recipe("batch_size=6", "accumulate=4")


def test_accumulation_changes_neither_the_order_nor_the_number_of_steps(tmp_path) -> None:
    callbacks = [RecordingCallback(), RecordingCallback()]
    for accumulate, callback in zip((1, 3), callbacks, strict=True):
        train(short_recipe(*ONE, f"accumulate={accumulate}"), tmp_path / str(accumulate), callback=callback)
    counts = [len([what for what, _ in callback.events if what == "step"]) for callback in callbacks]
    assert counts == [6, 6]
