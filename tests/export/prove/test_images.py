"""No output of an image changes with the other images of its batch, as measured."""

import numpy as np
import onnx
import pytest
from onnx import parser

from sopdeploy import Preprocess
from sopdeploy.bundle.manifest import BatchRange
from sopdeploy_export.capture.deployed import export_images
from sopdeploy_export.prove.images import EXTREME, IN_OPTIMUM, FileRuns, run_file
from sopdeploy_export.runs import open_session

HEAD = """<ir_version: 8, opset_import: ["" : 18]>
g (uint8[batch, 8, 8, 3] images) => (float[batch, n] logits)
<int64[1] zero = {0}, int64[1] one = {1}, int64[2] space = {1, 2}, int64[1] end = {9223372036854775807},
 int64[1] two = {2}, int64[1] back = {-1}, int64[1] start = {-9223372036854775807}, int64 first = {0},
 int64[2] rows = {-1, 1}, int64[2] turned = {3, -1}, int64[3] tokens = {0, 64, 3},
 float large = {250}, float half = {128}>
{ f = Cast<to = 1>(images)  v = ReduceMean<keepdims = 0>(f, space)  t = Reshape(f, tokens)
"""
INDEPENDENT = {
    "softmax of an image": "logits = Softmax(v)",
    "attention within an image": """k = Transpose<perm = [0, 2, 1]>(t)  s = MatMul(t, k)  p = Softmax(s)
        a = MatMul(p, t)  logits = ReduceMean<keepdims = 0>(a, one)""",
    "channels folded into the batch": """x = Reshape(v, rows)  y = Tanh(x)  b = Shape<end = 1>(v)
        w = Concat<axis = 0>(b, back)  logits = Reshape(y, w)""",
    "a joined batch": """a = Concat<axis = 0>(v, v)  b, c = Split<num_outputs = 2>(a)
        logits = Add(b, c)""",
    "the mean of the batch, times zero": """m = ReduceMean(v, zero)  z = Sub(m, m)
        logits = Add(v, z)""",
}
MIXING = {
    "a mean over the batch": "m = ReduceMean(v, zero)  logits = Sub(v, m)",
    "the largest value of the batch": "m = ReduceMax(v, zero)  logits = Sub(v, m)",
    "softmax over the batch": "logits = Softmax<axis = 0>(v)",
    "a Gram matrix": "k = Transpose(v)  s = MatMul(v, k)  logits = MatMul(s, v)",
    "a reversed batch": "logits = Slice(v, back, start, zero, back)",
    "the first image": "m = Gather<axis = 0>(v, first)  logits = Add(v, m)",
    "the image before": """n = Slice(v, zero, back, zero)  o = Slice(v, back, end, zero)
        logits = Concat<axis = 0>(o, n)""",
    "the image before, of bright ones": """n = Slice(v, zero, back, zero)  o = Slice(v, back, end, zero)
        p = Concat<axis = 0>(o, n)  is = Greater(v, large)  logits = Where(is, p, v)""",
    "the other half of the batch, of bright ones": """b = Shape<end = 1>(v)  h = Div(b, two)
        n = Slice(v, zero, h, zero)  o = Slice(v, h, end, zero)  p = Concat<axis = 0>(o, n)
        is = Greater(v, large)  logits = Where(is, p, v)""",
    "the number of equal images": """a = Unsqueeze(v, one)  b = Unsqueeze(v, zero)  d = Sub(a, b)
        e = Abs(d)  s = ReduceSum<keepdims = 0>(e, back)  c = Cast<to = 9>(s)  n = Not(c)
        q = Cast<to = 1>(n)  logits = ReduceSum(q, one)""",
    "a shape that exchanges rows": "x = Reshape(v, turned)  logits = Transpose(x)",
    "a cumulative sum": "logits = CumSum(v, first)",
}
NAMED = export_images(Preprocess(resize=8, crop=8))
IMAGES = np.stack([*NAMED.values()])


def run(body: str, largest: int = 8) -> FileRuns:
    model: onnx.ModelProto = parser.parse_model(HEAD + body + " }")
    batch = BatchRange(optimum=largest, maximum=largest)
    return run_file(open_session(model), IMAGES, batch)


def mixing(body: str, largest: int = 8) -> tuple[str, ...]:
    return run(body, largest).mixing


@pytest.mark.parametrize("largest", [1, 2, 5, 8])
def test_the_outputs_of_a_file_are_in_the_order_of_the_images(largest: int) -> None:
    runs = run("logits = Identity(v)", largest)
    means = IMAGES.mean((1, 2))
    assert runs.outputs["logits"] == pytest.approx(means, rel=1e-5)
    assert runs.in_optimum["logits"] == pytest.approx(means[-2:], rel=1e-5)


def test_extreme_images_run_beside_different_ones() -> None:
    names = [*NAMED]
    assert [names[number] for number in EXTREME] == [
        "a black image",
        "a white image",
        "a saturated image",
        "a checkerboard of single pixels",
    ]

    kinds = [name for name in names if not name.startswith("reference image")]
    assert sorted([*IN_OPTIMUM, *EXTREME]) == [*range(len(kinds))]


@pytest.mark.parametrize("name", INDEPENDENT)
def test_images_are_independent(name: str) -> None:
    assert mixing(INDEPENDENT[name]) == ()


@pytest.mark.parametrize("largest", [2, 3, 8])
@pytest.mark.parametrize("name", MIXING)
def test_an_output_that_mixes_images_is_named(name: str, largest: int) -> None:
    assert mixing(MIXING[name], largest) == ("logits",)


def test_a_graph_for_one_image_cannot_mix() -> None:
    assert mixing(MIXING["a mean over the batch"], 1) == ()
