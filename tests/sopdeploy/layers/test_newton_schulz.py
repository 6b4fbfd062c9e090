import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sopdeploy.layers.newton_schulz import newton_schulz

PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm, torch.ops.aten.baddbmm}


class CountProducts(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in PRODUCTS
        return func(*args, **(kwargs or {}))


def normalised(batch: int, channels: int, positions: int, dtype: torch.dtype = torch.float64) -> Tensor:
    x = torch.randn(batch, channels, positions, dtype=dtype).relu()
    x = x - x.mean(dim=2, keepdim=True)
    cov = x @ x.mT / positions
    return cov / cov.diagonal(dim1=1, dim2=2).sum(dim=1)[:, None, None]


def plain_loop(a: Tensor, iterations: int) -> Tensor:
    """The paper's Eq. (4), every step written out alike."""
    identity = torch.eye(a.shape[-1], dtype=a.dtype)
    y, z = a, identity.expand_as(a)
    for _ in range(iterations):
        step = (3 * identity - z @ y) / 2
        y, z = y @ step, step @ z
    return y


@pytest.mark.parametrize("iterations", range(1, 10))
def test_newton_schulz_equals_the_plain_loop_of_the_paper(iterations: int) -> None:
    torch.manual_seed(iterations)
    a = normalised(2, 12, 30)
    torch.testing.assert_close(
        newton_schulz(a, iterations), plain_loop(a, iterations), rtol=1e-12, atol=1e-14
    )


@pytest.mark.parametrize(("iterations", "products"), [(1, 1), *((n, 3 * n - 3) for n in range(2, 10))])
def test_n_iterations_take_3n_minus_3_products(iterations: int, products: int) -> None:
    a = normalised(1, 4, 9)
    with CountProducts() as counted:
        newton_schulz(a, iterations)
    assert counted.count == products


@pytest.mark.parametrize("positions", [5, 12, 200], ids=["rank-deficient", "square", "full rank"])
def test_float32_stays_within_its_noise_of_float64_up_to_15_iterations(positions: int) -> None:
    torch.manual_seed(0)
    a = normalised(3, 16, positions)
    for iterations in (1, 3, 5, 15):
        exact = newton_schulz(a, iterations)
        found = newton_schulz(a.float(), iterations).double()
        assert (found - exact).norm() / exact.norm() < 1e-4


def test_many_iterations_reach_the_matrix_square_root() -> None:
    torch.manual_seed(1)
    a = normalised(1, 6, 400)
    root = newton_schulz(a, 15)
    torch.testing.assert_close(root @ root, a, rtol=0, atol=1e-9)


def test_five_iterations_are_not_yet_the_square_root() -> None:
    torch.manual_seed(2)
    a = normalised(1, 64, 196)
    root = newton_schulz(a, 5)
    assert (root @ root - a).norm() / a.norm() > 0.01


@pytest.mark.parametrize("iterations", [1, 2, 5])
def test_gradients_are_those_of_finite_differences(iterations: int) -> None:
    torch.manual_seed(3)
    a = normalised(1, 4, 20).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: newton_schulz(x, iterations), (a,))


def test_backward_is_the_formula_of_the_paper() -> None:
    """iSQRT-COV Eq. (10), for symmetric matrices, N = 3, against autograd."""
    torch.manual_seed(4)
    a = normalised(1, 5, 40)[0]
    upstream = torch.randn(5, 5, dtype=a.dtype)
    upstream = upstream + upstream.T
    identity = torch.eye(5, dtype=a.dtype)
    states = [(a, identity)]
    for _ in range(3):
        y, z = states[-1]
        step = (3 * identity - z @ y) / 2
        states.append((y @ step, step @ z))
    grad_y, grad_z = upstream, torch.zeros_like(a)
    for y, z in reversed(states[:-1]):
        grad_y, grad_z = (
            (grad_y @ (3 * identity - y @ z) - z @ grad_z @ z - z @ y @ grad_y) / 2,
            ((3 * identity - y @ z) @ grad_z - y @ grad_y @ y - grad_z @ z @ y) / 2,
        )
    leaf = a.clone().requires_grad_()
    newton_schulz(leaf[None], 3)[0].backward(upstream)
    torch.testing.assert_close((leaf.grad + leaf.grad.T) / 2, (grad_y + grad_y.T) / 2, rtol=1e-9, atol=1e-12)
