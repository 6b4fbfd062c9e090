"""The training loss and its parts."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from sopdeploy import create_model
from sopdeploy.models.base import TrainingOutput
from sopdeploy.training.losses import training_loss
from sopdeploy.training.precision import first_non_finite

LABELS = torch.tensor([0, 2, 1, 1])
NAN = torch.tensor(float("nan"))


def logits(seed: int) -> torch.Tensor:
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))


def test_the_loss_of_a_plain_network_is_its_cross_entropy() -> None:
    loss = training_loss(logits(0), LABELS, {"main": 1.0})
    assert torch.equal(loss.total, cross_entropy(logits(0), LABELS))
    assert list(loss.parts) == ["main"]


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


def test_the_loss_of_dsop_reaches_every_parameter() -> None:
    torch.manual_seed(0)
    model = create_model("dsop-resnet8", num_classes=3, base_width=4)
    loss = training_loss(model(torch.randn(4, 3, 16, 16)), LABELS, model.loss_weights())
    assert set(model.loss_weights()) == set(loss.parts)
    loss.total.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert not any(part.requires_grad for part in loss.parts.values())


@pytest.mark.parametrize("damaged", [None, "main", "low", "high", "balance"])
def test_the_non_finite_part_is_named(damaged) -> None:
    heads = {head: logits(0) * (NAN if head == damaged else 1) for head in ("main", "low", "high")}
    penalties = {"balance": NAN if damaged == "balance" else torch.tensor(1.0)}
    output = TrainingOutput(heads.pop("main"), heads, penalties)
    loss = training_loss(output, LABELS, dict.fromkeys(("main", "low", "high"), 1.0))
    assert first_non_finite([*loss.parts.items(), ("total", loss.total)]) == damaged


def test_an_overflow_of_the_total_is_named() -> None:
    big = torch.tensor([[1e38, 0.0]])
    loss = training_loss(TrainingOutput(big, {"low": big}, {}), torch.tensor([1]), {"main": 3.0, "low": 3.0})
    assert first_non_finite([*loss.parts.items(), ("total", loss.total)]) == "total"
