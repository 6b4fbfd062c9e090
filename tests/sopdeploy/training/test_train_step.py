"""One step: precision, accumulation, memory layout, compilation, and the parts of the loss."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy

from sopdeploy.checkpoint import build_classifier, read_checkpoint
from sopdeploy.errors import TrainingError
from sopdeploy.models.base import TrainingOutput
from sopdeploy.training.precision import MAX_SKIPPED_STEPS, MixedPrecision
from sopdeploy.training.step.losses import training_loss
from sopdeploy.training.train import train_recipe
from tests.sopdeploy.training.distributed.cases import build_recipe, learn
from tests.sopdeploy.training.runs import interrupt, same_run, short_recipe

pytestmark = pytest.mark.usefixtures("few_digits")

CPU = torch.device("cpu")


def check_run(folder, *overrides: str) -> None:
    """Train one epoch; both checkpoints must hold plain float32 weights that can be loaded."""
    result = train_recipe(short_recipe("epochs=1", *overrides), folder)
    for path in (result.best, result.last):
        checkpoint = read_checkpoint(path)
        names = [*checkpoint.weights, *(checkpoint.resume or {}).get("weights", {})]
        assert not [name for name in names if "module." in name or "_orig_mod." in name]
        assert {str(t.dtype) for t in checkpoint.weights.values()} <= {"torch.float32", "torch.int64"}
        build_classifier(checkpoint, path)


EMA = "ema={}"


@pytest.mark.parametrize(
    ("layout", "precision", "ema"),
    [("channels_last=true", "fp16", EMA), ("channels_last=false", "bf16", ""), ("compile=true", "bf16", EMA)],
)
def test_any_combination_ends_with_plain_float32_weights(
    tmp_path, monkeypatch, layout, precision, ema
) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    with torch.compiler.set_stance("force_eager"):  # wraps the network without tracing it
        check_run(tmp_path / "run", layout, f"precision='{precision}'", "accumulate=2", *filter(None, [ema]))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_run_in_half_precision_is_resumed_bit_for_bit(tmp_path, precision) -> None:
    recipe = short_recipe(f"precision='{precision}'", "epochs=2")
    train_recipe(recipe, tmp_path / "whole")
    interrupt(recipe, tmp_path / "stopped", "step", 1, 2)
    train_recipe(recipe, tmp_path / "stopped", resume=True)
    assert same_run(tmp_path / "stopped", tmp_path / "whole")


def run_step(precision: MixedPrecision, weight: nn.Parameter, gradient: float) -> bool:
    """Run one step of SGD with *gradient*; return whether the weight was updated."""
    optimizer = torch.optim.SGD([weight], lr=1.0)
    precision.scaler.scale((weight * gradient).sum()).backward()
    precision.scaler.unscale_(optimizer)
    assert weight.grad is not None
    return precision.step(optimizer, finite=bool(weight.grad.isfinite().all()))


def test_a_step_with_an_overflow_is_skipped_and_the_scale_halved() -> None:
    precision, weight = MixedPrecision("fp16", CPU), nn.Parameter(torch.zeros(1))
    assert not run_step(precision, weight, float("inf"))
    assert weight.item() == 0.0
    assert precision.state_dict()["scaler"]["scale"] == 2.0**15
    weight.grad = None
    restored = MixedPrecision("fp16", CPU)
    restored.load_state_dict(precision.state_dict())
    assert restored.state_dict() == precision.state_dict()
    assert restored.skipped == 1
    assert run_step(restored, weight, 0.5)
    assert weight.item() == -0.5
    assert restored.skipped == 0


def test_too_many_skipped_steps_in_a_row_are_an_error() -> None:
    precision, weight = MixedPrecision("fp16", CPU), nn.Parameter(torch.zeros(1))
    for _ in range(MAX_SKIPPED_STEPS - 1):
        assert not run_step(precision, weight, float("nan"))
        weight.grad = None
    with pytest.raises(TrainingError, match=f"overflowed float16 in {MAX_SKIPPED_STEPS} steps in a row"):
        run_step(precision, weight, float("nan"))


@pytest.mark.parametrize("optimizer", ["sgd", "adahessian"])
def test_micro_batches_of_unequal_size_give_the_step_of_the_whole_batch(optimizer) -> None:
    same = "batch_norm=frozen", "model.config.aux_dropout=0.0"
    whole, split = (
        learn(build_recipe("dsop", optimizer, *same, f"accumulate={count}"), 1) for count in (1, 3)
    )
    for name, tensor in whole.items():
        torch.testing.assert_close(split[name], tensor, rtol=1e-9, atol=1e-11)


LABELS = torch.tensor([0, 2, 1, 1])
NAN = torch.tensor(float("nan"))


def logits(seed: int) -> torch.Tensor:
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))


@given(
    weights=st.lists(st.floats(0, 100), min_size=3, max_size=3),
    smoothing=st.floats(0, 0.9),
    penalty=st.floats(0, 10),
)
def test_the_loss_is_the_weighted_sum_of_all_heads_and_penalties(weights, smoothing, penalty) -> None:
    branches = {"low": logits(1), "high": logits(2)}
    output = TrainingOutput(logits(0), branches, {"balance": torch.tensor(penalty)})
    named = dict(zip(("main", "low", "high"), weights, strict=True))
    loss = training_loss(output, LABELS, named, smoothing)
    expected = penalty + sum(
        weight * float(cross_entropy(logits(seed), LABELS, label_smoothing=smoothing))
        for seed, weight in enumerate(weights)
    )
    assert float(loss.total) == pytest.approx(expected, rel=1e-5)
    assert list(loss.parts) == ["main", "low", "high", "balance"]
