"""One step: precision, accumulation, memory layout, compilation, and the parts of the loss."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from sopdeploy.checkpoint import build_classifier, read_checkpoint
from sopdeploy.models.base import TrainingOutput
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
    [("channels_last=true", "fp32", EMA), ("channels_last=false", "bf16", ""), ("compile=true", "bf16", EMA)],
)
def test_any_combination_ends_with_plain_float32_weights(
    tmp_path, monkeypatch, layout, precision, ema
) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    with torch.compiler.set_stance("force_eager"):  # wraps the network without tracing it
        check_run(tmp_path / "run", layout, f"precision='{precision}'", "accumulate=2", *filter(None, [ema]))


def test_a_run_in_bfloat16_is_resumed_bit_for_bit(tmp_path) -> None:
    recipe = short_recipe("precision='bf16'", "epochs=2")
    train_recipe(recipe, tmp_path / "whole")
    interrupt(recipe, tmp_path / "stopped", "step", 1, 2)
    train_recipe(recipe, tmp_path / "stopped", resume=True)
    assert same_run(tmp_path / "stopped", tmp_path / "whole")


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
