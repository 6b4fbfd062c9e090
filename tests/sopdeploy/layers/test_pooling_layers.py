"""Every global pooling against the formula of its paper, and as ONNX."""

import math
import random
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import Compose, ToTensor
from torchvision.transforms import Normalize as TorchvisionNormalize

from sopdeploy.backbones.base import initialize
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.layers.covariance import (
    centered_and_scaled,
    covariance,
    covariance_trace,
    frobenius_norm,
)
from sopdeploy.layers.isqrt_cov import ISqrtCov, NewtonSchulzConfig
from sopdeploy.layers.normalize import Normalize
from sopdeploy.layers.pooling.bilinear import draw_sketch
from sopdeploy.layers.pooling.covariance import square_root
from tests.gpu_graphs import accepted
from tests.sopdeploy.layers.numerics.all_poolings import (
    CHOICES,
    EACH_POOLING,
    build,
    name,
    relu_features,
    textbook_root,
)

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


POOLINGS = {name(choice): build(choice, 8).eval() for choice in CHOICES}
EXPORTABLE = {key: pooling for key, pooling in POOLINGS.items() if pooling.not_exportable is None}


class SideBySide(nn.Module):
    """All exportable poolings of one feature map, so that one export serves them all."""

    def __init__(self) -> None:
        super().__init__()
        self.poolings = nn.ModuleList(EXPORTABLE.values())

    def forward(self, features: Tensor) -> list[Tensor]:
        return [pooling(features) for pooling in self.poolings]


def export(network: nn.Module, side: int, path: Path) -> None:
    """Write *network* for maps of 8 channels, *side* x *side* and any batch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network.eval(),
            (torch.rand(2, 8, side, side),),
            path,
            dynamo=True,
            input_names=["features"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )


def run(path: Path, features: Tensor) -> list[Tensor]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(array) for array in session.run(None, {"features": features.numpy()})]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "poolings.onnx"
    export(SideBySide(), 4, path)
    return path


@pytest.mark.parametrize("batch", [1, 3])
def test_the_exported_file_gives_the_numbers_of_the_layers(exported: Path, batch: int) -> None:
    features = torch.randn(batch, 8, 4, 4).relu()
    for (key, pooling), found in zip(EXPORTABLE.items(), run(exported, features), strict=True):
        with torch.no_grad():
            expected = pooling(features)
        assert found.shape == expected.shape, key
        assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4), key


def test_gpu_runtimes_accept_the_exported_file(exported: Path) -> None:
    accepted(onnx.load(exported), "fp32")


@pytest.mark.parametrize(("side", "around"), [(2, 3), (5, 1)], ids=["X^T X, X Z, (X Z) X^T", "X X^T"])
def test_the_iteration_is_unrolled_into_the_products_it_takes(side, around, tmp_path: Path) -> None:
    pooling = build("isqrt", 8)
    export(pooling, side, tmp_path / "isqrt.onnx")
    operators = [node.op_type for node in onnx.load(tmp_path / "isqrt.onnx").graph.node]
    assert operators.count("MatMul") == 3 * 5 - 3 + around
    features = torch.randn(3, 8, side, side).relu()
    torch.testing.assert_close(
        run(tmp_path / "isqrt.onnx", features)[0], pooling(features), rtol=1e-4, atol=1e-6
    )


PRENORMS = ["trace", "frobenius"]


@pytest.mark.parametrize("prenorm", PRENORMS)
@pytest.mark.parametrize("compensate", [True, False])
@pytest.mark.parametrize(("width", "side"), [(6, 7), (16, 3), (1, 4)], ids=["M>d", "M<d", "one channel"])
def test_layer_equals_a_reference_in_float64(prenorm, compensate: bool, width: int, side: int) -> None:
    torch.manual_seed(0)
    for iterations in range(1, 10):
        config = NewtonSchulzConfig(iterations=iterations, prenorm=prenorm, compensate=compensate)
        features = torch.randn(2, width, side, side).relu()
        expected = torch.stack([triangle(root) for root in textbook_root(features.double(), config)])
        layer = ISqrtCov(width, config)
        torch.testing.assert_close(layer(features.double()), expected, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(layer(features).double(), expected, rtol=1e-3, atol=1e-5)


@given(scale=st.floats(1e-3, 1e4), shift=st.floats(-10, 10), seed=st.integers(0, 99))
def test_output_scales_with_the_features_and_ignores_their_mean(scale, shift, seed) -> None:
    layer = ISqrtCov(5)
    features = torch.randn(1, 5, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    expected = scale * layer(features)
    torch.testing.assert_close(layer(scale * (features + shift)), expected, rtol=1e-6, atol=1e-8 * scale)


@given(channels=st.integers(1, 6), height=st.integers(1, 4), width=st.integers(1, 4), seed=st.integers(0, 99))
def test_covariance_equals_numpy(channels: int, height: int, width: int, seed: int) -> None:
    features = np.random.default_rng(seed).normal(3.0, 2.0, (2, channels, height, width))
    found = covariance(centered_and_scaled(torch.from_numpy(features)))
    for image, cov in zip(features, found, strict=True):
        expected = np.atleast_2d(np.cov(image.reshape(channels, -1), bias=True))
        np.testing.assert_allclose(cov, expected, rtol=1e-9, atol=1e-12)


def test_trace_and_norm_are_those_of_the_covariance() -> None:
    x = centered_and_scaled(torch.randn(3, 7, 4, 4, dtype=torch.float64))
    cov = covariance(x)
    trace = cov.diagonal(dim1=1, dim2=2).sum(1)
    torch.testing.assert_close(covariance_trace(covariance(x)), trace[:, None, None])
    torch.testing.assert_close(frobenius_norm(cov), torch.linalg.matrix_norm(cov)[:, None, None])


@pytest.mark.parametrize("level", [0.0, 0.1, 1e4, -3.3])
def test_trace_of_a_constant_map_is_never_negative(level: float) -> None:
    x = centered_and_scaled(torch.full((1, 64, 14, 14), level))
    assert 0 <= covariance_trace(covariance(x)).item() <= (abs(level) * 1e-5) ** 2 * 64


MEANS = st.tuples(*[st.floats(0.0, 1.0)] * 3)
STDS = st.tuples(*[st.floats(0.01, 2.0)] * 3)


@given(mean=MEANS, std=STDS, seed=st.integers(0, 1000))
def test_normalize_equals_torchvision(mean, std, seed) -> None:
    image = np.random.default_rng(seed).integers(0, 256, (7, 5, 3), dtype=np.uint8)
    expected = Compose([ToTensor(), TorchvisionNormalize(mean, std)])(Image.fromarray(image))
    found = Normalize(Preprocess(mean=mean, std=std))(torch.from_numpy(image)[None])[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6 / min(std))
