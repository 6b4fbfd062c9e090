"""The second-order parts of a graph are counted from its nodes, for every family and form."""

from typing import Any

import pytest
from torch import Tensor, nn

from sopdeploy.bundle.second_order import NOTHING, count_second_order
from sopdeploy.images.preprocess import Preprocess
from sopdeploy_export.capture.program import capture_any_batch
from sopdeploy_export.lower.to_onnx import lower
from tests.export.once import ALONE, graph_of
from tests.sweep.smallest import GSOP, TWO_OF_FOUR

SMALL = Preprocess(resize=16, crop=16)
ISQRT = {"kind": "isqrt"}
COUNTED: dict[str, tuple[str, dict[str, Any], str]] = {
    "average pooling": ("resnet8", {"base_width": 2}, ""),
    "iSQRT-COV": (
        "resnet8",
        {"base_width": 2, "pooling": ISQRT},
        "1 covariance, Newton-Schulz N = 5 as 12 matrix products",
    ),
    "fewer positions than channels": (
        "resnet8",
        {"base_width": 8, "pooling": ISQRT},
        "1 covariance, Newton-Schulz N = 5 as 12 matrix products",
    ),
    "three steps by the Frobenius norm": (
        "resnet8",
        {"base_width": 2, "pooling": {**ISQRT, "iterations": 3, "prenorm": "frobenius"}},
        "1 covariance, Newton-Schulz N = 3 as 6 matrix products",
    ),
    "one step": (
        "resnet8",
        {"base_width": 2, "pooling": {**ISQRT, "iterations": 1}},
        "1 covariance, Newton-Schulz N = 1 as 1 matrix product",
    ),
    "bilinear pooling": (
        "resnet8",
        {"base_width": 2, "pooling": {"kind": "bcnn"}},
        "1 second moment",
    ),
    "GSoP-Net1": ("gsop-net1-preact-resnet164", {**GSOP, "blocks": 1}, "3 covariances"),
    "GM-SOP": (
        "gmsop-16-8-resnet18",
        TWO_OF_FOUR,
        "2 covariances, Newton-Schulz N = 2 as 3 matrix products (2 times), K = 2 of 4 components gathered",
    ),
}


@pytest.mark.parametrize("case", COUNTED)
def test_the_parts_of_a_graph_are_counted_from_its_nodes(case: str) -> None:
    name, config, described = COUNTED[case]
    graph = graph_of(name, SMALL, **config)
    assert count_second_order(graph.model).describe() == described


def test_self_attention_is_not_of_second_order() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query = nn.Linear(3, 4)
            self.key = nn.Linear(3, 4)

        def forward(self, images: Tensor) -> Tensor:
            tokens = images.flatten(start_dim=2).transpose(1, 2)
            scores = self.query(tokens) @ self.key(tokens).transpose(1, 2)
            return (scores.softmax(dim=2) @ tokens).mean(dim=1)

    program = capture_any_batch(Attention().eval(), Preprocess(resize=4, crop=4), ALONE)
    assert count_second_order(lower(program, ("logits",))).describe() == ""
    assert NOTHING == "no covariance and no matrix square root"
