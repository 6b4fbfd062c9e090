"""The sparse gate, its noise and its balance loss."""

import pytest
import torch
from torch import nn

from sopdeploy.layers.mixture.gate import GateNoise, SparseGate, balance_loss, keep_largest, rank

F64 = torch.float64


def test_rank_is_that_of_a_stable_sort() -> None:
    torch.manual_seed(0)
    logits = torch.randint(-3, 3, (64, 16)).float()
    order = torch.sort(logits, dim=1, descending=True, stable=True).indices
    assert torch.equal(rank(logits).long(), order.argsort(dim=1))


def test_kept_weights_are_the_softmax_over_the_kept_alone() -> None:
    weights = keep_largest(torch.tensor([[-1.0, 0.0, 2.0, -5.0]], dtype=F64), 2)  # 0 counts
    expected = torch.tensor([[-1.0, 0.0, 2.0, -5.0]], dtype=F64).exp()
    expected = expected * torch.tensor([0, 1, 1, 0]) / (expected[0, 1] + expected[0, 2])
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-15)
    assert weights[0, 0] == 0
    assert weights[0, 3] == 0


@pytest.mark.parametrize(("per", "draws"), [("image", 1), ("component", 4)])
def test_noise_draws_one_gamma_per_image_or_per_component(per: str, draws: int) -> None:
    torch.manual_seed(0)
    noise = GateNoise(6, 4, per)  # type: ignore[arg-type]
    feature = torch.rand(3, 6)
    gammas = noise(feature) / torch.nn.functional.softplus(feature @ noise.weight.T)
    assert [len({round(value, 4) for value in row}) for row in gammas.tolist()] == [draws] * 3


def test_the_gate_starts_with_all_components_tied() -> None:
    gate = SparseGate(nn.Flatten(), features=4, components=3, chosen=2)
    logits = gate.logits(torch.rand(5, 4))
    assert (logits == logits[:, :1]).all()


def test_autocast_does_not_change_the_selection() -> None:
    torch.manual_seed(0)
    gate = SparseGate(nn.Flatten(), features=32, components=8, chosen=3)
    nn.init.normal_(gate.weight)
    maps = torch.randn(4, 8, 2, 2)
    expected = gate(maps)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weights = gate(maps)
    assert weights.dtype == torch.float32
    assert torch.equal(weights, expected)


def equal_shares(images: int, components: int, kept: int) -> torch.Tensor:
    weights = torch.zeros(images, components, dtype=torch.float64)
    weights[:, :kept] = 1 / kept
    return weights


@pytest.mark.parametrize("images", [1, 7, 256])
def test_balance_loss_matches_the_formula(images: int) -> None:
    loss = balance_loss(equal_shares(images, 16, 8), alpha=100.0) * images
    assert loss.item() == pytest.approx(100 * 16 / 15 * (16 / 8 - 1))
    assert round(loss.item(), 1) == 106.7
