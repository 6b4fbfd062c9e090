"""Batch norms over all ranks."""

import pytest
import torch
from torch import nn

from sopdeploy.layers.distributed import FrozenBatchNorm, GlobalBatchNorm

CASES = [
    (lambda: nn.BatchNorm2d(5), (6, 5, 3, 4)),
    (lambda: nn.BatchNorm1d(5), (6, 5)),
    (lambda: nn.BatchNorm2d(5, affine=False, eps=1e-3, momentum=0.01), (2, 5, 1, 1)),
    (lambda: nn.BatchNorm2d(5, momentum=None), (3, 5, 2, 2)),
]


def pair(make, shape):
    """Return an ordinary batch norm with parameters of its own, its like, and an input."""
    torch.manual_seed(0)
    norm, like = make().double(), make().double()
    for tensor in [*norm.parameters(), norm.running_mean]:
        nn.init.normal_(tensor)
    like.load_state_dict(norm.state_dict())
    return norm, like, 3 + 2 * torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize(("make", "shape"), CASES)
def test_global_batch_norm_equals_torch_in_one_process(make, shape) -> None:
    norm, like, x = pair(make, shape)
    ours = GlobalBatchNorm(like)
    found = []
    for module in (norm, ours):
        for _ in range(3):
            inputs = x.clone().requires_grad_()
            module.zero_grad()
            y = module(inputs)
            (y**3).sum().backward()
        gradients = [parameter.grad for parameter in module.parameters()]
        found.append([y, inputs.grad, *gradients, *module.buffers(), module.eval()(x)])
    torch.testing.assert_close(found[0], found[1])


def test_frozen_batch_norm_in_training_equals_eval_mode() -> None:
    norm, like, x = pair(*CASES[0])
    before = {name: tensor.clone() for name, tensor in norm.state_dict().items()}
    taken = FrozenBatchNorm(norm).train()
    torch.testing.assert_close(taken(x), like.eval()(x), rtol=0, atol=0)
    taken(x).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in taken.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in taken.state_dict().items())


def test_activations_of_timms_batch_norms_are_kept() -> None:
    layers = pytest.importorskip("timm.layers")
    torch.manual_seed(0)
    norm, x = layers.BatchNormAct2d(4), torch.randn(5, 4, 3, 3)
    ours = GlobalBatchNorm(layers.BatchNormAct2d(4))
    torch.testing.assert_close(ours(x), norm(x))
    torch.testing.assert_close(ours.eval()(x), norm.eval()(x))
    assert ours(x).min() == 0


def test_half_precision_maps_are_summed_in_float32() -> None:
    x = torch.full((64, 2, 16, 16), 300.0, dtype=torch.bfloat16)
    x[:32] = 200
    y = GlobalBatchNorm(nn.BatchNorm2d(2))(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y[0].float(), torch.full((2, 16, 16), -1.0), rtol=0, atol=1e-2)
