"""Detaching removes exactly the training-only parts; graph hashes tell different computations apart."""

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from sopdeploy.errors import CertificateError, DetachError
from sopdeploy.models.base import Classifier
from sopdeploy_export.program_hashes import ProgramRoot, program_root, tensor_hash, trace_hash
from sopdeploy_export.proof.networks import copy_module, detach

Make = Callable[..., Classifier]


def test_detach_removes_exactly_the_branches_and_shares_no_memory(make: Make) -> None:
    trained = make()
    names = set(trained.state_dict())
    detached = detach(trained)
    assert names - set(detached.state_dict()) == {name for name in names if name.startswith("branches.")}
    assert set(detached.state_dict()) <= names
    assert set(trained.state_dict()) == names
    detached.get_parameter("fc.weight").data.zero_()
    assert trained.get_parameter("fc.weight").abs().sum() > 0


def test_detached_network_is_in_eval_mode_and_can_be_trained_as_the_plain_one(make: Make) -> None:
    detached = detach(make().train())
    assert not any(part.training for part in detached.modules())
    logits = detached.train()(torch.rand(2, 3, 16, 16))
    assert isinstance(logits, torch.Tensor)


def test_a_network_without_training_only_parts_stays_as_it_is(make: Make) -> None:
    plain = make("resnet8")
    assert detach(plain) is plain


def test_a_graph_module_is_copied() -> None:
    traced = fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2)).eval())
    copied = copy_module(traced)
    assert copied is not traced
    assert torch.equal(copied(torch.ones(1, 2)), traced(torch.ones(1, 2)))


def test_detach_is_rejected_a_second_time(make: Make) -> None:
    with pytest.raises(DetachError, match="no part named branches; it is already detached"):
        detach(detach(make()))


def test_network_that_was_configured_without_branches_is_exported_without_detaching(make: Make) -> None:
    plain = make(aux_blocks=(0, 0, 0))
    assert detach(plain) is plain


@pytest.mark.parametrize(
    ("name", "message"), [("twigs", "no part named twigs"), ("layer9.twig", "it has no layer9")]
)
def test_unknown_training_only_name_is_rejected(
    make: Make, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    trained = make()
    monkeypatch.setattr(type(trained), "training_only", (name,))
    with pytest.raises(DetachError, match=message):
        detach(trained)


Forward = Callable[[nn.Module, Tensor], Tensor]


class Function(nn.Module):
    def __init__(self, function: Forward, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
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
    "operand order": (lambda n, x: n.first(x) - n.second(x), lambda n, x: n.second(x) - n.first(x)),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_different_computations_have_different_roots(case: str) -> None:
    one, other = DIFFERENT[case]
    assert root_of(one).sha256 != root_of(other).sha256


@pytest.mark.parametrize("case", DIFFERENT)
def test_different_computations_have_different_traces(case: str) -> None:
    one, other = DIFFERENT[case]
    assert trace_hash(traced(one)) not in (None, trace_hash(traced(other)))


OTHER_TRACES: dict[str, tuple[Forward, Forward]] = {  # the Merkle roots do not tell them apart
    "order of writes": (
        lambda _, x: (y := x.clone(), y.add_(1), y.mul_(2))[0],
        lambda _, x: (y := x.clone(), y.mul_(2), y.add_(1))[0],
    ),
    "a write whose result is not used": (lambda _, x: x.clone(), lambda _, x: (y := x.clone(), y.exp_())[0]),
    "what is written to": (
        lambda _, x: (y := x.clone(), z := x.clone(), y.exp_(), z)[0],
        lambda _, x: (x.clone(), z := x.clone(), z.exp_(), z)[0],
    ),
}


@pytest.mark.parametrize("case", OTHER_TRACES)
def test_programs_that_write_in_another_way_have_other_traces(case: str) -> None:
    one, other = (trace_hash(traced(function)) for function in OTHER_TRACES[case])
    assert one not in (None, other)


def test_trace_depends_on_the_weights() -> None:
    assert trace_hash(traced(chain, seed=1)) not in (None, trace_hash(traced(chain)))


def test_program_with_a_subgraph_has_no_trace() -> None:
    def branches(network: nn.Module, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, network.first, network.second, (x,))

    assert trace_hash(traced(branches)) is None


def test_different_weights_have_different_roots() -> None:
    assert root_of(chain, seed=1).sha256 != root_of(chain).sha256


def test_state_lists_what_the_output_depends_on() -> None:
    assert root_of(lambda n, x: n.first(x)).state == {"first.weight", "first.bias"}


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


def test_tensor_hash_depends_on_content_and_shape_but_not_on_strides() -> None:
    square = torch.rand(3, 3)
    assert tensor_hash(square.t().contiguous().t()) == tensor_hash(square)
    assert tensor_hash(square.t()) != tensor_hash(square)
    assert tensor_hash(square.reshape(9)) != tensor_hash(square)
    assert tensor_hash(torch.zeros(2)) != tensor_hash(torch.zeros(2) * -1.0)
