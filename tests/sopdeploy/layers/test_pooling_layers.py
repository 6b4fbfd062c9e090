"""Every global pooling against the formula of its paper."""

import math
import random

import pytest
import torch
from torch import Tensor

from sopdeploy.backbones.base import initialize
from sopdeploy.layers.pooling.compact_bilinear import draw_sketch
from sopdeploy.layers.spectral import square_root
from tests.sopdeploy.layers.numerics.all_poolings import EACH_POOLING, build
from tests.sopdeploy.layers.numerics.references import relu_features

CHANNELS = 5


def columns(features: Tensor, image: int) -> list[Tensor]:
    """Return the positions of an image, each a vector of channels."""
    return list(features[image].flatten(1).T)


def second_moment(features: Tensor, image: int, *, centred: bool) -> Tensor:
    positions = columns(features, image)
    mean = sum(positions) / len(positions) if centred else torch.zeros_like(positions[0])
    return sum(torch.outer(x - mean, x - mean) for x in positions) / len(positions)


def function_of(matrix: Tensor, function) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(function(values.clamp_min(0))) @ vectors.T


def triangle(matrix: Tensor) -> Tensor:
    size = len(matrix)
    return torch.stack([matrix[i, j] for i in range(size) for j in range(i, size)])


def unit_signed_root(vector: Tensor) -> Tensor:
    rooted = torch.sign(vector) * torch.sqrt(vector.abs() + 1e-8)
    return rooted / rooted.norm()


def largest(features: Tensor, image: int) -> Tensor:
    """Return the maxima (C, 2, 2) of the quarters of 4 x 4 maps."""
    return torch.stack(
        [features[image, :, r : r + 2, c : c + 2].amax((1, 2)) for r in (0, 2) for c in (0, 2)], 1
    ).view(-1, 2, 2)


def mpncov(features, image, power=0.5) -> Tensor:
    return function_of(second_moment(features, image, centred=True), lambda values: values**power)


def deepo2p(features, image, *, centred: bool = True) -> Tensor:
    cov = second_moment(features, image, centred=centred)
    return function_of(cov, lambda values: torch.log(values + 1e-3))


def gaussian(features, image) -> Tensor:
    cov, mean = second_moment(features, image, centred=True), sum(columns(features, image)) / 16
    top = torch.cat([cov + torch.outer(mean, mean), mean[:, None]], dim=1)
    return torch.cat([top, torch.cat([mean, torch.ones(1, dtype=mean.dtype)])[None]])


def iterated(matrix: Tensor) -> Tensor:
    norm, identity = matrix.norm(), torch.eye(len(matrix), dtype=matrix.dtype)
    y, z = matrix / norm, identity
    for _ in range(5):
        step = (3 * identity - z @ y) / 2
        y, z = y @ step, step @ z
    return y * norm.sqrt()


def root(matrix: Tensor) -> Tensor:
    return function_of(matrix, torch.sqrt)


def bilinear(features, image) -> Tensor:
    return second_moment(features, image, centred=False)


REFERENCES = [
    ("gap", lambda f, i: sum(columns(f, i)) / 16),
    ({"kind": "flatten", "side": 2}, lambda f, i: largest(f, i).flatten()),
    ({"kind": "flatten", "side": 1}, lambda f, i: largest(f, i).mean(dim=(1, 2))),
    ("mpncov", lambda f, i: triangle(mpncov(f, i))),
    ({"kind": "mpncov", "power": 0.7}, lambda f, i: triangle(mpncov(f, i, 0.7))),
    ("deepo2p", lambda f, i: triangle(deepo2p(f, i))),
    (
        {"kind": "deepo2p", "centered": False, "width": None},
        lambda f, i: triangle(deepo2p(f, i, centred=False)),
    ),
    ("bcnn", lambda f, i: unit_signed_root(bilinear(f, i).flatten())),
    ("improved-bcnn", lambda f, i: unit_signed_root(root(bilinear(f, i)).flatten())),
    (
        {"kind": "improved-bcnn", "root": "newton-schulz"},
        lambda f, i: unit_signed_root(iterated(bilinear(f, i)).flatten()),
    ),
    ("g2denet", lambda f, i: root(gaussian(f, i)).flatten()),
    ({"kind": "g2denet", "root": "newton-schulz"}, lambda f, i: iterated(gaussian(f, i)).flatten()),
]


@pytest.mark.parametrize(
    ("choice", "reference"), REFERENCES, ids=lambda value: "" if callable(value) else str(value)[:48]
)
def test_pooling_is_the_formula_of_its_paper(choice, reference) -> None:
    features = relu_features(2, CHANNELS, 4)
    pooling = build(choice, CHANNELS)
    found = pooling(features)
    expected = torch.stack([reference(features, image) for image in range(2)])
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(pooling(features.float()).double(), expected, rtol=2e-3, atol=2e-4)


def convolved(x: Tensor, sketches: list[tuple[list[int], list[float]]], dim: int) -> Tensor:
    """Return the tensor sketch of one position, by the circular convolution itself."""
    result = torch.zeros(dim, dtype=x.dtype)
    result[0] = 1
    for indices, signs in sketches:
        sketch = torch.zeros(dim, dtype=x.dtype)
        for value, index, sign in zip(x, indices, signs, strict=True):
            sketch[index] += sign * value
        result = sum(result[k] * sketch.roll(k) for k in range(dim))
    return result


def test_compact_bilinear_sums_the_circular_convolutions_of_positions() -> None:
    features = relu_features(2, CHANNELS, 3)
    generator = random.Random(7)
    sketches = [draw_sketch(generator, CHANNELS, 16) for _ in range(2)]
    found = build({"kind": "cbp", "dim": 16, "seed": 7}, CHANNELS)(features)
    for image in range(2):
        summed = sum(convolved(x, sketches, 16) for x in columns(features, image))
        torch.testing.assert_close(found[image], unit_signed_root(summed))


def test_kernel_pooling_concatenates_the_sketches_of_four_orders() -> None:
    features = relu_features(1, CHANNELS, 3)
    pooling = build({"kind": "kernel", "dim": 16, "seed": 3}, CHANNELS).double()
    generator = random.Random(3)
    sketches = [[draw_sketch(generator, CHANNELS, 16) for _ in range(p)] for p in (2, 3, 4)]
    orders = []
    for x in columns(features, 0):
        high = [
            convolved(x, part, 16) / math.sqrt(math.factorial(p)) for p, part in enumerate(sketches, start=2)
        ]
        orders.append(torch.cat([torch.ones(1, dtype=x.dtype), x, *high]))
    mean = sum(orders) / len(orders)
    rooted = mean / torch.sqrt(mean.abs() + 1e-8)
    expected = rooted / rooted.norm()
    torch.testing.assert_close(pooling(features)[0], expected, rtol=1e-6, atol=1e-8)


def test_sketches_depend_only_on_the_seed() -> None:
    sketch = draw_sketch(random.Random(0), 6, 100)
    assert sketch.indices == [84, 75, 42, 25, 51, 40]
    assert sketch.signs == [-1.0, 1.0, 1.0, -1.0, -1.0, -1.0]


def test_low_rank_logits_equal_the_full_matrices() -> None:
    torch.manual_seed(1)
    features = relu_features(2, CHANNELS, 4)
    pooling = build({"kind": "low-rank-bilinear", "width": 3, "rank": 4}, CHANNELS).double()
    classifier = pooling.classifier(7).double()
    logits = classifier(pooling(features))
    factors = classifier.factors.weight.view(7, 4, 3)
    for image in range(2):
        s = second_moment(pooling.layer_reduce(features), image, centred=False)
        for k in range(7):
            u, v = factors[k, :2].T, factors[k, 2:].T
            expected = torch.trace((u @ u.T - v @ v.T).T @ s) + classifier.bias[k]
            torch.testing.assert_close(logits[image, k], expected)


def soft_words(pooling, x: Tensor) -> Tensor:
    weight, bias = pooling.assignment.weight[:, :, 0, 0], pooling.assignment.bias
    return torch.softmax(weight @ x + bias, dim=0)


@pytest.mark.parametrize("centres", ["uniform", "normal"])
def test_netvlad_sums_assigned_residuals_and_normalizes_twice(centres: str) -> None:
    torch.manual_seed(2)
    layer = build({"kind": "netvlad", "words": 3, "centres": centres}, 4).double()
    maps = torch.randn(2, 4, 2, 5, dtype=torch.float64, requires_grad=True)
    share = layer.assignment(maps).softmax(dim=1)
    differences = maps[:, None] - layer.centres[None, :, :, None, None]
    residuals = (share[:, :, None] * differences).sum(dim=(3, 4))
    expected = (residuals / residuals.norm(dim=2, keepdim=True)).flatten(start_dim=1)
    expected = expected / expected.norm(dim=1, keepdim=True)
    torch.testing.assert_close(layer(maps), expected, rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(layer, (maps,), fast_mode=True)


@pytest.mark.parametrize("kind", ["netvlad", "netfv"])
def test_words_are_assigned_by_distance_at_first(kind: str) -> None:
    maps = torch.randn(2, 4, 2, 5, dtype=torch.float64)
    layer = build({"kind": kind, "words": 3, "alpha": 0.7}, 4)
    initialize(layer)  # as the backbones do
    layer = layer.double()
    distances = (maps[:, None] - layer.centres[None, :, :, None, None]).square().sum(dim=2)
    found = layer.assignment(maps).softmax(dim=1)
    torch.testing.assert_close(found, (-0.7 * distances).softmax(dim=1), rtol=0, atol=1e-6)


def test_netfv_sums_differences_and_their_squares() -> None:
    features = relu_features(1, CHANNELS, 4)
    pooling = build({"kind": "netfv", "words": 3}, CHANNELS).double()
    halves = []
    for power in (1, 2):
        words = [
            sum(soft_words(pooling, x)[k] * (x - pooling.centres[k]) ** power for x in columns(features, 0))
            for k in range(3)
        ]
        half = torch.cat([word / word.norm() for word in words])
        halves.append(half / half.norm())
    torch.testing.assert_close(pooling(features)[0], torch.cat(halves) / torch.cat(halves).norm())


@pytest.mark.parametrize("kind", ["improved-bcnn", "g2denet"])
def test_the_lyapunov_gradient_solves_the_equation_of_the_root(kind: str) -> None:
    layer = build({"kind": kind, "root": "newton-schulz", "iterations": 15, "backward": "lyapunov"}, 3)
    torch.manual_seed(6)
    matrix = torch.randn(2, 4, 6, dtype=torch.float64)
    matrix = (matrix @ matrix.transpose(1, 2)).requires_grad_()
    grad = torch.randn(2, 4, 4, dtype=torch.float64)
    found = torch.autograd.grad(square_root(matrix, layer.config), matrix, grad)[0]
    for image in range(2):
        r, eye = root(matrix[image].detach()).contiguous(), torch.eye(4, dtype=torch.float64)
        solved = torch.linalg.solve(torch.kron(r, eye) + torch.kron(eye, r), grad[image].flatten())
        torch.testing.assert_close(found[image].flatten(), solved, rtol=1e-6, atol=1e-8)


@EACH_POOLING
def test_gradients_are_those_of_finite_differences(choice) -> None:
    torch.manual_seed(4)
    features = relu_features(2, 4, 4)
    if isinstance(choice, dict) and choice["kind"] == "flatten":  # equal maxima have no gradient
        features = torch.rand_like(features)
    features.requires_grad_()
    pooling = build(choice, 4).double().eval()
    assert torch.autograd.gradcheck(pooling, (features,), fast_mode=True, nondet_tol=1e-10)


def test_batch_norm_can_replace_the_compensation() -> None:
    torch.manual_seed(5)
    pooling = build({"kind": "isqrt", "compensation": "batch_norm"}, 6)
    vector = pooling(torch.rand(64, 6, 4, 4))
    torch.testing.assert_close(vector.mean(dim=0), torch.zeros(21), atol=1e-5, rtol=0)
    bare = build({"kind": "isqrt", "compensation": "none"}, 6)
    features = torch.rand(2, 6, 4, 4)
    torch.testing.assert_close(bare(9.0 * features), bare(features))
