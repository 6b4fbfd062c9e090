"""The comparison of regions finds every wrong version of a rule, without any other check."""

import inspect
import types
from collections.abc import Callable
from types import ModuleType

import onnx
import pytest

from sopdeploy_export.rewrites import apply, linear, mixture, newton_schulz
from tests.attacks.rewrite_programs import Program, rank_gate, textbook_root
from tests.attacks.rewrite_programs import mixture as weighted


def root_of(d: int, m: int, norm: str = "trace", **options: object) -> Callable[[], onnx.ModelProto]:
    def build() -> onnx.ModelProto:
        net = Program()
        return net.model(textbook_root(net, net.image(d, m), d, m, norm=norm, **options))  # type: ignore[arg-type]

    return build


def mixture_of_experts() -> onnx.ModelProto:
    net = Program()
    x, logits = net.image(2, 2, 2), net.image(4)
    return net.model(weighted(net, x, rank_gate(net, logits, 4, 2), 4))


def product() -> onnx.ModelProto:
    net = Program()
    return net.model(net.Einsum(net.image(3, 3), net.image(3, 3), equation="bmi,bmj->bij"))


GRAPHS = {
    "loop": (newton_schulz, root_of(3, 6)),
    "inner": (newton_schulz, root_of(6, 3)),
    "centered": (newton_schulz, root_of(6, 3, centered=0.5)),
    "frobenius": (newton_schulz, root_of(6, 3, "frobenius")),
    "mixture": (mixture, mixture_of_experts),
    "einsum": (linear, product),
}
# the graph, the code of the rule and what replaces it
WRONG = {
    "another identity": ("loop", "1.5 * np.eye", "1.25 * np.eye"),
    "half of the first factor": ("loop", "op.Mul(y, 0.5)", "op.Mul(y, 0.25)"),
    "N - 1 iterations": ("loop", "range(root.steps - 1)", "range(root.steps - 2)"),
    "N + 1 iterations": ("loop", "range(root.steps - 1)", "range(root.steps)"),
    "the sign of Z": ("loop", "op.Mul(t, -0.5)", "op.Mul(t, 0.5)"),
    "the sign of Y": ("loop", "op.Sub(identity, op", "op.Add(identity, op"),
    "no last product": ("loop", "return op.MatMul(y, t)", "return y"),
    "Z is never multiplied": ("loop", "else op.MatMul(t, half)\n        y", "else half\n        y"),
    "a root of A instead of A / n": (
        "loop",
        "iterate(op, start.value,",
        "iterate(op, start.gram.node.outputs[0],",
    ),
    "the trace of the whole batch": ("inner", "np.array([1, 2])", "np.array([0, 1, 2])"),
    "twice the trace": ("inner", "norm.factor * np.eye(side)", "2 * norm.factor * np.eye(side)"),
    "the sum of all elements": ("inner", "norm.factor * np.eye(side)", "norm.factor * np.ones((side, side))"),
    "no division by the number of positions": ("inner", "start.factor * root.factor", "root.factor"),
    "no division by the norm": ("inner", "op.Div(root_of_norm, divisor)", "root_of_norm"),
    "no compensation": ("inner", "op.Div(root_of_norm, divisor)", "op.Div(1.0, divisor)"),
    "Y instead of Z": ("inner", 'iterate(op, y, root, "z")', 'iterate(op, y, root, "y")'),
    "the sign of the result": ("inner", "-2.0", "2.0"),
    "the left factor on both sides": ("inner", "scale)), right)", "scale)), left)"),
    "no epsilon": (
        "inner",
        "op.copy(node, *(",
        'copy(op, node.inputs[0], copies) if node.op_type == "Add" else op.copy(node, *(',
    ),
    "another side": ("centered", "op.MatMul(right, left)", "op.MatMul(left, right)"),
    "a sum instead of squares": ("frobenius", "op.Mul(elements, elements)", "elements"),
    "no limit of the norm": (
        "frobenius",
        "op.copy(node, *(",
        'copy(op, node.inputs[0], copies) if node.op_type == "Clip" else op.copy(node, *(',
    ),
    "K - 1 experts": ("mixture", "experts, gate.chosen, Builder", "experts, gate.chosen - 1, Builder"),
    "the smallest weights": ("mixture", '{"axis": 1}', '{"axis": 1, "largest": 0}'),
    "the axis of images": ("mixture", '{"axis": 1}', '{"axis": 0}'),
    "no bias": ("mixture", "else op.Add(x, chosen)", "else x"),
    "weights of other experts": (
        "mixture",
        "array.reshape(count, len(array) // count, array.size // len(array))",
        "array.reshape(count, len(array) // count, array.size // len(array))[::-1]",
    ),
    "no rectifier": ("mixture", "x = op.copy(node, x, *node.inputs[1:])", "pass"),
    "the mean of the experts": (
        "mixture",
        "op.MatMul(op.Unsqueeze(largest, np.array([1])), split)",
        "op.ReduceMean(split, np.array([1]))",
    ),
    "no order of the elements": ("mixture", "total = op.copy(gather, total, gather.inputs[1])", "pass"),
    "swapped operands": ("einsum", "op.MatMul(x, y)", "op.MatMul(y, x)"),
    "a transposed operand": ("einsum", "first if left[1] == summed else", "first if summed else"),
    "a transposed result": ("einsum", "op.MatMul(x, y)", "op.Transpose(op.MatMul(x, y), perm=[0, 2, 1])"),
}


def changed(module: ModuleType, old: str, new: str) -> ModuleType:
    source = inspect.getsource(module)
    assert old in source
    copy = types.ModuleType(module.__name__)
    exec(compile(source.replace(old, new), str(module.__file__), "exec"), vars(copy))  # noqa: S102 - a module of this project
    return copy


@pytest.mark.parametrize("graph", GRAPHS)
def test_the_rule_applies_to_the_graph_of_its_wrong_versions(graph: str) -> None:
    lowered = apply.lower_graph(GRAPHS[graph][1]())
    assert len(lowered.rules) == 1
    assert lowered.refused == ()


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_version_of_a_rule_leaves_the_graph_as_it_is(
    wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, old, new = WRONG[wrong]
    module, build = GRAPHS[graph]
    copy = changed(module, old, new)
    rule = {linear: "einsum_as_product", mixture: "choose_experts", newton_schulz: "shorten_loop"}[module]
    monkeypatch.setattr(apply, "RULES", {"the rule": getattr(copy, rule)})
    model = build()
    lowered = apply.lower_graph(model)
    assert lowered.rules == ()
    assert len(lowered.refused) == 1
    assert lowered.model is model
