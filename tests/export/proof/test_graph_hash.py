from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sopdeploy.errors import CertificateError
from sopdeploy_export.proof.graph_hash import ProgramRoot, program_root, tensor_hash


class Function(nn.Module):
    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor], seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.register_buffer("count", torch.zeros(()))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def root_of(function: Callable[[nn.Module, Tensor], Tensor], seed: int = 0) -> ProgramRoot:
    shapes = ({0: torch.export.Dim("batch", min=1, max=8)},)
    with torch.no_grad():
        program = torch.export.export(
            Function(function, seed).eval(), (torch.rand(2, 4),), dynamic_shapes=shapes
        )
    return program_root(program.run_decompositions({}))


def chain(network: nn.Module, x: Tensor) -> Tensor:
    return network.second(network.first(x).relu())


SAME: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "computed again": chain,
    "with something nobody uses": lambda n, x: (n.first(x).exp(), chain(n, x))[1],
    "with a default argument written out": lambda n, x: (
        torch.add(n.second(n.first(x).relu()), 0, alpha=1) if n.training else chain(n, x)
    ),
}
OTHER: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "another order": lambda n, x: n.first(n.second(x).relu()),
    "another operator": lambda n, x: n.second(n.first(x).sigmoid()),
    "another constant": lambda n, x: chain(n, x) + 1e-30,
    "swapped operands": lambda n, x: (
        n.second(n.first(x).relu()) - n.first(x) if n.training else x - chain(n, x)
    ),
    "an integer for a float": lambda n, x: chain(n, x) * 1,
    "another type on the way": lambda n, x: chain(n, x.double().float()),
    "a slice of the same": lambda n, x: chain(n, x)[:, :4],
}


@pytest.mark.parametrize("case", SAME)
def test_equal_computations_have_one_root(case: str) -> None:
    assert root_of(SAME[case]).sha256 == root_of(chain).sha256


@pytest.mark.parametrize("case", OTHER)
def test_other_computations_have_other_roots(case: str) -> None:
    assert root_of(OTHER[case]).sha256 != root_of(chain).sha256


def test_operand_order_counts() -> None:
    assert (
        root_of(lambda n, x: n.first(x) - n.second(x)).sha256
        != root_of(lambda n, x: n.second(x) - n.first(x)).sha256
    )


def test_other_weights_give_another_root() -> None:
    assert root_of(chain, seed=1).sha256 != root_of(chain).sha256


def test_the_state_of_a_root_is_what_the_output_depends_on() -> None:
    assert root_of(lambda n, x: n.first(x)).state == {"first.weight", "first.bias"}


def test_a_graph_that_writes_to_a_buffer_is_refused() -> None:
    with pytest.raises(CertificateError, match="writes to count"):
        root_of(lambda n, x: chain(n, x) + n.count.add_(1))


def test_a_graph_that_writes_to_its_input_is_refused() -> None:
    with pytest.raises(CertificateError, match="writes to"):
        root_of(lambda n, x: x.mul_(2))


def test_a_tensor_is_hashed_by_content_whatever_its_strides() -> None:
    square = torch.rand(3, 3)
    assert tensor_hash(square.t().contiguous().t()) == tensor_hash(square)
    assert tensor_hash(square.t()) != tensor_hash(square)
    assert tensor_hash(square.reshape(9)) != tensor_hash(square)
    assert tensor_hash(torch.zeros(2)) != tensor_hash(torch.zeros(2) * -1.0)


DEEP = 1050  # one call for each would be more than Python allows


def test_deep_graphs_are_walked_without_recursion() -> None:
    def deep(_network: nn.Module, x: Tensor) -> Tensor:
        for _ in range(DEEP):
            x = x + 1.0
        return x

    assert len(root_of(deep).nodes) == DEEP
