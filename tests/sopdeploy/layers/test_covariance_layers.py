"""Layers with covariances: wrong numbers of channels, the device `meta`, and transforms of `torch.func`."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, jacrev, vmap

from sopdeploy.errors import ConfigError
from sopdeploy.layers.isqrt_cov import ISqrtCov, NewtonSchulzConfig
from sopdeploy.layers.mixture import Components
from sopdeploy.models.registry import create_model

WIDTH = 5


def mixture() -> Components:
    return Components(
        "sop", WIDTH, (4,), components=4, evaluated=2, root=NewtonSchulzConfig(iterations=2)
    )


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "ISqrtCov": lambda: ISqrtCov(WIDTH),
    "Components": mixture,
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("channels", [WIDTH - 1, WIDTH + 1])
def test_another_number_of_channels_is_an_error_that_says_both(
    kind: str, channels: int
) -> None:
    layer = LAYERS[kind]()
    message = rf"^{kind}: the feature map has {channels} channels, not {WIDTH}; build"

    with pytest.raises(ConfigError, match=message):
        layer(torch.ones(2, channels, 3, 3))


NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "iSQRT-COV": ("resnet8", {"base_width": 2, "pooling": "isqrt"}),
    "MPN-COV": ("resnet8", {"base_width": 2, "pooling": "mpncov"}),
    "DropCov": ("resnet8", {"base_width": 2, "pooling": "dropcov"}),
    "GM-SOP": (
        "gmsop-16-8-resnet18",
        {"components": 4, "chosen": 2, "component_widths": (6,), "gate_widths": ()},
    ),
}


@pytest.mark.parametrize("assign", [False, True], ids=["to_empty", "assign"])
@pytest.mark.parametrize("case", NETWORKS)
def test_a_network_that_was_built_without_memory_computes_the_same(
    case: str, assign: bool
) -> None:
    name, config = NETWORKS[case]
    images = torch.rand(2, 3, 16, 16)
    expected = create_model(name, num_classes=3, **config).eval()
    with torch.device("meta"):
        network = create_model(name, num_classes=3, **config).eval()

    if not assign:
        network.to_empty(device="cpu")
    network.load_state_dict(expected.state_dict(), assign=assign)

    with torch.no_grad():
        assert torch.equal(network(images), expected(images))


def test_transforms_of_torch_func_differentiate_the_pooling() -> None:
    layer = ISqrtCov(WIDTH).double()
    maps = torch.rand(2, WIDTH, 3, 3, dtype=torch.float64)

    def loss(maps: Tensor) -> Tensor:
        return layer(maps).square().sum()

    functional: Any = torch.autograd.functional
    by_autograd = functional.jacobian(loss, maps)
    assert torch.allclose(grad(loss)(maps), by_autograd)
    assert torch.allclose(jacrev(loss)(maps), by_autograd)

    of_each = vmap(grad(lambda one: loss(one[None])))(maps)
    assert torch.allclose(of_each, by_autograd)

    second = functional.hessian(loss, maps)
    assert torch.allclose(jacrev(grad(loss))(maps), second)
