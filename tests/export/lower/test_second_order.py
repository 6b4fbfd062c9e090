"""The second-order parts of a graph are counted from its nodes, for every family and form."""

import math
from collections.abc import Callable
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from sopdeploy.bundle.second_order import (
    NOTHING,
    Mixture,
    Root,
    SecondOrder,
    count_second_order,
)
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.layers import ISqrtCov, NewtonSchulzConfig
from sopdeploy.models.registry import create_model
from sopdeploy_export.capture.program import capture_any_batch
from sopdeploy_export.lower.to_onnx import lower, to_ir
from tests.export.conftest import Minimal
from tests.export.once import ALONE, BATCH, graph_of
from tests.support.slow import mostly_slow
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


@pytest.mark.parametrize("case", mostly_slow(COUNTED, "iSQRT-COV"))
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


def lowered_root(channels: int, positions: int, iterations: int = 5) -> onnx.ModelProto:
    """Lower the covariance and the root alone, for a map of random numbers."""
    side = math.isqrt(positions)
    layer = ISqrtCov(channels, NewtonSchulzConfig(iterations=iterations)).eval()
    program = torch.export.export(layer, (torch.rand(1, channels, side, side),))
    return ir.to_proto(to_ir(program, ["map"], ["root"]))


@pytest.mark.parametrize("positions", [16, 49, 196, 784])
@pytest.mark.parametrize("channels", [64, 96, 128, 256])
def test_roots_of_every_size_are_counted(channels: int, positions: int) -> None:
    """torch's converter writes a large identity as other nodes than a small one."""
    counted = count_second_order(lowered_root(channels, positions))
    assert counted == SecondOrder(1, 0, (Root(5, 12),), ())


@pytest.mark.parametrize(("steps", "products"), [(1, 1), (3, 6), (7, 18), (12, 33)])
def test_every_number_of_steps_is_counted(steps: int, products: int) -> None:
    assert count_second_order(lowered_root(96, 196, steps)).roots == (Root(steps, products),)


PAPERS: dict[str, tuple[int, dict[str, Any], SecondOrder]] = {
    "isqrt-resnet50": (224, {}, SecondOrder(1, 0, (Root(5, 12),), ())),
    "gsop-net2-resnet50": (224, {"iterations": 3}, SecondOrder(4, 0, (Root(3, 6),), ())),
    "gmsop-16-8-resnet18": (
        64,
        {"gate_widths": (256, 128)},
        SecondOrder(2, 0, (Root(5, 12),) * 2, (Mixture(8, 16),)),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PAPERS)
def test_roots_of_the_widths_of_the_papers_are_counted(name: str) -> None:
    side, config, expected = PAPERS[name]
    network = create_model(name, num_classes=10, **config).eval()
    program = capture_any_batch(network, Preprocess(resize=side, crop=side), ALONE)
    assert count_second_order(lower(program, network.outputs)) == expected


def covariance_of(images: Tensor, channels: int) -> Tensor:
    """Compute a covariance (B, C, C) of sums of the colors of *images*."""
    weights = torch.linspace(-1, 1, 3 * channels).reshape(channels, 3)
    x = weights @ images.flatten(2)
    x = x - x.mean(2, keepdim=True)
    return x @ x.mT / x.shape[2]


def iterate(a: Tensor, identity: Tensor, step: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Take three Newton-Schulz steps; *step* computes T of the identity and Z Y."""
    y, z = a, identity
    for _ in range(3):
        t = step(identity, z @ y)
        y, z = y @ t, t @ z
    return y


def stored_iterates(a: Tensor) -> Tensor:
    """Take three steps whose iterates are parts of two tensors, as training code keeps them."""
    size = a.shape[1]
    identity = 3.0 * torch.eye(size).view(1, size, size).repeat(a.shape[0], 1, 1)
    ys = torch.zeros(a.shape[0], 2, size, size)
    zs = torch.eye(size).view(1, size, size).repeat(a.shape[0], 2, 1, 1)
    zs[:, 0] = 0.5 * (identity - a)
    ys[:, 0] = a.bmm(zs[:, 0])
    t = 0.5 * (identity - zs[:, 0].bmm(ys[:, 0]))
    ys[:, 1] = ys[:, 0].bmm(t)
    zs[:, 1] = t.bmm(zs[:, 0])
    return 0.5 * ys[:, 1].bmm(identity - zs[:, 1].bmm(ys[:, 1]))


def halves(identity: Tensor, product: Tensor) -> Tensor:
    return 0.5 * (3 * identity - product)


OWN: dict[str, tuple[Callable[[Tensor], Tensor], tuple[Root, ...]]] = {
    "an identity for all images": (
        lambda a: iterate(a, torch.eye(a.shape[1]), halves),
        (Root(3, 6),),
    ),
    "an identity for each image": (
        lambda a: iterate(a, torch.eye(a.shape[1]).expand_as(a), halves),
        (Root(3, 6),),
    ),
    "a sum with a negative factor": (
        lambda a: iterate(a, torch.eye(a.shape[1]), lambda i, p: p * -0.5 + 1.5 * i),
        (Root(3, 6),),
    ),
    "a covariance with a small multiple of the identity": (
        lambda a: iterate(a + 1e-3 * torch.eye(a.shape[1]), torch.eye(a.shape[1]), halves),
        (Root(3, 6),),
    ),
    "two roots of one covariance": (
        lambda a: (
            iterate(a, torch.eye(a.shape[1]), halves)
            + iterate(2 * a, 2 * torch.eye(a.shape[1]), halves)
        ),
        (Root(3, 6), Root(3, 6)),
    ),
    "iterates kept in tensors": (stored_iterates, (Root(3, 6),)),
    "no root, but a small multiple of the identity": (
        lambda a: a + 1e-3 * torch.eye(a.shape[1]),
        (),
    ),
    "no root, but a difference": (lambda a: torch.eye(a.shape[1]) - a, ()),
}


@pytest.mark.parametrize("channels", [4, 96])
@pytest.mark.parametrize(
    "form", mostly_slow(OWN, "an identity for each image", "no root, but a difference")
)
def test_roots_in_code_of_users_are_counted(form: str, channels: int) -> None:
    function, roots = OWN[form]
    network = Minimal(lambda x: function(covariance_of(x, channels)).mean(2)).eval()
    model = lower(capture_any_batch(network, Preprocess(resize=4, crop=4), BATCH), ("logits",))
    assert count_second_order(model) == SecondOrder(1, 0, roots, ())


def test_a_mean_of_products_less_the_product_of_means_has_one_root() -> None:
    def root(images: Tensor) -> Tensor:
        x = images.flatten(2)
        mean = x.mean(2, keepdim=True)
        covariance = x @ x.mT / x.shape[2] - mean @ mean.mT
        return iterate(covariance, torch.eye(3), halves).mean(2)

    model = lower(
        capture_any_batch(Minimal(root).eval(), Preprocess(resize=4, crop=4), ALONE),
        ("logits",),
    )
    assert count_second_order(model).roots == (Root(3, 6),)
