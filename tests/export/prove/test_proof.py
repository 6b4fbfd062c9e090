"""Hashes tell computations apart."""

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.nn import functional as F

from sopdeploy.errors import CertificateError
from sopdeploy_export.network import copy_network
from sopdeploy_export.program_hashes import (
    ProgramRoot,
    describe_difference,
    fingerprint,
    program_root,
    tensor_hash,
)


def test_a_graph_module_is_copied() -> None:
    traced = fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2)).eval())
    copied = copy_network(traced)
    assert copied is not traced
    assert torch.equal(copied(torch.ones(1, 2)), traced(torch.ones(1, 2)))


Forward = Callable[[nn.Module, Tensor], Tensor]


class Function(nn.Module):
    def __init__(self, function: Forward, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.dropout = nn.Dropout()
        self.register_buffer("count", torch.zeros(()))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def traced(function: Forward, seed: int = 0) -> ExportedProgram:
    shapes = ({0: torch.export.Dim("batch", min=1, max=8)},)
    network = Function(function, seed).eval()
    with torch.no_grad():
        return torch.export.export(network, (torch.rand(2, 4),), dynamic_shapes=shapes)


def program_of(function: Forward, seed: int = 0) -> ExportedProgram:
    return traced(function, seed).run_decompositions({})


@functools.cache
def root_of(function: Forward, seed: int = 0) -> ProgramRoot:
    return program_root(program_of(function, seed))


def chain(network: nn.Module, x: Tensor) -> Tensor:
    return network.second(network.first(x).relu())


@pytest.mark.parametrize(
    "function",
    [chain, lambda n, x: (n.first(x).exp(), chain(n, x))[1]],
    ids=["computed again", "with an unused operation"],
)
def test_equal_computations_have_one_root(function: Forward) -> None:
    assert root_of(function).sha256 == root_of(chain).sha256


DIFFERENT: dict[str, tuple[Forward, Forward]] = {
    "order": (chain, lambda n, x: n.first(n.second(x).relu())),
    "operator": (chain, lambda n, x: n.second(n.first(x).sigmoid())),
    "constant": (chain, lambda n, x: chain(n, x) + 1e-30),
    "integer instead of float": (chain, lambda n, x: chain(n, x) * 1),
    "intermediate dtype": (chain, lambda n, x: chain(n, x.double().float())),
    "slice of everything": (chain, lambda n, x: chain(n, x)[:, :4]),
    "subtraction from the input": (chain, lambda n, x: x - chain(n, x)),
    "assertion": (
        chain,
        lambda n, x: (torch._assert_async(x.amax() < 9, "large"), chain(n, x))[1],
    ),
    "operand order": (
        lambda n, x: n.first(x) - n.second(x),
        lambda n, x: n.second(x) - n.first(x),
    ),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_different_computations_have_different_roots_and_traces(case: str) -> None:
    one, other = DIFFERENT[case]
    assert root_of(one).sha256 != root_of(other).sha256
    assert fingerprint(traced(one)) not in (None, fingerprint(traced(other)))


# The Merkle roots do not tell them apart
OTHER_TRACES: dict[str, tuple[Forward, Forward]] = {
    "order of writes": (
        lambda _, x: (y := x.clone(), y.add_(1), y.mul_(2))[0],
        lambda _, x: (y := x.clone(), y.mul_(2), y.add_(1))[0],
    ),
    "a write whose result is not used": (
        lambda _, x: x.clone(),
        lambda _, x: (y := x.clone(), y.exp_())[0],
    ),
    "what is written to": (
        lambda _, x: (y := x.clone(), z := x.clone(), y.exp_(), z)[0],
        lambda _, x: (x.clone(), z := x.clone(), z.exp_(), z)[0],
    ),
}


@pytest.mark.parametrize("case", OTHER_TRACES)
def test_programs_that_write_in_another_way_have_other_traces(case: str) -> None:
    one, other = (fingerprint(traced(function)) for function in OTHER_TRACES[case])
    assert one not in (None, other)


def test_program_with_a_subgraph_has_no_trace() -> None:
    def branches(network: nn.Module, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, network.first, network.second, (x,))

    assert fingerprint(traced(branches)) is None


def test_roots_and_traces_depend_on_the_weights() -> None:
    assert root_of(chain, seed=1).sha256 != root_of(chain).sha256
    assert fingerprint(traced(chain, seed=1)) not in (None, fingerprint(traced(chain)))


def test_state_lists_what_the_output_depends_on() -> None:
    assert root_of(lambda n, x: n.first(x)).tensors == {"first.weight", "first.bias"}


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda n, x: chain(n, x) + n.count.add_(1), "writes to count"),
        (lambda _, x: x.mul_(2), "writes to"),
    ],
    ids=["buffer", "input"],
)
def test_graph_that_writes_is_rejected(function: Forward, message: str) -> None:
    with pytest.raises(CertificateError, match=message):
        root_of(function)


def attends(_: nn.Module, x: Tensor) -> Tensor:
    rows = x[:, None]
    return F.scaled_dot_product_attention(rows, rows, rows, dropout_p=0.1)[:, 0]


def drops_in_train_mode(network: nn.Module, x: Tensor) -> Tensor:
    return network.dropout.train()(x)


DRAWS: dict[str, tuple[Forward, str]] = {
    "dropout": (lambda _, x: F.dropout(x, 0.5), "training=self.training"),
    "attention": (attends, r"dropout_p=0\.0"),
    "noise": (lambda _, x: x + torch.rand_like(x), "only if self.training"),
    "a layer in train mode": (drops_in_train_mode, r"call \.train\(\)"),
}


@pytest.mark.parametrize("case", DRAWS)
def test_random_numbers_name_their_line_and_what_to_write(case: str) -> None:
    function, remedy = DRAWS[case]
    line = Function.forward.__code__.co_firstlineno + 1
    with pytest.raises(CertificateError, match=rf"test_proof\.py:{line} .*{remedy}"):
        root_of(function)


class DropsChannels(nn.Module):
    """Draws by an operator whose name does not say that it is a dropout."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout2d(x, 0.5)


def test_a_dropout_of_channels_is_known_by_its_line() -> None:
    program = torch.export.export(DropsChannels().eval(), (torch.rand(2, 3, 4, 4),))
    with pytest.raises(CertificateError, match=r"dropout2d.*training=self\.training"):
        program_root(program.run_decompositions({}))


NORMS: dict[str, tuple[nn.Module, nn.Module, bool]] = {
    "momentum": (nn.BatchNorm2d(3, momentum=0.01), nn.BatchNorm2d(3), True),
    "mean of all batches": (nn.BatchNorm2d(3, momentum=None), nn.BatchNorm2d(3), True),
    "momentum of an instance norm": (
        nn.InstanceNorm2d(3, momentum=0.01, track_running_stats=True),
        nn.InstanceNorm2d(3, track_running_stats=True),
        True,
    ),
    "eps": (nn.BatchNorm2d(3, eps=1e-3), nn.BatchNorm2d(3), False),
}


@pytest.mark.parametrize("case", NORMS)
def test_the_momentum_of_a_normalization_has_no_effect_in_eval_mode(case: str) -> None:
    *norms, is_equal = NORMS[case]
    roots = []
    for norm in norms:
        program = torch.export.export(norm.eval(), (torch.rand(2, 3, 4, 4),))
        roots.append(program_root(program.run_decompositions({})).sha256)
    assert (roots[0] == roots[1]) is is_equal


def test_tensor_hash_depends_on_content_and_shape_but_not_on_strides() -> None:
    square = torch.rand(3, 3)
    assert tensor_hash(square.t().contiguous().t()) == tensor_hash(square)
    assert tensor_hash(square.t()) != tensor_hash(square)
    assert tensor_hash(square.reshape(9)) != tensor_hash(square)
    assert tensor_hash(torch.zeros(2)) != tensor_hash(torch.zeros(2) * -1.0)


# Operations of a network and of the trained one by their hashes, and what is told
DIFFERENCES = [
    (
        {"1": "add", "2": "mul"},
        {"1": "add", "3": "sub"},
        "it computes mul, the trained one sub",
    ),
    ({"1": "add", "2": "mul"}, {"1": "add"}, "it computes mul"),
    ({"1": "add"}, {"1": "add", "3": "sub"}, "it lacks sub"),
    (
        {"2": "mul"},
        {"3": "mul"},
        "mul has other weights, operands or arguments than in the trained one",
    ),
    ({"1": "add"}, {"1": "add"}, "its inputs or outputs differ"),
]


@pytest.mark.parametrize(("nodes", "expected", "text"), DIFFERENCES)
def test_a_difference_names_the_first_operation_of_each_network(nodes, expected, text) -> None:
    found, trained = (ProgramRoot(sha256="", nodes=one) for one in (nodes, expected))
    assert describe_difference(found, trained, "trained") == text
