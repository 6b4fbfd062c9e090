import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sopdeploy.layers.isqrt_cov import ISqrtCov
from sopdeploy.layers.mixture.components import Components, Convolutions, Kind, make_components
from sopdeploy.layers.mixture.gate import keep_largest
from sopdeploy.layers.newton_schulz import NewtonSchulzConfig

KINDS: list[tuple[Kind, tuple[int, ...]]] = [("gap", (7,)), ("sop", (6, 4)), ("linear", (5,))]


def components(kind: Kind, widths: tuple[int, ...], count: int = 4) -> Components:
    torch.manual_seed(0)
    root = NewtonSchulzConfig(iterations=3)
    return make_components(kind, 5, Convolutions(widths), components=count, counted=2, root=root)[0].double()


def maps(images: int = 3) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(images, 5, 3, 3, dtype=torch.float64)


def weights(images: int, count: int = 4, kept: int = 2) -> Tensor:
    torch.manual_seed(2)
    return keep_largest(torch.randn(images, count, dtype=torch.float64), kept)


def one_by_one(bank: Components, kind: Kind, features: Tensor, component: int) -> Tensor:
    """What the paper says of one component, written without packing."""
    x = features.mean(dim=(2, 3), keepdim=True) if kind == "linear" else features
    for weight in bank.weights:
        x = F.conv2d(x, weight[component][:, :, None, None])
        x = x if kind == "linear" else F.relu(x)
    return ISqrtCov(4, NewtonSchulzConfig(iterations=3))(x) if kind == "sop" else x.mean(dim=(2, 3))


@pytest.mark.parametrize(("kind", "widths"), KINDS)
def test_packed_components_equal_single_ones(kind: Kind, widths: tuple[int, ...]) -> None:
    bank = components(kind, widths)
    expected = torch.stack([one_by_one(bank, kind, maps(), n) for n in range(4)], dim=1)
    torch.testing.assert_close(bank(maps()), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("images", [1, 2, 9])
@pytest.mark.parametrize(("kind", "widths"), KINDS)
def test_routed_and_dense_evaluation_are_equal(kind: Kind, widths: tuple[int, ...], images: int) -> None:
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


def test_unselected_components_have_zero_gradients() -> None:
    bank = components("sop", (6, 4))
    omega = torch.tensor([[0.5, 0.0, 0.5, 0.0]] * 2, dtype=torch.float64)
    bank.routed_sum(maps(2), omega).sum().backward()
    for weight in bank.weights:
        assert weight.grad is not None
        moved = weight.grad.flatten(start_dim=1).abs().sum(dim=1) > 0
        assert moved.tolist() == [True, False, True, False]


def test_a_component_of_a_single_image_has_a_gradient() -> None:
    bank = components("sop", (6, 4))
    omega = torch.tensor([[0.5, 0.5, 0, 0], [0.5, 0, 0.5, 0]], dtype=torch.float64)
    bank.routed_sum(maps(2), omega).sum().backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in bank.weights)
    assert all(weight.grad is not None and weight.grad[2].abs().max() > 0 for weight in bank.weights)


def test_a_dead_component_leaves_gradients_finite() -> None:
    bank = components("sop", (6, 4))
    with torch.no_grad():
        bank.weights[1][3] = -bank.weights[1][3].abs()  # every map of component 3 is rectified to 0
    x = maps().requires_grad_()
    pooled = bank(x)
    (pooled * weights(3, kept=4).unsqueeze(2)).sum().backward()
    assert pooled[:, 3].abs().max() == 0
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in bank.weights)


def test_half_precision_maps_are_mixed_in_float32() -> None:
    bank = components("sop", (6, 4)).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        dense = bank(maps().float(), weights(3).float())
        routed = bank.routed_sum(maps().float(), weights(3).float())
    assert dense.dtype == routed.dtype == torch.float32
    torch.testing.assert_close(dense, routed, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("kind", "widths", "macs"),
    [("gap", (7,), 2 * 9 * 35), ("sop", (6, 4), 2 * 9 * 54), ("linear", (5,), 2 * 25)],
)
def test_macs_count_the_evaluated_components(kind: Kind, widths: tuple[int, ...], macs: int) -> None:
    assert components(kind, widths).macs(maps().shape) == macs
