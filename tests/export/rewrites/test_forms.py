"""Every rewritten part computes what the part it replaces computes; what does not is refused by name."""

from collections.abc import Callable
from functools import partial

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
from sopdeploy.layers.mixture.components import Components, FusionHead, make_components
from sopdeploy.layers.mixture.gate import keep_largest
from sopdeploy.layers.newton_schulz import NewtonSchulzConfig, newton_schulz
from sopdeploy_export.rewrites import linear as fusion_norm
from sopdeploy_export.rewrites.attention import FORMS
from sopdeploy_export.rewrites.centering import Centering, center_by_mean, recognise, textbook_centring
from sopdeploy_export.rewrites.equivalence import prove
from sopdeploy_export.rewrites.linear import folded
from sopdeploy_export.rewrites.mixture import GatheredWeights, forms
from sopdeploy_export.rewrites.newton_schulz import LoweredRoot, iterate, refuse_other_triangle
from sopdeploy_export.rewrites.reference_formulas import ReferenceRoot


def maps(*shape: int) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(shape).relu()


def uneven(part: nn.Module) -> nn.Module:
    """Move every batch norm away from its start."""
    for norm in part.modules():
        if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 2.0)
            nn.init.uniform_(norm.bias, -1.0, 1.0)
            nn.init.uniform_(norm.running_mean, -1.0, 1.0)
            nn.init.uniform_(norm.running_var, 0.2, 2.0)
    return part.eval()


ROOTS = [
    {"iterations": iterations, "prenorm": prenorm, "compensate": compensate}
    for iterations in (1, 2, 5)
    for prenorm in ("trace", "frobenius")
    for compensate in (True, False)
]


@pytest.mark.parametrize("side", [3, 6], ids=["positions fewer than channels", "more"])
@pytest.mark.parametrize("config", ROOTS, ids=str)
@pytest.mark.parametrize("form", [LoweredRoot, ReferenceRoot])
def test_every_form_of_the_root_is_the_root(config: dict, side: int, form: Callable) -> None:
    prove("root", "here", ISqrtCov(12, NewtonSchulzConfig(**config)), form, (maps(2, 12, side, side),))


def test_a_constant_map_has_the_root_of_zero_in_every_form() -> None:
    constant = torch.full((1, 12, 3, 3), 0.3)
    assert LoweredRoot(ISqrtCov(12))(constant).abs().max() < 1e-6


@pytest.mark.parametrize("iterations", [1, 2, 5])
def test_the_iteration_without_scalings_is_the_same_bit_for_bit(iterations: int) -> None:
    x = maps(2, 12, 40).double()
    a = x @ x.transpose(1, 2)
    a = a / a.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
    found = iterate(a, iterations).next_y()
    torch.testing.assert_close(found, newton_schulz(a, iterations), rtol=0, atol=1e-15)


def bank(kind: str, chosen: int) -> tuple[Components, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    root = NewtonSchulzConfig(iterations=3)
    made, _ = make_components(kind, 10, (9, 7), components=6, counted=chosen, root=root)
    weights = keep_largest(torch.randn(3, 6), chosen)
    return made.eval(), (maps(3, 10, 4, 4), weights)


@pytest.mark.parametrize("chosen", [1, 2, 6])
@pytest.mark.parametrize("kind", ["sop", "gap", "linear"])
@pytest.mark.parametrize("form", list(forms(1)))
def test_every_form_of_a_mixture_is_the_mixture(form: str, kind: str, chosen: int) -> None:
    experts, inputs = bank(kind, chosen)
    prove("experts", "mixture", experts, forms(chosen)[form], inputs)


def test_the_sum_in_the_last_product_holds_where_the_iteration_is_on_positions() -> None:
    experts, (_, weights) = bank("sop", 2)
    prove("experts", "mixture", experts, forms(2)["gathered weights"], (maps(3, 10, 2, 2), weights))


def test_weights_that_tie_give_the_same_sum_in_any_order() -> None:
    experts, (x, _) = bank("sop", 2)
    tied = torch.zeros(3, 6)
    tied[:, 1] = tied[:, 4] = 0.5
    prove("experts", "mixture", experts, forms(2)["gathered weights"], (x, tied))


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("activation", ["none", "relu", "lrelu"])
def test_a_folded_excitation_is_the_excitation_on_asymmetric_input(form: str, activation: str) -> None:
    torch.manual_seed(0)
    part = uneven(Excitation(8, 5, activation))
    prove("row norm", "here", part, FORMS[form], (torch.randn(3, 8, 8),))


def test_a_folded_head_is_the_head() -> None:
    torch.manual_seed(0)
    head = uneven(FusionHead(20, 4, norm=True, dropout=0.3))
    prove("fusion norm", "head", head, folded, (torch.randn(3, 20),))


def test_centring_is_recognised_by_its_numbers_and_the_released_position_constant_is_not_centring() -> None:
    known = recognise(textbook_centring(49).astype(np.float32))
    assert known is not None
    assert known.removes_the_mean
    released = np.eye(128) / 64 - np.ones((128, 128)) / 64**2  # GSoP: 128 channels, constants for 64
    trap = recognise(released.astype(np.float32))
    assert trap is not None
    assert not trap.removes_the_mean
    assert recognise(np.random.default_rng(0).normal(size=(8, 8))) is None
    assert Centering(1.0, -0.25, 4).removes_the_mean


@pytest.mark.parametrize("scale", [9, 5], ids=["centring", "almost centring"])
def test_a_product_with_such_a_constant_becomes_a_mean_or_a_sum(scale: int) -> None:
    constant = (np.eye(9) / scale - np.ones((9, 9)) / scale**2).astype(np.float32)
    info = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", 4, 9]) for name in ("x", "y")
    ]
    node = helper.make_node("MatMul", ["x", "J"], ["y"])
    graph = helper.make_graph([node], "g", info[:1], info[1:], [numpy_helper.from_array(constant, "J")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    rewritten, rules = center_by_mean(model)
    onnx.checker.check_model(rewritten, full_check=True)
    kinds = [node.op_type for node in rewritten.graph.node]
    assert kinds[0] == ("ReduceMean" if scale == 9 else "ReduceSum")
    assert "MatMul" not in kinds
    assert ("mean" in rules[0].effect) == (scale == 9)
    assert "J" not in {tensor.name for tensor in rewritten.graph.initializer}
    x = maps(2, 4, 9).numpy()
    found = ort.InferenceSession(rewritten.SerializeToString()).run(None, {"x": x})[0]
    np.testing.assert_allclose(found, x @ constant, atol=1e-6)


def wrong_number_of_steps(before: ISqrtCov) -> nn.Module:
    before.config = before.config.model_copy(update={"iterations": before.config.iterations - 1})
    return LoweredRoot(before)


def other_triangle(before: ISqrtCov) -> nn.Module:
    columns_rows = torch.tril_indices(before.width, before.width)
    before.triangle = columns_rows[0] * before.width + columns_rows[1]
    return LoweredRoot(before)


class NextExpert(GatheredWeights):
    """Takes the weights of the expert after the chosen one."""

    def evaluate(self, x_BMC: Tensor, weights_BN: Tensor) -> tuple[Tensor, Tensor]:
        return super().evaluate(x_BMC, weights_BN.roll(1, dims=1))


def folded_twice(head: FusionHead) -> nn.Module:
    head.fc = folded(head)
    return folded(head)


def row_norm_twice(part: Excitation) -> nn.Module:
    weight, _ = FORMS["convolution"](part).weight, None
    part.row_conv.weight.data = weight
    return FORMS["convolution"](part)


def root() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return ISqrtCov(12), (maps(2, 12, 3, 3),)


def head() -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    return uneven(FusionHead(20, 4, norm=True, dropout=0.0)), (torch.randn(3, 20),)


def excitation() -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    return uneven(Excitation(8, 5, "none")), (torch.randn(3, 8, 8),)


SABOTAGE = {
    "a wrong N": (root, wrong_number_of_steps),
    "a transposed triangle": (root, other_triangle),
    "an expert index off by one": (partial(bank, "sop", 2), partial(NextExpert, chosen=2)),
    "a fusion norm folded twice": (head, folded_twice),
    "a row norm folded twice": (excitation, row_norm_twice),
}


@pytest.mark.parametrize("sabotage", SABOTAGE)
def test_a_wrong_rewrite_is_refused_with_the_rule_and_the_place(sabotage: str) -> None:
    make, build = SABOTAGE[sabotage]
    part, inputs = make()
    with pytest.raises(LoweringError, match=rf"rule '{sabotage}' at layer4: changes the answer"):
        prove(sabotage, "layer4", part, build, inputs)


def test_a_triangle_in_another_order_is_refused_before_anything_is_rewritten() -> None:
    part = ISqrtCov(12)
    part.triangle = part.triangle.flip(0)
    with pytest.raises(LoweringError, match="pooling: its triangle is not the upper one of 12 channels"):
        refuse_other_triangle("pooling", part)


def test_a_norm_that_still_learns_does_not_fold() -> None:
    with pytest.raises(LoweringError, match="without frozen statistics"):
        fusion_norm.affine(nn.BatchNorm1d(3).train())
