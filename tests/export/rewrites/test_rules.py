"""Each rule keeps every output of a graph, in float64, for random shapes and values."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from sopdeploy.bundle.onnx_root import onnx_root
from sopdeploy.errors import LoweringError
from sopdeploy_export.rewrites import linear, mixture, newton_schulz
from sopdeploy_export.rewrites.apply import RULES, lower_graph, reapply

Draw = Callable[[st.SearchStrategy[Any]], Any]
BATCH = 2


class Net:
    """Builds an ONNX graph in float64: `net.MatMul(a, b)` adds an operator; arrays become constants."""

    def __init__(self, draw: Draw) -> None:
        self.draw, self.nodes, self.constants, self.inputs = draw, [], [], {}

    def __getattr__(self, kind: str) -> Callable[..., str]:
        def add(*inputs: Any, outputs: int = 1, **attributes: Any) -> Any:
            names = [
                given if isinstance(given, str) else self.constant(np.asarray(given)) for given in inputs
            ]
            results = [f"v{len(self.nodes)}_{i}" for i in range(outputs)]
            self.nodes.append(helper.make_node(kind, names, results, **attributes))
            return results[0] if outputs == 1 else results

        return add

    def constant(self, array: NDArray[Any]) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(array, name))
        return name

    def values(self, *shape: int, low: float = -2.0, high: float = 2.0) -> NDArray[Any]:
        numbers = st.integers(int(low * 64), int(high * 64)).map(lambda n: n / 64)
        return self.draw(arrays.arrays(np.float64, shape, elements=numbers))

    def image(self, *shape: int) -> str:
        """Add an input with one value per image."""
        name = f"x{len(self.inputs)}"
        self.inputs[name] = self.values(BATCH, *shape)
        return name

    def model(self, *outputs: str) -> onnx.ModelProto:
        def describe(name: str, shape: tuple[int, ...] | None) -> onnx.ValueInfoProto:
            sizes = None if shape is None else ["batch", *shape[1:]]
            return helper.make_tensor_value_info(name, onnx.TensorProto.DOUBLE, sizes)

        inputs = [describe(name, value.shape) for name, value in self.inputs.items()]
        graph = helper.make_graph(
            self.nodes, "g", inputs, [describe(name, None) for name in outputs], self.constants
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
        return onnx.shape_inference.infer_shapes(model)


def centered(net: Net, x: str) -> str:
    return net.Sub(x, net.ReduceMean(x, np.array([2]), keepdims=1))


def root(net: Net, x: str, *, d: int, m: int, steps: int) -> str:
    """Write the root of the covariance of *x* (B, d, m) in one of many ways."""
    way = {
        name: net.draw(st.booleans()) for name in ("trace", "swap", "half", "keep", "expand", "compensate")
    }
    other = net.Transpose(x, perm=[0, 2, 1])
    a = net.Div(net.MatMul(x, other), float(m)) if way["half"] else net.MatMul(net.Mul(x, 1.0 / m), other)
    eye = np.eye(d)
    if way["trace"]:
        norm = net.ReduceSum(net.Mul(a, eye), np.array([1, 2]), keepdims=int(way["keep"]))
    else:
        norm = net.Sqrt(net.ReduceSum(net.Mul(a, a), np.array([1, 2]), keepdims=int(way["keep"])))
    norm = net.Add(norm, 0.125)
    norm = norm if way["keep"] else net.Reshape(norm, np.array([-1, 1, 1]))
    y, z = net.Div(a, norm), net.constant(eye)
    for _ in range(steps):
        product = net.MatMul(*((y, z) if way["swap"] else (z, y)))
        t = net.Sub(3 * eye, product) if way["half"] else net.Sub(1.5 * eye, net.Mul(product, 0.5))
        y, z = net.MatMul(y, t), net.MatMul(t, z)
        if way["half"]:
            y, z = net.Mul(y, 0.5), net.Mul(0.5, z)
    return net.Mul(y, net.Sqrt(norm)) if way["compensate"] else y


def newton_schulz_case(net: Net) -> onnx.ModelProto:
    d, m, steps = (net.draw(st.integers(*ends)) for ends in ((2, 5), (2, 5), (1, 3)))
    x = net.image(d, m)
    return net.model(root(net, centered(net, x), d=d, m=m, steps=steps), net.Neg(x))


def centering_case(net: Net) -> onnx.ModelProto:
    n, alpha = net.draw(st.integers(2, 6)), net.draw(st.sampled_from([-1.0, 0.125, 2.0]))
    constant = net.constant((alpha * (np.eye(n) - 1 / n))[None])
    if net.draw(st.booleans()):
        constant = net.Tile(constant, np.array([BATCH, 1, 1]))
    return net.model(net.MatMul(net.image(3, n), constant))


def einsum_case(net: Net) -> onnx.ModelProto:
    left, right = net.draw(st.sampled_from(["im", "mi"])), net.draw(st.sampled_from(["jm", "mj"]))
    first, second = (net.image(*(2 if axis in "ij" else 3 for axis in axes)) for axes in (left, right))
    return net.model(net.Einsum(first, second, equation=f"b{left},b{right}->bij"))


def gate(net: Net, count: int, chosen: int) -> str:
    """Compute softmax weights of which *chosen* of *count* are not 0."""
    logits = net.image(count)
    if net.draw(st.booleans()):
        kept, index = net.TopK(logits, np.array([chosen]), axis=1, outputs=2)
        return net.ScatterElements(
            net.Expand(np.zeros((1, count)), net.Shape(logits)), index, net.Softmax(kept, axis=1), axis=1
        )
    other, own = net.Unsqueeze(logits, np.array([1])), net.Unsqueeze(logits, np.array([2]))
    earlier = np.tril(np.ones((count, count), bool), -1)
    ahead = net.Or(net.Greater(other, own), net.And(net.Equal(other, own), earlier))
    rank = net.ReduceSum(net.Cast(ahead, to=onnx.TensorProto.INT32), np.array([2]), keepdims=0)
    masked = net.Where(net.GreaterOrEqual(rank, np.array(chosen, np.int32)), -np.inf, logits)
    return net.Softmax(masked, axis=1)


def mixture_case(net: Net) -> onnx.ModelProto:
    count, chosen, c = net.draw(st.integers(3, 5)), net.draw(st.integers(1, 2)), net.draw(st.integers(1, 3))
    maps = net.Relu(net.Conv(net.image(2, 2, 2), net.values(count * 2, 2, 1, 1), net.values(count * 2)))
    maps = net.Conv(maps, net.values(count * c, 2, 1, 1), group=count)
    vectors = net.ReduceMean(net.Reshape(maps, np.array([-1, c, 4])), np.array([2]), keepdims=0)
    if net.draw(st.booleans()):
        vectors = net.Gather(vectors, np.arange(c)[::-1].copy(), axis=1)
    split = net.Reshape(vectors, np.array([-1, count, c]))
    weighted = net.Mul(split, net.Unsqueeze(gate(net, count, chosen), np.array([2])))
    return net.model(net.ReduceSum(weighted, np.array([1]), keepdims=0))


CASES: dict[str, Callable[[Net], onnx.ModelProto]] = {
    linear.EINSUM: einsum_case,
    newton_schulz.NEWTON_SCHULZ: newton_schulz_case,
    mixture.EXPERTS: mixture_case,
}


def fixed_batch(model: onnx.ModelProto) -> onnx.ModelProto:
    """Write sizes as the converter does for one batch size: as numbers, also in the targets of Reshape."""
    fixed = onnx.ModelProto.FromString(model.SerializeToString())
    for described in fixed.graph.input:
        described.type.tensor_type.shape.dim[0].dim_value = BATCH
    del fixed.graph.value_info[:]
    fixed = onnx.shape_inference.infer_shapes(fixed)
    shapes = {value.name: value.type.tensor_type.shape.dim for value in fixed.graph.value_info}
    for node in fixed.graph.node:
        sizes = [dim.dim_value for dim in shapes.get(node.output[0], ())]
        if node.op_type == "Reshape" and len(sizes) > 1:
            target = numpy_helper.from_array(np.array(sizes), f"{node.output[0]}/sizes")
            fixed.graph.initializer.append(target)
            node.input[1] = target.name
    return fixed


@pytest.mark.parametrize("fixed", [False, True], ids=["any batch", "one batch size"])
@pytest.mark.parametrize("rule", RULES)
@settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.generate,),
)
@given(data=st.data())
def test_a_rule_keeps_every_output_and_can_be_replayed(rule: str, fixed: bool, data: st.DataObject) -> None:
    net = Net(data.draw)
    model = CASES[rule](net)
    model = fixed_batch(model) if fixed else model
    expected = ReferenceEvaluator(model).run(None, net.inputs)
    lowered = lower_graph(model)
    assert rule in {step.name for step in lowered.rules}
    results = ReferenceEvaluator(lowered.model).run(None, net.inputs)
    for result, wanted in zip(results, expected, strict=True):
        np.testing.assert_allclose(result, wanted, rtol=1e-9, atol=1e-9 * np.abs(wanted).max(initial=1e-300))
    assert onnx_root(reapply(model, lowered.rules)) == onnx_root(lowered.model)


def root_model(change: Callable[[Net, str], str]) -> onnx.ModelProto:
    def draw(strategy: Any) -> Any:
        return True if strategy.__class__.__name__ == "BooleansStrategy" else np.ones((BATCH, 4, 3))

    net = Net(draw)
    net.inputs["x0"] = np.ones((BATCH, 4, 3))
    return net.model(change(net, "x0"))


def three_steps(net: Net, coefficient: float) -> str:
    x, eye = "x0", np.eye(4)
    a = net.MatMul(x, net.Transpose(x, perm=[0, 2, 1]))
    y, z = net.Div(a, net.ReduceSum(net.Mul(a, eye), np.array([1, 2]), keepdims=1)), net.constant(eye)
    for step in range(3):
        t = net.Sub(coefficient * eye if step == 2 else 1.5 * eye, net.Mul(net.MatMul(z, y), 0.5))
        y, z = net.MatMul(y, t), net.MatMul(t, z)
    return y


@pytest.mark.parametrize(("coefficient", "matches"), [(1.5, True), (1.5 + 2**-40, False), (1.25, False)])
def test_another_polynomial_is_not_a_root(coefficient: float, matches: bool) -> None:
    model = root_model(lambda net, _x: three_steps(net, coefficient))
    assert (newton_schulz.NEWTON_SCHULZ in {step.name for step in lower_graph(model).rules}) == matches


def test_a_clamp_inside_the_loop_prevents_the_rule() -> None:
    def clamped(net: Net, x: str) -> str:
        a = net.MatMul(x, net.Transpose(x, perm=[0, 2, 1]))
        y = net.Div(a, net.ReduceSum(net.Mul(a, np.eye(4)), np.array([1, 2]), keepdims=1))
        t = net.Clip(net.Sub(1.5 * np.eye(4), net.Mul(y, 0.5)), -1.0, 1.0)
        return net.MatMul(y, t)

    assert lower_graph(root_model(clamped)).rules == ()


def test_a_replay_of_a_rule_that_does_not_match_is_an_error() -> None:
    model = root_model(lambda net, _x: three_steps(net, 1.5))
    (step,) = lower_graph(model).rules
    for wrong in (
        {"node": "elsewhere"},
        {"name": "no rule"},
        {"name": linear.EINSUM},
    ):
        with pytest.raises(LoweringError, match="does not match"):
            reapply(model, [step.model_copy(update=wrong)])


@pytest.mark.parametrize("fixed", [False, True], ids=["any batch", "one batch size"])
def test_weights_that_all_images_share_prevent_the_rules_of_a_mixture(fixed: bool) -> None:
    net = Net(lambda _strategy: True)
    net.inputs = {"maps": np.ones((BATCH, 4, 3)), "logits": np.ones((BATCH, 4))}
    mean = net.ReduceMean("logits", np.array([0]), keepdims=1)
    kept, index = net.TopK(mean, np.array([2]), axis=1, outputs=2)
    weights = net.ScatterElements(net.constant(np.zeros((1, 4))), index, net.Softmax(kept, axis=1), axis=1)
    vectors = net.Relu(net.Reshape("maps", np.array([-1, 3])))
    split = net.Reshape(vectors, np.array([-1, 4, 3]))
    weighted = net.Mul(split, net.Unsqueeze(weights, np.array([2])))
    model = net.model(net.ReduceSum(weighted, np.array([1]), keepdims=0))
    assert lower_graph(fixed_batch(model) if fixed else model).rules == ()
