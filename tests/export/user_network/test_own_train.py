"""Networks whose `train()` and `eval()` change weights are after an export as they were before."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sopdeploy.errors import SopdeployError
from sopdeploy_export.network import tensors
from sopdeploy_export.options import ExportOptions
from tests.export.user_network import networks
from tests.support.slow import mostly_slow

ONE = ExportOptions(max_batch=1)


class Merging(nn.Linear):
    """A linear layer with an adapter of low rank, which `eval` adds to the weight and `train` subtracts."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.down = nn.Parameter(torch.randn(2, inputs))
        self.up = nn.Parameter(torch.randn(outputs, 2))
        self.is_merged = False

    def merged(self) -> Tensor:
        return self.weight + self.up @ self.down

    def write(self, weight: Tensor) -> None:
        self.weight.data.copy_(weight)

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        if mode == self.is_merged:
            sign = -1 if mode else 1
            self.write(self.weight.data + sign * (self.up @ self.down).data)
            self.is_merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight if self.is_merged else self.merged(), self.bias)


class Replacing(Merging):
    """Replaces the parameter instead of its content."""

    def write(self, weight: Tensor) -> None:
        self.weight = nn.Parameter(weight.clone())


class Around(nn.Module):
    """Merges the layer of a part in its own `train`."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(8, networks.CLASSES)

    def train(self, mode: bool = True) -> Any:
        if mode != self.training:
            self.inside.weight.data.mul_(0.5 if mode else 2.0)
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inside(x)
        return y


def of_eval() -> nn.Module:
    """Build a layer whose `eval` rounds its weights, which nothing can undo."""

    class Rounding(nn.Linear):
        def eval(self) -> Any:
            self.weight.data.mul_(64).round_().div_(64)
            return super().eval()

    return Rounding(8, networks.CLASSES)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "an adapter": lambda: Merging(8, networks.CLASSES),
    "an adapter that replaces its parameter": lambda: Replacing(8, networks.CLASSES),
    "a part that changes another one": Around,
    "eval that rounds": of_eval,
}


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("layer", mostly_slow(LAYERS, "an adapter"))
@pytest.mark.parametrize("fails", [False, True])
def test_an_export_leaves_every_weight_and_mode_as_it_was(
    layer: str, mode: bool, fails: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    network: Any = networks.Small(aux=False)
    network.fc = LAYERS[layer]()
    network.train(mode)
    before = {name: (id(tensor), tensor.clone()) for name, tensor in tensors(network).items()}

    given = {"labels": ["a", "b", "c"]} if fails else {}  # the network has four logits
    with suppress(SopdeployError):
        networks.export_small(network, tmp_path / "out", options=ONE, **given)
    assert (tmp_path / "out").exists() != fails

    after = tensors(network)
    assert network.training is network.fc.training is mode
    assert {name: id(tensor) for name, tensor in after.items()} == {
        name: place for name, (place, _) in before.items()
    }
    for name, (_, content) in before.items():
        assert torch.equal(after[name], content), name
