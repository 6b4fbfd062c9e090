import pytest
import torch
from torch import nn

from sopdeploy.errors import ConfigError
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
def test_one_process_gets_the_ordinary_batch_norm_and_its_gradients(make, shape) -> None:
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


@pytest.mark.parametrize(("make", "shape"), CASES)
@pytest.mark.parametrize("kind", [GlobalBatchNorm, FrozenBatchNorm])
def test_it_shares_parameters_and_buffers_and_keeps_the_keys(make, shape, kind) -> None:
    norm, _, _ = pair(make, shape)
    taken = kind(norm)
    assert list(taken.state_dict()) == list(norm.state_dict())
    assert [name for name, _ in taken.named_parameters()] == [name for name, _ in norm.named_parameters()]
    shared = zip([*taken.parameters(), *taken.buffers()], [*norm.parameters(), *norm.buffers()], strict=True)
    assert all(mine is theirs for mine, theirs in shared)


def test_a_frozen_one_computes_in_training_what_the_ordinary_one_computes_afterwards() -> None:
    norm, like, x = pair(*CASES[0])
    before = {name: tensor.clone() for name, tensor in norm.state_dict().items()}
    taken = FrozenBatchNorm(norm).train()
    torch.testing.assert_close(taken(x), like.eval()(x), rtol=0, atol=0)
    taken(x).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in taken.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in taken.state_dict().items())


def test_what_timm_puts_behind_its_batch_norms_stays_there() -> None:
    layers = pytest.importorskip("timm.layers")
    torch.manual_seed(0)
    norm, x = layers.BatchNormAct2d(4), torch.randn(5, 4, 3, 3)
    ours = GlobalBatchNorm(layers.BatchNormAct2d(4))
    torch.testing.assert_close(ours(x), norm(x))
    torch.testing.assert_close(ours.eval()(x), norm.eval()(x))
    assert ours(x).min() == 0


def test_a_half_precision_map_is_summed_in_float32_and_comes_back_in_half() -> None:
    x = torch.full((64, 2, 16, 16), 300.0, dtype=torch.bfloat16)
    x[:32] = 200
    y = GlobalBatchNorm(nn.BatchNorm2d(2))(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y[0].float(), torch.full((2, 16, 16), -1.0), rtol=0, atol=1e-2)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(3, track_running_stats=False)])
def test_a_batch_norm_without_running_statistics_is_refused_by_name(norm) -> None:
    with pytest.raises(ConfigError, match="batch_norm: BatchNorm2d cannot be made global or frozen"):
        GlobalBatchNorm(norm)
