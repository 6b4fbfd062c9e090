"""An activation in place becomes the one out of place only where nothing else sees what it writes to."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

from sopdeploy_export.capture.symbolic_forms import IN_PLACE, simplify_operators
from sopdeploy_export.program_hashes import program_root

Forward = Callable[[nn.Module, Tensor], Tensor]


def seen_through_an_earlier_view(conv: nn.Module, images: Tensor) -> Tensor:
    features = conv(images)
    rows = features.flatten(2)
    F.hardtanh(features, inplace=True)
    return rows + features.flatten(2)


def seen_through_dropout(conv: nn.Module, images: Tensor) -> Tensor:
    features = conv(images)
    return features + F.hardtanh(F.dropout(features, training=False), inplace=True)


def seen_through_a_view(conv: nn.Module, images: Tensor) -> Tensor:
    features = conv(images)
    return features + F.hardtanh(features.view(-1, 4, 6, 6), inplace=True)


def seen_through_einsum(conv: nn.Module, images: Tensor) -> Tensor:
    features = conv(images)
    return features + F.hardtanh(torch.einsum("bchw->bchw", features), inplace=True)


def alone(conv: nn.Module, images: Tensor) -> Tensor:
    features = F.hardtanh(conv(images), inplace=True)
    return F.silu(conv(F.hardswish(conv(features), inplace=True)), inplace=True) + features


class Net(nn.Module):
    def __init__(self, function: Forward) -> None:
        super().__init__()
        self.conv, self.function = nn.Conv2d(4, 4, 3, padding=1), function

    def forward(self, images: Tensor) -> Tensor:
        return self.function(self.conv, images)


@pytest.mark.parametrize(
    ("function", "in_place"),
    [
        (alone, 0),
        pytest.param(seen_through_an_earlier_view, 1, marks=pytest.mark.slow),
        pytest.param(seen_through_dropout, 1, marks=pytest.mark.slow),
        (seen_through_a_view, 1),
        pytest.param(seen_through_einsum, 1, marks=pytest.mark.slow),
    ],
)
def test_a_program_has_the_root_that_torch_alone_gives_it(
    function: Forward, in_place: int
) -> None:
    shapes = ({0: Dim("batch", min=1, max=8)},)
    with torch.no_grad():
        program = torch.export.export(
            Net(function).eval(), (torch.rand(2, 4, 6, 6),), dynamic_shapes=shapes
        )
        expected = program_root(program.run_decompositions({}))
        simplify_operators(program)
        left = [node for node in program.graph.nodes if str(node.target) in IN_PLACE]
        found = program_root(program.run_decompositions({}))

    assert len(left) == in_place
    assert (found.sha256, found.nodes) == (expected.sha256, expected.nodes)
