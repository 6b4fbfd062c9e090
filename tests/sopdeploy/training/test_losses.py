import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from sopdeploy import create_model
from sopdeploy.models.base import TrainingOutput
from sopdeploy.training.losses import first_not_finite, training_loss

LABELS = torch.tensor([0, 2, 1, 1])


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
def test_the_loss_is_the_weighted_sum_of_all_heads_and_the_penalties(weights, smoothing, penalty) -> None:
    output = TrainingOutput(
        logits(0), {"low": logits(1), "high": logits(2)}, {"balance": torch.tensor(penalty)}
    )
    named = dict(zip(("main", "low", "high"), weights, strict=True))
    loss = training_loss(output, LABELS, named, smoothing)
    expected = penalty + sum(
        weight * float(cross_entropy(logits(seed), LABELS, label_smoothing=smoothing))
        for seed, weight in enumerate(weights)
    )
    assert float(loss.total) == pytest.approx(expected, rel=1e-5)
    assert list(loss.parts) == ["main", "low", "high", "balance"]


def test_every_weight_of_a_dsop_network_is_for_a_head_it_has_and_every_parameter_learns() -> None:
    torch.manual_seed(0)
    model = create_model("dsop-resnet8", num_classes=3, base_width=4)
    output = model(torch.randn(4, 3, 16, 16))
    loss = training_loss(output, LABELS, model.loss_weights())
    assert set(model.loss_weights()) == set(loss.parts)
    loss.total.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert not any(part.requires_grad for part in loss.parts.values())


BAD = torch.tensor(float("nan"))


@pytest.mark.parametrize(
    ("spoilt", "name"),
    [(None, None), ("main", "main"), ("low", "low"), ("high", "high"), ("balance", "balance")],
)
def test_the_part_that_is_not_finite_is_named(spoilt, name) -> None:
    heads = {head: logits(0) * (BAD if head == spoilt else 1) for head in ("main", "low", "high")}
    output = TrainingOutput(
        heads.pop("main"), heads, {"balance": BAD if spoilt == "balance" else torch.tensor(1.0)}
    )
    weights = dict.fromkeys(("main", "low", "high"), 1.0)
    assert first_not_finite(training_loss(output, LABELS, weights)) == name


def test_a_sum_that_overflows_is_named_too() -> None:
    big = torch.tensor([[1e38, 0.0]])
    output = TrainingOutput(big, {"low": big}, {})
    loss = training_loss(output, torch.tensor([1]), {"main": 3.0, "low": 3.0})
    assert first_not_finite(loss) == "the sum"
