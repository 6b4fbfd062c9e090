"""Networks that call code which something else compiled: TorchScript, torch.compile, functorch."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.attacks.planted.graphs import doubled
from tests.attacks.planted.network import WIDTH, Row, network, puts


def script(function: Any) -> Any:
    """Script a *function* or module, which torch says is deprecated."""
    with warnings.catch_warnings(action="ignore"):
        return torch.jit.script(function)


@script
def scripted(x: Tensor) -> Tensor:
    return x.mul(torch.sigmoid(x))


def acts(
    activation: Callable[[Tensor], Tensor], refused: str = "", batch: int | None = None
) -> Row:
    """Plant an *activation* between the features and the classifier."""
    return Row(network(lambda n, f, y: n.fc(activation(f))), refused, batch=batch)


COMPILED: dict[str, Row] = {
    "a scripted function": acts(scripted),
    "a function that a backend of its own compiles": acts(
        torch.compile(lambda x: x.relu(), backend=doubled),
        "a plain run of the network gives other outputs",
    ),
    "a scripted part": Row(
        network(
            lambda n, f, y: n.fc(n.part(f)),
            puts(part=lambda: script(nn.Linear(WIDTH, WIDTH))),
        ),
        r"part of .* is a ScriptModule",
    ),
    "a function of the batch": acts(
        torch.vmap(lambda column: column - column.mean(), in_dims=1, out_dims=1),
        r"torch\.vmap over another axis .*; .* move that axis to the front",
        batch=5,
    ),
}
