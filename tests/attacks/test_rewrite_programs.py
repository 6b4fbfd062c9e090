"""A rewritten graph computes what the graph computes, whatever surrounds the pattern of a rule.

The inputs reach what the programs hide behind thresholds: numbers of each image that are 0, large, infinite
or not numbers, and equal logits.
"""

from collections.abc import Callable, Iterator

import numpy as np
import onnx
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from sopdeploy_export.rewrites import mixture as experts
from sopdeploy_export.rewrites import newton_schulz
from sopdeploy_export.rewrites.apply import lower_graph
from tests.attacks.rewrite_programs import BATCH, Program, mixture, rank_gate, textbook_root

NUMBERS = (1.0, 0.0, 1e9, np.inf, np.nan, -1.0, 5e-324, 1e-310)


def feeds_of(model: onnx.ModelProto, seed: int = 0) -> Iterator[dict[str, NDArray[np.float64]]]:
    """Inputs for batches of 1 to 3: usual values, large ones, ties, and each of `NUMBERS` for every image."""
    random = np.random.default_rng(seed)
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim[1:]] for v in model.graph.input}
    for i, value in enumerate(NUMBERS):
        batch = 1 + i % 3
        feeds = {name: random.standard_normal((batch, *shape)) for name, shape in shapes.items()}
        for array in feeds.values():
            if array[0].size == 1:
                array[:] = value
            elif i % 4 == 1:
                array *= 8.0
            elif i % 4 == 2 and array.ndim == 2:
                array[:] = np.round(array)
        yield feeds


def largest_difference(model: onnx.ModelProto, other: onnx.ModelProto, seed: int = 0) -> float:
    """Relative difference of the outputs, infinite where only one of them is finite."""
    before, after, worst = ReferenceEvaluator(model), ReferenceEvaluator(other), 0.0
    with np.errstate(all="ignore"):
        for feeds in feeds_of(model, seed):
            for expected, found in zip(before.run(None, feeds), after.run(None, feeds), strict=True):
                finite = np.isfinite(expected)
                if expected.shape != found.shape or not np.array_equal(finite, np.isfinite(found)):
                    return np.inf
                error = np.abs(expected[finite] - found[finite]).max(initial=0.0)
                worst = max(worst, error / np.abs(expected[finite]).max(initial=1e-300))
    return worst


def spelling(net: Program, g: str, side: int = 3) -> dict[str, Callable[[str], str]]:
    """Ways to compute more with a value (B, side, side) and a number *g* (B, 1, 1) of each image."""
    shape = np.array([-1, 2, side, side])
    return {
        "a factor that is divided out": lambda a: net.Div(net.Mul(a, g), g),
        "a difference that is added": lambda a: net.Sub(net.Add(a, g), g),
        "an identity that is subtracted": lambda a: net.Sub(
            net.Add(a, net.Mul(g, np.eye(3))), net.Mul(g, np.eye(3))
        ),
        "a large number that cancels": lambda a: net.Sub(net.Add(a, 1e12), 1e12),
        "a large factor that cancels": lambda a: net.Mul(net.Mul(a, 1e200), 1e-200),
        "a reciprocal": lambda a: net.Mul(a, net.Div(1.0, g)),
        "a threshold": lambda a: net.Add(a, net.Relu(net.Sub(g, 2.0))),
        "a limit": lambda a: net.Clip(a, -0.1, 0.1),
        "matrices of other images": lambda a: net.Gather(
            net.Reshape(net.Tile(a, np.array([2, 1, 1])), shape), np.array(0), axis=1
        ),
        "a fourth axis": lambda a: net.ReduceSum(
            net.Mul(net.Expand(a, np.array([2, 1, 1, 1])), 0.5), np.array([0]), keepdims=0
        ),
        "a sum over images": lambda a: net.Add(a, net.ReduceSum(g, np.array([0]), keepdims=1)),
        "a transposition": lambda a: net.Transpose(a, perm=[0, 2, 1]),
        "nothing": lambda a: net.Identity(a),
        "a factor": lambda a: net.Mul(a, net.choose(0.5, 1.5, 3.0)),
    }


HIDDEN = tuple(spelling(Program(), "g"))


@pytest.mark.parametrize("place", ["of_matrix", "of_norm", "in_loop"])
@pytest.mark.parametrize("name", HIDDEN)
@pytest.mark.parametrize(("d", "m"), [(3, 5), (3, 2)], ids=["outer", "inner"])
def test_what_a_loop_computes_beside_the_root_is_kept(name: str, place: str, d: int, m: int) -> None:
    net = Program()
    x, g = net.image(d, m), net.image(1, 1)
    if "identity" in name and place == "of_norm":
        pytest.skip("a norm is no matrix")
    model = net.model(
        textbook_root(net, x, d, m, **{place: spelling(net, g, 1 if place == "of_norm" else 3)[name]})
    )
    assert largest_difference(model, lower_graph(model).model) < 1e-7


@pytest.mark.parametrize("norm", ["trace", "frobenius", "one axis after the other"])
@pytest.mark.parametrize("compensated", [True, False])
@pytest.mark.parametrize(("d", "m"), [(3, 6), (6, 3)], ids=["outer", "inner"])
def test_every_spelling_of_a_norm_is_exported(norm: str, compensated: bool, d: int, m: int) -> None:
    net = Program()
    model = net.model(textbook_root(net, net.image(d, m), d, m, norm=norm, compensated=compensated))
    lowered = lower_graph(model)
    assert [rule.name for rule in lowered.rules] == [newton_schulz.NEWTON_SCHULZ]
    assert largest_difference(model, lowered.model) < 1e-7


def gated(**wrong: object) -> onnx.ModelProto:
    net = Program()
    x, logits = net.image(2, 2, 2), net.image(4)
    return net.model(mixture(net, x, rank_gate(net, logits, 4, 2, **wrong), 4))


def mixed(**options: object) -> onnx.ModelProto:
    net = Program()
    x, logits = net.image(2, 2, 2), net.image(4)
    if "of_maps" in options:
        options["of_maps"] = lambda rows: net.Sqrt(rows)
    return net.model(mixture(net, x, rank_gate(net, logits, 4, 2), 4, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("model", "applies"),
    [
        pytest.param(gated(), True, id="ranks"),
        pytest.param(gated(earlier=np.zeros((1, 1), bool)), False, id="ranks with ties"),
        pytest.param(gated(limit=2.5, type=onnx.TensorProto.FLOAT), False, id="a limit between two ranks"),
        pytest.param(mixed(of_maps=True), False, id="a square root, which is NaN of some maps"),
        pytest.param(mixed(reduced=()), False, id="a mean over all axes"),
    ],
)
def test_experts_are_left_out_only_if_their_weight_is_0_and_their_vector_is_finite(
    model: onnx.ModelProto, applies: bool
) -> None:
    if not applies:
        assert lower_graph(model).rules == ()
        return
    lowered = lower_graph(model)
    assert [rule.name for rule in lowered.rules] == [experts.EXPERTS]


def test_an_einsum_that_repeats_an_axis_is_left_as_it_is() -> None:
    for shapes, equation in (((3, 1), (4, 5)), "bim,bjm->bij"), (((3, BATCH), (BATCH, 4)), "bib,bbj->bij"):
        net = Program()
        model = net.model(net.Einsum(*(net.image(*shape) for shape in shapes), equation=equation))
        assert lower_graph(model).rules == ()


def random_program(seed: int) -> onnx.ModelProto:
    """Build a root or a mixture with more computations in it and after it."""
    net = Program(seed)
    g = net.image(1, 1)
    usual = ["nothing"] * 8

    def more(a: str, side: int = 3) -> str:
        ways = spelling(net, g, side)
        wrong = {"an identity that is subtracted"} if side == 1 else set()
        return ways[net.choose(*sorted(ways.keys() - wrong), *usual)](a)

    if net.choose(True, True, False):
        d, m = 3, net.choose(2, 3, 6)
        x = net.choose(str, net.Relu, net.Abs)(net.image(d, m))
        result = textbook_root(
            net,
            x,
            d,
            m,
            steps=net.choose(1, 2, 3),
            norm=net.choose("trace", "frobenius", "axes"),
            centered=net.choose(None, None, 1.0, 0.5),
            of_matrix=more,
            of_norm=lambda n: more(n, 1),
            in_loop=more if net.choose(True, False, False) else str,
            compensated=net.choose(True, True, False),
        )
        result = more(result)
    else:
        x, logits = net.image(2, 2, 2), net.image(4)
        logits = net.choose(logits, net.Mul(logits, net.Reshape(g, np.array([-1, 1]))))
        weights = rank_gate(net, logits, 4, net.choose(1, 2, 3), limit=net.choose(1, 2, 3))
        result = mixture(net, x, weights, 4, of_maps=net.choose(str, net.Relu, net.Abs, net.Identity))
    return net.model(result, *net.choose((), (), (g,)))


def check_program(seed: int) -> set[str]:
    """Compare a random program with what the rules make of it; return the rules that applied."""
    model = random_program(seed)
    lowered = lower_graph(model)
    difference = largest_difference(model, lowered.model, seed)
    assert difference < 1e-6, f"program {seed} differs by {difference:.2g}"
    return {rule.name for rule in lowered.rules} | ({"refused"} if lowered.refused else set())


@settings(max_examples=100, deadline=None, phases=(Phase.generate,))
@given(seed=st.integers(0, 2**32))
def test_a_random_program_is_rewritten_without_a_difference(seed: int) -> None:
    check_program(seed)
