"""The data flow of an ONNX graph shows which outputs depend on other images of a batch.

The graphs are written by hand: `f` are features (B, 4, 2, 2), `v` their means (B, 4), `t` tokens (B, 4, 4).
"""

import onnx
import pytest
from onnx import parser

from sopdeploy_export.proof.batch import find_mixing

HEAD = """<ir_version: 8, opset_import: ["" : 18]>
g (float[batch, 4, 2, 2] f) => (float[batch, n] logits)
<int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}, int64[1] four = {4}, int64[2] space = {2, 3},
 int64[3] tokens = {0, 4, 4}, int64[2] rows = {-1, 4}, int64[2] turned = {4, -1}, int64 first = {0},
 int64 next = {1}, int64 width = {4}, int64[4] offsets = {0, 1, 2, 3}, int64[1] all = {-1}, float eps = {0.1},
 int64[1] back = {-1}, int64[1] end = {9223372036854775807}, int64[1] start = {-9223372036854775807},
 float[4, 4] W = {1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16}, float[1, 1, 4] token = {1, 2, 3, 4},
 int64[2] ones = {1, 1}, int64[2] pairs = {-1, 2}, int64[3] joined = {2, -1, 4},
 int64[3] pairs_of_rows = {-1, 2, 4}, int64 many = {300},
 int64[1, 4] columns = {0, 1, 2, 3}>
{ v = ReduceMean<keepdims = 0>(f, space)
  t = Reshape(f, tokens)
  size = Shape<start = 0, end = 1>(f)
  count = Squeeze(size)
  number = Range(first, count, next)
"""

INDEPENDENT = {
    "a linear layer": "logits = Gemm<transB = 1>(v, W)",
    "attention within an image": """k = Transpose<perm = [0, 2, 1]>(t)  s = MatMul(t, k)  p = Softmax(s)
        a = MatMul(p, t)  logits = ReduceMean<keepdims = 0>(a, one)""",
    "heads folded into the batch": """x = Reshape(v, turned4)  y = Softmax(x)  logits = Reshape(y, rows)""",
    "a class token for each image": """sizes = Concat<axis = 0>(size, ones)  c = Expand(token, sizes)
        a = Concat<axis = 1>(c, t)  logits = ReduceMean<keepdims = 0>(a, one)""",
    "a selection by value": "i = ArgMax<axis = 1, keepdims = 1>(v)  g = GatherElements<axis = 1>(v, i)"
    "  logits = Mul(g, v)",
    "an expert of each image": """i = ArgMax<axis = 1, keepdims = 0>(v)  e = Gather<axis = 0>(W, i)
        logits = Mul(e, v)""",
    "the own row by its number": """n = Unsqueeze(number, one)  logits = GatherND(v, n)""",
    "halves of a batch that was joined": """a = Concat<axis = 0>(v, v)  b, c = Split<num_outputs = 2>(a)
        logits = Add(b, c)""",
    "slices of a batch that was joined": """a = Concat<axis = 0>(v, v)  b = Slice(a, zero, size, zero)
        m = Neg(size)  c = Slice(a, m, end, zero)  logits = Add(b, c)""",
    "an index for each image": """i = ArgMax<axis = 1, keepdims = 1>(v)  u = Unsqueeze(number, one)
        x = Max(u, i)  s = Shape(x)  n = Expand(u, s)  p = Unsqueeze(n, all)  q = Unsqueeze(i, all)
        c = Concat<axis = -1>(p, q)  logits = GatherND(v, c)""",
    "the mean of a batch that was joined": """a = Concat<axis = 0>(v, v)  b = Reshape(a, joined)
        logits = ReduceMean<keepdims = 0>(b, zero)""",
    "a determinant": """k = Transpose<perm = [0, 2, 1]>(t)  s = MatMul(t, k)  d = Det(s)
        u = Unsqueeze(d, one)  logits = Mul(v, u)""",
    "a Fourier transform": """u = Unsqueeze(v, two)  d = DFT<axis = 1>(u)
        logits = ReduceSum<keepdims = 0>(d, two)""",
    "a trace": """e = EyeLike<dtype = 1>(W)  s = Mul(t, e)  r = ReduceSum<keepdims = 0>(s, back)
        logits = Mul(v, r)""",
    "einsum of an image": 'logits = Einsum<equation = "bi,ij->bj">(v, W)',
    "a shift within an image": "logits = Slice(v, back, start, one, back)",
}
MIXING = {
    "a mean over the batch": ("m = ReduceMean(v, zero)  logits = Sub(v, m)", "ReduceMean"),
    "a sum over everything": ("m = ReduceSum(v)  logits = Mul(v, m)", "ReduceSum"),
    "a mean over no axis in particular": ("m = ReduceMax(v)  logits = Mul(v, m)", "ReduceMax"),
    "softmax over the batch": ("logits = Softmax<axis = 0>(v)", "Softmax"),
    "a Gram matrix": ("k = Transpose(v)  s = MatMul(v, k)  logits = MatMul(s, v)", "MatMul"),
    "a product of transposes": ("k = Transpose(v)  s = MatMul(k, v)  logits = MatMul(v, s)", "MatMul"),
    "a reversed batch": ("logits = Slice(v, back, start, zero, back)", "Slice"),
    "a later image": ("m = Slice(v, one, end, zero)  s = ReduceSum(m, zero)  logits = Add(v, s)", "Slice"),
    "the first image": ("m = Gather<axis = 0>(v, first)  logits = Add(v, m)", "Gather"),
    "an image that a value selects": (
        "i = ArgMax<axis = 1, keepdims = 0>(v)  logits = Gather<axis = 0>(v, i)",
        "Gather",
    ),
    "a shape that exchanges rows": (
        "x = Reshape(v, turned)  y = Transpose(x)  logits = Identity(y)",
        "Reshape",
    ),
    "a cumulative sum": ("logits = CumSum(v, first)", "CumSum"),
    "a sort": ("logits, i = TopK<axis = 0>(v, one)", "TopK"),
    "the number of images": ("n = Cast<to = 1>(count)  logits = Div(v, n)", "Div"),
    "the number of the image": (
        "n = Cast<to = 1>(number)  u = Unsqueeze(n, one)  logits = Add(v, u)",
        "Cast",
    ),
    "the next image by its number": (
        "n = Add(number, next)  u = Unsqueeze(n, one)  logits = GatherND(v, u)",
        "Add",
    ),
    "elements of the next image": (
        """s = Reshape(v, all)  r = Mul(number, width)  u = Unsqueeze(r, one)  m = Add(u, next)
        i = Add(m, offsets)  logits = Gather<axis = 0>(s, i)""",
        "Mul",
    ),
    "a joined batch": ("a = Concat<axis = 0>(v, v)  logits = Slice(a, zero, four, zero)", "Slice"),
    "slices of repeated images": (
        """u = Unsqueeze(v, one)  a = Concat<axis = 0>(size, two, four)  x = Expand(u, a)
        y = Reshape(x, rows)  logits = Slice(y, zero, size, zero)""",
        "Slice",
    ),
    "a slice between images": (
        """a = Concat<axis = 0>(v, v)  b = Sub(size, one)  c = Add(size, b)
        logits = Slice(a, b, c, zero)""",
        "Slice",
    ),
    "columns at the size of the batch": (
        "c = Concat<axis = 1>(v, v)  e = Add(size, four)  logits = Slice(c, size, e, one)",
        "Slice",
    ),
    "values behind a shape": (
        "m = ReduceMax(v, zero)  s = Shape(v)  n = Expand(m, s)  logits = Add(v, n)",
        "ReduceMax",
    ),
    "rows of a batch that was joined": (
        """a = Concat<axis = 0>(v, v)  b = Reshape(a, pairs_of_rows)
        logits = ReduceMean<keepdims = 0>(b, one)""",
        "Reshape",
    ),
    "a batch joined with a constant": ("a = Concat<axis = 0>(v, W)  logits = Identity(a)", "Concat"),
    "a Fourier transform over the batch": (
        "u = Unsqueeze(v, two)  d = DFT<axis = 0>(u)  logits = ReduceSum<keepdims = 0>(d, two)",
        "DFT",
    ),
    "the own number of the own image": (
        """n = Unsqueeze(number, one)  c = Concat<axis = 1>(n, n)
        e = GatherND(v, c)  x = Unsqueeze(e, one)  logits = Add(v, x)""",
        "Concat",
    ),
    "an operator without a rule": ("logits = MeanVarianceNormalization<axes = [0]>(v)", "no rule for Mean"),
    "einsum over the batch": ('logits = Einsum<equation = "bi,cj->bj">(v, v)', "Einsum"),
    "einsum of two images": ('logits = Einsum<equation = "bi,bj->ij">(v, v)', "Einsum"),
    "halves of the batch": ("a, b = Split<num_outputs = 2>(v)  logits = Concat<axis = 0>(b, a)", "Split"),
    "the number of the image as logits": ("n = Unsqueeze(number, one)  logits = Cast<to = 1>(n)", "Cast"),
    "indices in another order": (
        """n = Unsqueeze(number, one)  i = ArgMax<axis = 1, keepdims = 1>(v)  c = Concat<axis = 1>(n, i)
        x = Reshape(c, all)  y = Reshape(x, pairs)  logits = GatherND(v, y)""",
        "Reshape",
    ),
    "a number of the image that wraps": (
        "a = Cast<to = 3>(number)  n = Cast<to = 7>(a)  u = Unsqueeze(n, one)  logits = GatherND(v, u)",
        "Cast",
    ),
    "a row of a table for each position": ("e = Gather<axis = 0>(W, number)  logits = Add(v, e)", "Gather"),
    "a number of a table for each position": (
        """i = ArgMax<axis = 1, keepdims = 1>(v)  u = Unsqueeze(number, one)  c = Concat<axis = 1>(u, i)
        e = GatherND(W, c)  x = Unsqueeze(e, one)  logits = Add(v, x)""",
        "GatherND",
    ),
    "positions of maxima in the batch": (
        """p, i = MaxPool<kernel_shape = [2, 2]>(f)  n = Cast<to = 1>(i)  s = Reshape(n, rows)
        logits = Add(v, s)""",
        "MaxPool",
    ),
    "the first rows of repeated images": (
        """u = Unsqueeze(v, one)  a = Concat<axis = 0>(size, two, four)  x = Expand(u, a)
        y = Reshape(x, rows)  b = Concat<axis = 0>(size, four)
        c = Expand(columns, b)  logits = GatherElements<axis = 1>(y, c)""",
        "GatherElements",
    ),
    "whether there are many images": (
        "g = Greater(count, many)  x = Cast<to = 1>(g)  logits = Add(v, x)",
        "Greater",
    ),
    "whether there are four images": (
        "g = Equal(count, width)  x = Cast<to = 1>(g)  logits = Add(v, x)",
        "Equal",
    ),
    "hundreds of images": ("g = Div(count, many)  x = Cast<to = 1>(g)  logits = Add(v, x)", "Div"),
    "at most four images": ("g = Min(count, width)  x = Cast<to = 1>(g)  logits = Add(v, x)", "Min"),
    "a hidden influence": (
        """m = ReduceMax<keepdims = 1>(v, zero)  d = Sub(m, eps)  r = Relu(d)  logits = Add(v, r)""",
        "ReduceMax",
    ),
}


def graph(body: str) -> onnx.ModelProto:
    return parser.parse_model(HEAD.replace("turned =", "turned4 = {-1, 2}, int64[2] turned =") + body + " }")


@pytest.mark.parametrize("name", INDEPENDENT)
def test_images_are_independent(name: str) -> None:
    assert find_mixing(graph(INDEPENDENT[name])) == ()


@pytest.mark.parametrize("name", MIXING)
def test_the_operator_that_mixes_images_is_named(name: str) -> None:
    body, operator = MIXING[name]
    (found,) = find_mixing(graph(body))
    assert found.startswith(operator)


def test_a_graph_for_one_image_cannot_mix() -> None:
    model = graph("m = ReduceMean(v, zero)  logits = Sub(v, m)")
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    assert find_mixing(model) == ()
