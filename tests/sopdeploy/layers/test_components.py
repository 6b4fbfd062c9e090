"""Components of GM-SOP, its sparse gate with noise and balance loss."""

import pytest
import torch
from torch import Tensor, nn

from sopdeploy.layers.isqrt_cov import NewtonSchulzConfig
from sopdeploy.layers.mixture import (
    ComponentKind,
    Components,
    GateNoise,
    SparseGate,
    balance_loss,
    rank,
    softmax_of_largest,
)

KINDS: list[tuple[ComponentKind, tuple[int, ...]]] = [
    ("gap", (7,)),
    ("sop", (6, 4)),
    ("linear", (5,)),
]


def components(kind: ComponentKind, widths: tuple[int, ...], count: int = 4) -> Components:
    torch.manual_seed(0)
    root = NewtonSchulzConfig(iterations=3)
    return Components(kind, 5, widths, components=count, evaluated=2, root=root).double()


def maps(images: int = 3) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(images, 5, 3, 3, dtype=torch.float64)


def weights(images: int, count: int = 4, kept: int = 2) -> Tensor:
    torch.manual_seed(2)
    return softmax_of_largest(torch.randn(images, count, dtype=torch.float64), kept)


@pytest.mark.parametrize("images", [1, 2, 9])
@pytest.mark.parametrize(("kind", "widths"), KINDS)
def test_routed_and_dense_evaluation_are_equal(
    kind: ComponentKind, widths: tuple[int, ...], images: int
) -> None:
    gradients = []
    outputs = []
    for routed in (False, True):
        bank = components(kind, widths)
        x = maps(images).requires_grad_()
        omega = weights(images).requires_grad_()
        out = bank.routed_sum(x, omega) if routed else bank(x, omega)
        out.square().sum().backward()
        outputs.append(out)
        gradients.append([x.grad, *(weight.grad for weight in bank.weights)])

    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-12)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-10)


@pytest.mark.parametrize(("count", "chosen"), [(2, 1), (4, 2), (7, 6), (16, 8)])
@pytest.mark.parametrize(("kind", "widths"), KINDS[:2])
def test_the_gathered_form_of_k_of_n_components_equals_the_dense_one(
    kind: ComponentKind, widths: tuple[int, ...], count: int, chosen: int
) -> None:
    torch.manual_seed(0)
    root = NewtonSchulzConfig(iterations=3)
    bank = Components(kind, 5, widths, components=count, evaluated=chosen, root=root).double()
    logits = torch.randn(6, count, dtype=torch.float64)
    logits[1] = 0.0  # all are equal
    logits[2, ::2] = logits[2].max()  # some are equal
    logits[3] = -logits[0]  # this image is routed elsewhere
    logits[4] *= 1e4  # the softmax of chosen components is 0
    omega = softmax_of_largest(logits, chosen)

    for images in (1, 6):
        x = maps(images)
        assert bank.gathering_is_faster(x)
        expected = bank(x, omega[:images])
        torch.testing.assert_close(
            bank.gathered_sum(x, omega[:images]), expected, rtol=0, atol=1e-12
        )


def test_averages_all_components_and_maps_of_one_position_are_not_gathered() -> None:
    root = NewtonSchulzConfig(iterations=3)
    x = maps()
    every = Components("gap", 5, (7,), components=4, evaluated=4, root=root)
    assert [bank.gathering_is_faster(x) for bank in (every, components("linear", (5,)))] == [
        False
    ] * 2

    chosen = components("gap", (7,))
    assert [chosen.gathering_is_faster(features) for features in (x, x[:, :, :1, :1])] == [
        True,
        False,
    ]


F64 = torch.float64


def test_rank_is_that_of_a_stable_sort() -> None:
    torch.manual_seed(0)
    logits = torch.randint(-3, 3, (64, 16)).float()
    order = torch.sort(logits, dim=1, descending=True, stable=True).indices

    assert torch.equal(rank(logits).long(), order.argsort(dim=1))


def test_kept_weights_are_the_softmax_over_the_kept_alone() -> None:
    logits = torch.tensor([[-1.0, 0.0, 2.0, -5.0]], dtype=F64)
    weights = softmax_of_largest(logits, 2)

    # A logit of 0 is kept like any other.
    kept = logits[:, 1:3].exp()
    torch.testing.assert_close(weights[:, 1:3], kept / kept.sum(), rtol=0, atol=1e-15)
    assert weights[0, 0] == 0
    assert weights[0, 3] == 0


@pytest.mark.parametrize(("per", "draws"), [("image", 1), ("component", 4)])
def test_noise_draws_one_gamma_per_image_or_per_component(per: str, draws: int) -> None:
    torch.manual_seed(0)
    noise = GateNoise(6, 4, per)  # type: ignore[arg-type]
    feature = torch.rand(3, 6)
    gammas = noise(feature) / torch.nn.functional.softplus(feature @ noise.weight.T)

    assert [len({round(value, 4) for value in row}) for row in gammas.tolist()] == [draws] * 3


def test_autocast_does_not_change_the_selection() -> None:
    torch.manual_seed(0)
    gate = SparseGate(nn.Flatten(), length=32, components=8, chosen=3)
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


@pytest.mark.parametrize("images", [8, 32, 256])
def test_the_weight_of_the_balance_loss_is_the_papers_for_any_batch(images: int) -> None:
    weights = torch.zeros(images, 4)
    weights[:, 0] = 1.0
    at_256 = balance_loss(weights, alpha=100.0 * images / 256)
    assert balance_loss(weights, alpha=None) == pytest.approx(float(at_256))


@pytest.mark.parametrize("images", [1, 7, 256])
def test_balance_loss_matches_the_formula(images: int) -> None:
    loss = balance_loss(equal_shares(images, 16, 8), alpha=100.0) * images

    assert loss.item() == pytest.approx(100 * 16 / 15 * (16 / 8 - 1))
    assert round(loss.item(), 1) == 106.7
