"""Every replacement computes what the original part computes; a wrong one is rejected by rule and place."""

from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn

from sopdeploy.errors import LoweringError
from sopdeploy.layers.attention.gsop_attention import Excitation
from sopdeploy.layers.isqrt_cov import ISqrtCov
from sopdeploy.layers.mixture.components import Components, Convolutions, FusionHead, make_components
from sopdeploy.layers.mixture.gate import keep_largest
from sopdeploy.layers.newton_schulz import NewtonSchulzConfig, newton_schulz
from sopdeploy_export.rewrites.apply import center_by_mean, recognize
from sopdeploy_export.rewrites.attention import FORMS
from sopdeploy_export.rewrites.context import assert_equivalent
from sopdeploy_export.rewrites.linear import affine, fold_head
from sopdeploy_export.rewrites.mixture import forms
from sopdeploy_export.rewrites.newton_schulz import Centering, LoweredRoot, check_triangle, iterate
from sopdeploy_export.rewrites.reference_formulas import ReferenceRoot

Case = tuple[nn.Module, tuple[Tensor, ...]]


def maps(*shape: int) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(shape).relu()


def bank(kind: str, chosen: int) -> tuple[Components, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    root = NewtonSchulzConfig(iterations=3)
    made, _ = make_components(kind, 10, Convolutions((9, 7)), components=6, counted=chosen, root=root)
    weights = keep_largest(torch.randn(3, 6), chosen)
    return made.eval(), (maps(3, 10, 4, 4), weights)


def root() -> Case:
    return ISqrtCov(width=12), (maps(2, 12, 3, 3),)


def with_norm(build: Callable[[], nn.Module], *shape: int) -> Case:
    """Build a part whose batch norms do not have their initial values."""
    torch.manual_seed(0)
    part = build()
    for norm in part.modules():
        if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 2.0)
            nn.init.uniform_(norm.bias, -1.0, 1.0)
            nn.init.uniform_(norm.running_mean, -1.0, 1.0)
            nn.init.uniform_(norm.running_var, 0.2, 2.0)
    return part.eval(), (torch.randn(*shape),)


def head(dropout: float = 0.0) -> Case:
    return with_norm(lambda: FusionHead(20, 4, norm=True, dropout=dropout), 3, 20)


def excitation(activation: str = "none", *, norm: bool = False) -> Case:
    return with_norm(lambda: Excitation(8, 5, activation, norm=norm), 3, 8, 8)


@pytest.mark.parametrize("side", [3, 6], ids=["positions fewer than channels", "more"])
@pytest.mark.parametrize("compensate", [True, False])
@pytest.mark.parametrize("prenorm", ["trace", "frobenius"])
@pytest.mark.parametrize("iterations", [1, 2, 5])
@pytest.mark.parametrize("form", [LoweredRoot, ReferenceRoot])
def test_every_form_of_the_root_is_equivalent(
    form: Callable, iterations: int, prenorm: str, compensate: bool, side: int
) -> None:
    config = NewtonSchulzConfig(iterations=iterations, prenorm=prenorm, compensate=compensate)
    assert_equivalent("root", "here", ISqrtCov(12, config), form, (maps(2, 12, side, side),))


def test_constant_map_has_a_zero_root() -> None:
    assert LoweredRoot(ISqrtCov(width=12))(torch.full((1, 12, 3, 3), 0.3)).abs().max() < 1e-6


@pytest.mark.parametrize("iterations", [1, 2, 5])
def test_iteration_equals_the_librarys(iterations: int) -> None:
    x = maps(2, 12, 40).double()
    a = x @ x.transpose(1, 2)
    a = a / a.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
    found = iterate(a, iterations).next_y()
    torch.testing.assert_close(found, newton_schulz(a, iterations), rtol=0, atol=1e-15)


@pytest.mark.parametrize("chosen", [1, 2, 6])
@pytest.mark.parametrize("kind", ["sop", "gap", "linear"])
@pytest.mark.parametrize("form", list(forms(1)))
def test_every_form_of_a_mixture_is_equivalent(form: str, kind: str, chosen: int) -> None:
    experts, inputs = bank(kind, chosen)
    assert_equivalent("experts", "mixture", experts, forms(chosen)[form], inputs)


def test_mixture_is_equivalent_in_the_gram_domain_and_with_tied_weights() -> None:
    experts, (x, weights) = bank("sop", 2)
    tied = torch.zeros(3, 6)
    tied[:, 1] = tied[:, 4] = 0.5
    for inputs in ((maps(3, 10, 2, 2), weights), (x, tied)):
        assert_equivalent("experts", "mixture", experts, forms(2)["gathered weights"], inputs)


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize(("activation", "norm"), [("none", False), ("relu", False), ("lrelu", True)])
def test_folded_excitation_is_equivalent_on_asymmetric_input(form, activation: str, norm: bool) -> None:
    part, inputs = excitation(activation, norm=norm)
    assert_equivalent("row norm", "here", part, FORMS[form], inputs)


def test_folded_head_is_equivalent() -> None:
    part, inputs = head(dropout=0.3)
    assert_equivalent("fusion norm", "head", part, fold_head, inputs)


def constant(size: int, count: int) -> np.ndarray:
    return (np.eye(size) / count - np.ones((size, size)) / count**2).astype(np.float32)


def test_centering_is_recognized_by_its_numbers() -> None:
    assert recognize(constant(49, 49)).removes_the_mean
    assert not recognize(constant(128, 64)).removes_the_mean  # released GSoP: 128 channels, constants for 64
    assert recognize(np.random.default_rng(0).normal(size=(8, 8))) is None
    assert Centering(1.0, -0.25, 4).removes_the_mean


@pytest.mark.parametrize("count", [9, 5], ids=["centering", "almost centering"])
def test_product_with_such_a_constant_becomes_a_mean_or_a_sum(count: int) -> None:
    info = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", 4, 9]) for name in ("x", "y")
    ]
    node = helper.make_node("MatMul", ["x", "J"], ["y"])
    weights = [numpy_helper.from_array(constant(9, count), "J")]
    graph = helper.make_graph([node], "g", info[:1], info[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    rewritten, rules = center_by_mean(model)
    onnx.checker.check_model(rewritten, full_check=True)
    operators = [node.op_type for node in rewritten.graph.node]
    assert operators[0] == ("ReduceMean" if count == 9 else "ReduceSum")
    assert "MatMul" not in operators
    assert ("mean" in rules[0].effect) == (count == 9)
    assert "J" not in {tensor.name for tensor in rewritten.graph.initializer}
    x = maps(2, 4, 9).numpy()
    found = ort.InferenceSession(rewritten.SerializeToString()).run(None, {"x": x})[0]
    np.testing.assert_allclose(found, x @ constant(9, count), atol=1e-6)


def test_triangle_in_another_order_is_rejected_before_the_rewrite() -> None:
    part = ISqrtCov(width=12)
    part.triangle = part.triangle.flip(0)
    with pytest.raises(LoweringError, match="pooling: its indices are not the upper triangle of 12 channels"):
        check_triangle("pooling", part)


def test_norm_in_train_mode_is_not_folded() -> None:
    with pytest.raises(LoweringError, match="without frozen statistics"):
        affine(nn.BatchNorm1d(3).train())
