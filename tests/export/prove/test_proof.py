"""Hashes tell computations apart, and batches stay apart."""

import functools
from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch
from onnx import parser
from onnx.reference import ReferenceEvaluator
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from sopdeploy.errors import CertificateError
from sopdeploy_export.network import copy_network
from sopdeploy_export.program_hashes import ProgramRoot, fingerprint, program_root, tensor_hash
from sopdeploy_export.prove.images import find_mixing


def test_a_graph_module_is_copied() -> None:
    traced = fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2)).eval())
    copied = copy_network(traced)
    assert copied is not traced
    assert torch.equal(copied(torch.ones(1, 2)), traced(torch.ones(1, 2)))


Forward = Callable[[nn.Module, Tensor], Tensor]


class Function(nn.Module):
    def __init__(self, function: Forward, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.register_buffer("count", torch.zeros(()))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def traced(function: Forward, seed: int = 0) -> ExportedProgram:
    shapes = ({0: torch.export.Dim("batch", min=1, max=8)},)
    network = Function(function, seed).eval()
    with torch.no_grad():
        return torch.export.export(network, (torch.rand(2, 4),), dynamic_shapes=shapes)


def program_of(function: Forward, seed: int = 0) -> ExportedProgram:
    return traced(function, seed).run_decompositions({})


@functools.cache
def root_of(function: Forward, seed: int = 0) -> ProgramRoot:
    return program_root(program_of(function, seed))


def chain(network: nn.Module, x: Tensor) -> Tensor:
    return network.second(network.first(x).relu())


@pytest.mark.parametrize(
    "function",
    [chain, lambda n, x: (n.first(x).exp(), chain(n, x))[1]],
    ids=["computed again", "with an unused operation"],
)
def test_equal_computations_have_one_root(function: Forward) -> None:
    assert root_of(function).sha256 == root_of(chain).sha256


DIFFERENT: dict[str, tuple[Forward, Forward]] = {
    "order": (chain, lambda n, x: n.first(n.second(x).relu())),
    "operator": (chain, lambda n, x: n.second(n.first(x).sigmoid())),
    "constant": (chain, lambda n, x: chain(n, x) + 1e-30),
    "integer instead of float": (chain, lambda n, x: chain(n, x) * 1),
    "intermediate dtype": (chain, lambda n, x: chain(n, x.double().float())),
    "slice of everything": (chain, lambda n, x: chain(n, x)[:, :4]),
    "subtraction from the input": (chain, lambda n, x: x - chain(n, x)),
    "operand order": (
        lambda n, x: n.first(x) - n.second(x),
        lambda n, x: n.second(x) - n.first(x),
    ),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_different_computations_have_different_roots_and_traces(case: str) -> None:
    one, other = DIFFERENT[case]
    assert root_of(one).sha256 != root_of(other).sha256
    assert fingerprint(traced(one)) not in (None, fingerprint(traced(other)))


OTHER_TRACES: dict[str, tuple[Forward, Forward]] = {  # the Merkle roots do not tell them apart
    "order of writes": (
        lambda _, x: (y := x.clone(), y.add_(1), y.mul_(2))[0],
        lambda _, x: (y := x.clone(), y.mul_(2), y.add_(1))[0],
    ),
    "a write whose result is not used": (
        lambda _, x: x.clone(),
        lambda _, x: (y := x.clone(), y.exp_())[0],
    ),
    "what is written to": (
        lambda _, x: (y := x.clone(), z := x.clone(), y.exp_(), z)[0],
        lambda _, x: (x.clone(), z := x.clone(), z.exp_(), z)[0],
    ),
}


@pytest.mark.parametrize("case", OTHER_TRACES)
def test_programs_that_write_in_another_way_have_other_traces(case: str) -> None:
    one, other = (fingerprint(traced(function)) for function in OTHER_TRACES[case])
    assert one not in (None, other)


def test_program_with_a_subgraph_has_no_trace() -> None:
    def branches(network: nn.Module, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, network.first, network.second, (x,))

    assert fingerprint(traced(branches)) is None


def test_roots_and_traces_depend_on_the_weights() -> None:
    assert root_of(chain, seed=1).sha256 != root_of(chain).sha256
    assert fingerprint(traced(chain, seed=1)) not in (None, fingerprint(traced(chain)))


def test_state_lists_what_the_output_depends_on() -> None:
    assert root_of(lambda n, x: n.first(x)).tensors == {"first.weight", "first.bias"}


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda n, x: chain(n, x) + n.count.add_(1), "writes to count"),
        (lambda _, x: x.mul_(2), "writes to"),
    ],
    ids=["buffer", "input"],
)
def test_graph_that_writes_is_rejected(function: Forward, message: str) -> None:
    with pytest.raises(CertificateError, match=message):
        root_of(function)


def test_tensor_hash_depends_on_content_and_shape_but_not_on_strides() -> None:
    square = torch.rand(3, 3)
    assert tensor_hash(square.t().contiguous().t()) == tensor_hash(square)
    assert tensor_hash(square.t()) != tensor_hash(square)
    assert tensor_hash(square.reshape(9)) != tensor_hash(square)
    assert tensor_hash(torch.zeros(2)) != tensor_hash(torch.zeros(2) * -1.0)


HEAD = """<ir_version: 8, opset_import: ["" : 18]>
g (float[batch, 4, 2, 2] f) => (float[batch, n] logits)
<int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}, int64[1] four = {4}, int64[2] space = {2, 3},
 int64[3] tokens = {0, 4, 4}, int64[2] rows = {-1, 4}, int64[2] turned = {4, -1}, int64 first = {0},
 int64 next = {1}, int64 width = {4}, int64[4] offsets = {0, 1, 2, 3}, int64[1] all = {-1}, float eps = {0.1},
 int64[1] back = {-1}, int64[1] end = {9223372036854775807}, int64[1] start = {-9223372036854775807},
 float[4, 4] W = {1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16}, float[1, 1, 4] token = {1, 2, 3, 4},
 int64[2] ones = {1, 1}, int64[3] tokens1 = {-1, 1, 1}, int64[4] neighbors = {-1, 4, 2, 4},
 int64[2] joined_axes = {1, 2}, int64[2] pairs = {-1, 2}, int64[3] joined = {2, -1, 4},
 int64[3] pairs_of_rows = {-1, 2, 4}, int64 many = {300},
 int64[1, 4] columns = {0, 1, 2, 3}, int64[1] three = {3}, int64[2] fours = {-1, 4},
 float[1] unit = {1}, float huge = {1e9}, int64 three_wide = {3}, int64[2] split31 = {3, 1}, int64 two_wide = {2},
 int64[1] five = {5}, int64 minus = {-1},
 int64 wide = {9000000000000000000}, int64[1, 2] both_columns = {0, 2},
 float[1, 4] row = {1, 2, 3, 4}, float[1, 4] other = {5, 6, 7, 8}, float none = {0}, float step = {1}>
{ v = ReduceMean<keepdims = 0>(f, space)
  t = Reshape(f, tokens)
  size = Shape<start = 0, end = 1>(f)
  count = Squeeze(size)
  number = Range(first, count, next)
"""

# Equal rows `y` and `z` (batch, 4), `zz` (batch * 2, 4), and three rows `x` of each image
# (batch * 3, 4).
EQUAL_ROWS = """s = Concat<axis = 0>(size, four)  y = Expand(row, s)  z = Expand(other, s)
    twice = Add(size, size)  s2 = Concat<axis = 0>(twice, four)  zz = Expand(other, s2)
    s3 = Concat<axis = 0>(size, three, four)  u = Unsqueeze(v, one)  x3 = Expand(u, s3)
    x = Reshape(x3, fours)  regrouped = Concat<axis = 0>(size, all)  n = Shape<start = 0, end = 1>(x)"""

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
    "indices of the rows of all images": """s = Reshape(v, all)  r = Mul(width, number)  u = Unsqueeze(r, one)
        i = ArgMax<axis = 1, keepdims = 1>(v)  k = Add(i, u)  logits = Gather<axis = 0>(s, k)""",
    "neighbors, by indices of the rows of all images": """r = Reshape(t, rows)  k = Transpose<perm = [0, 2, 1]>(t)
        d = MatMul(t, k)  p, i = TopK(d, two)  b = Mul(number, width)  c = Reshape(b, tokens1)  j = Add(i, c)
        q = Reshape(j, all)  w = Unsqueeze(q, back)  g = GatherND(r, w)  h = Reshape(g, neighbors)
        logits = ReduceMean<keepdims = 0>(h, joined_axes)""",
    "rows of all images, from a range with steps": """s = Reshape(v, all)  e = Mul(count, width)
        r = Range(first, e, width)  u = Unsqueeze(r, one)  k = Add(u, both_columns)
        g = Gather<axis = 0>(s, k)  x = ReduceMean<keepdims = 1>(g, one)  logits = Mul(v, x)""",
    "each row of all images, by its number": """s = Reshape(v, all)  e = Mul(count, width)
        r = Range(first, e, next)  g = Gather<axis = 0>(s, r)  logits = Reshape(g, rows)""",
    "an index that is limited to the rows of an image": """s = Reshape(v, all)  n = Cast<to = 7>(v)
        i = Clip(n, first, three_wide)  r = Mul(number, width)  u = Unsqueeze(r, one)  k = Add(u, i)
        logits = Gather<axis = 0>(s, k)""",
    "a number written to a row of an image": """s = Reshape(v, all)  r = Mul(number, width)
        i = ArgMax<axis = 1, keepdims = 0>(v)  k = Add(r, i)  w = Unsqueeze(k, back)
        m = ReduceMax<keepdims = 0>(v, one)  x = Neg(m)  y = ScatterND(s, w, x)  logits = Reshape(y, rows)""",
    "a row and a column of the own image": """r = Reshape(t, rows)  b = Mul(number, width)
        i = ArgMax<axis = 1, keepdims = 0>(v)  k = Add(b, i)  c = Unsqueeze(k, one)  j = Unsqueeze(i, one)
        x = Concat<axis = 1>(c, j)  g = GatherND(r, x)  u = Unsqueeze(g, one)  logits = Mul(v, u)""",
    "numbers of a table within an image": """k = Transpose(v)  n = Unsqueeze(offsets, back)
        g = GatherND(k, n)  logits = Transpose(g)""",
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
    "halves of equal rows that were joined": f"""{EQUAL_ROWS} a = Concat<axis = 0>(y, z)
        b, c = Split<num_outputs = 2>(a)  d = Sub(c, b)  logits = Mul(v, d)""",
    "two tables for each image": f"""{EQUAL_ROWS} a = Concat<axis = 0>(y, z)  b = Reshape(a, joined)
        c = Transpose<perm = [1, 0, 2]>(b)  logits = Reshape(c, regrouped)""",
    "numbers written to all of the equal rows": f"""{EQUAL_ROWS} i = Expand(columns, s)
        a = ScatterElements<axis = 1>(y, i, z)  logits = Mul(v, a)""",
}

MIXING = {
    "a mean over the batch": ("m = ReduceMean(v, zero)  logits = Sub(v, m)", "ReduceMean"),
    "a sum over everything": ("m = ReduceSum(v)  logits = Mul(v, m)", "ReduceSum"),
    "a mean over no axis in particular": ("m = ReduceMax(v)  logits = Mul(v, m)", "ReduceMax"),
    "softmax over the batch": ("logits = Softmax<axis = 0>(v)", "Softmax"),
    "a Gram matrix": ("k = Transpose(v)  s = MatMul(v, k)  logits = MatMul(s, v)", "MatMul"),
    "a product of transposes": (
        "k = Transpose(v)  s = MatMul(k, v)  logits = MatMul(v, s)",
        "MatMul",
    ),
    "a reversed batch": ("logits = Slice(v, back, start, zero, back)", "Slice"),
    "a later image": (
        "m = Slice(v, one, end, zero)  s = ReduceSum(m, zero)  logits = Add(v, s)",
        "Slice",
    ),
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
        "GatherND",
    ),
    "elements of the next image": (
        """s = Reshape(v, all)  r = Mul(number, width)  u = Unsqueeze(r, one)  m = Add(u, next)
        i = Add(m, offsets)  logits = Gather<axis = 0>(s, i)""",
        "Gather in",
    ),
    "elements of the image before": (
        """s = Reshape(v, all)  r = Mul(number, width)  u = Unsqueeze(r, one)  m = Add(u, minus)
        i = Add(m, offsets)  logits = Gather<axis = 0>(s, i)""",
        "Gather in",
    ),
    "one row of an image too many": (
        """j = Concat<axis = 1>(v, v)  p, i = TopK(j, four)  s = Reshape(v, all)  r = Mul(number, width)
        u = Unsqueeze(r, one)  k = Add(u, i)  logits = Gather<axis = 0>(s, k)""",
        "Gather in",
    ),
    "rows of images that have more": (
        """s = Reshape(v, all)  r = Mul(number, three_wide)  u = Unsqueeze(r, one)  a, b = Split<axis = 1>(v, split31)
        i = ArgMax<axis = 1, keepdims = 1>(a)  k = Add(u, i)  g = Gather<axis = 0>(s, k)  logits = Mul(v, g)""",
        "Gather in",
    ),
    "rows of images in another order": (
        """c = Transpose(v)  s = Reshape(c, all)  r = Mul(number, width)  u = Unsqueeze(r, one)
        k = Add(u, offsets)  logits = Gather<axis = 0>(s, k)""",
        "Gather in",
    ),
    "the number of the image, twice": (
        """s = Reshape(v, all)  r = Mul(number, two_wide)  q = Add(r, r)  w = Add(q, r)  u = Unsqueeze(w, one)
        k = Add(u, offsets)  m = Min(k, three_wide)  logits = Gather<axis = 0>(s, m)""",
        "Min",
    ),
    "a number of the image that overflows": (
        """r = Mul(number, wide)  q = Mul(r, width)  u = Unsqueeze(q, one)  s = Reshape(v, all)
        k = Add(u, offsets)  logits = Gather<axis = 0>(s, k)""",
        "Mul",
    ),
    "an index that nothing limits": (
        """s = Reshape(v, all)  i = Cast<to = 7>(v)  r = Mul(number, width)  u = Unsqueeze(r, one)
        k = Add(u, i)  logits = Gather<axis = 0>(s, k)""",
        "Add",
    ),
    "a column by the number of the image": (
        """n = Unsqueeze(number, one)  e = GatherElements<axis = 1>(v, n)  logits = Mul(v, e)""",
        "GatherElements",
    ),
    "the largest number of an image": (
        """r = Mul(number, width)  u = Unsqueeze(r, one)  k = Add(u, offsets)
        i = ArgMax<axis = 1, keepdims = 1>(k)  x = Cast<to = 1>(i)  logits = Mul(v, x)""",
        "ArgMax",
    ),
    "a number written to the row of the next image": (
        """s = Reshape(v, all)  r = Mul(number, width)  k = Add(r, width)  w = Unsqueeze(k, back)
        m = ReduceMax<keepdims = 0>(v, one)  j = Concat<axis = 0>(s, s)  y = ScatterND(j, w, m)
        e = Mul(size, four)
        z = Slice(y, zero, e, zero)  logits = Reshape(z, rows)""",
        "ScatterND",
    ),
    "the last images, counted back": (
        """s = Reshape(v, all)  e = Mul(count, width)  m = Neg(e)  r = Range(first, m, minus)
        g = Gather<axis = 0>(s, r)  logits = Reshape(g, rows)""",
        "Gather in",
    ),
    "a joined batch": (
        "a = Concat<axis = 0>(v, v)  logits = Slice(a, zero, four, zero)",
        "Slice",
    ),
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
    "a batch joined with a constant": (
        "a = Concat<axis = 0>(v, W)  logits = Identity(a)",
        "Concat",
    ),
    "a Fourier transform over the batch": (
        "u = Unsqueeze(v, two)  d = DFT<axis = 0>(u)  logits = ReduceSum<keepdims = 0>(d, two)",
        "DFT",
    ),
    "the own number of the own image": (
        """n = Unsqueeze(number, one)  c = Concat<axis = 1>(n, n)
        e = GatherND(v, c)  x = Unsqueeze(e, one)  logits = Add(v, x)""",
        "GatherND",
    ),
    "an operator without a rule": (
        "logits = MeanVarianceNormalization<axes = [0]>(v)",
        "no rule for Mean",
    ),
    "einsum over the batch": ('logits = Einsum<equation = "bi,cj->bj">(v, v)', "Einsum"),
    "einsum of two images": ('logits = Einsum<equation = "bi,bj->ij">(v, v)', "Einsum"),
    "halves of the batch": (
        "a, b = Split<num_outputs = 2>(v)  logits = Concat<axis = 0>(b, a)",
        "Split",
    ),
    "the number of the image as logits": (
        "n = Unsqueeze(number, one)  logits = Cast<to = 1>(n)",
        "Cast",
    ),
    "another image where a value is large": (
        "b = Slice(v, back, start, zero, back)  g = Greater(v, huge)  logits = Where(g, b, v)",
        "Slice",
    ),
    "the row of another image where a value is large": (
        """m = ReduceMax(v, one)  g = Greater(m, huge)  c = Cast<to = 7>(g)  u = Unsqueeze(number, one)
        i = Add(u, c)  a = Concat<axis = 0>(v, v)  e = GatherND(a, i)  logits = Add(v, e)""",
        "Add",
    ),
    "whether any value of the batch is large": (
        """g = Greater(v, huge)  c = Cast<to = 7>(g)  m = ReduceMax<keepdims = 1>(c)
        x = Cast<to = 1>(m)  logits = Add(v, x)""",
        "ReduceMax",
    ),
    "images that are equal": (
        """k = Unsqueeze(v, zero)  u = Unsqueeze(v, one)  e = Equal(k, u)  x = Cast<to = 1>(e)
        logits = ReduceSum<keepdims = 0>(x, one)""",
        "Equal",
    ),
    "a number of the image that wraps": (
        "a = Cast<to = 3>(number)  n = Cast<to = 7>(a)  u = Unsqueeze(n, one)  logits = GatherND(v, u)",
        "Cast",
    ),
    "a row of a table for each position": (
        "e = Gather<axis = 0>(W, number)  logits = Add(v, e)",
        "Gather",
    ),
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
    "hundreds of images": (
        "g = Div(count, many)  x = Cast<to = 1>(g)  logits = Add(v, x)",
        "Div",
    ),
    "at most four images": (
        "g = Min(count, width)  x = Cast<to = 1>(g)  logits = Add(v, x)",
        "Min",
    ),
    "a hidden influence": (
        """m = ReduceMax<keepdims = 1>(v, zero)  d = Sub(m, eps)  r = Relu(d)  logits = Add(v, r)""",
        "ReduceMax",
    ),
}


# Right, and refused: the rules follow neither contents nor the order of a few indices.
NOT_SHOWN = {
    "indices in the order that they have": (
        """n = Unsqueeze(number, one)  i = ArgMax<axis = 1, keepdims = 1>(v)  c = Concat<axis = 1>(n, i)
        x = Reshape(c, all)  y = Reshape(x, pairs)  logits = GatherND(v, y)""",
        "Reshape",
    ),
    "the largest constant of all images": (
        """u = Unsqueeze(v, two)  n = LayerNormalization(u, unit, unit)
        m = ReduceMax<keepdims = 0>(n)  logits = Mul(v, m)""",
        "ReduceMax",
    ),
}

# The rows of an image depend on how many images the batch has.
REGROUPED = {
    "equal rows that were joined": (
        f"{EQUAL_ROWS} a = Concat<axis = 0>(y, z)  logits = Reshape(a, regrouped)",
        "Reshape",
    ),
    "equal rows of another number than those of an image": (
        f"""{EQUAL_ROWS} a = Concat<axis = 0>(x, y, zz)
        b = Slice(a, n, end, zero)  logits = Reshape(b, regrouped)""",
        "Concat",
    ),
    "numbers written to some of the equal rows": (
        f"""{EQUAL_ROWS} i = Expand(columns, s)  a = ScatterElements<axis = 1>(zz, i, y)
        logits = Reshape(a, regrouped)""",
        "Reshape",
    ),
    "numbers written to some rows of an image": (
        f"""{EQUAL_ROWS} a = Concat<axis = 0>(x, x)  i = Expand(columns, s)
        b = ScatterElements<axis = 1>(a, i, y)  c = Slice(b, zero, n, zero)
        logits = Reshape(c, regrouped)""",
        "ScatterElements",
    ),
    "the number of the image in a type for data": (
        "n = Cast<to = 1>(count)  r = Range(none, n, step)  u = Unsqueeze(r, one)  logits = Add(v, u)",
        "Range",
    ),
}
MIXING |= REGROUPED


def graph(body: str) -> onnx.ModelProto:
    return parser.parse_model(
        HEAD.replace("turned =", "turned4 = {-1, 2}, int64[2] turned =") + body + " }"
    )


def gives_each_image_its_own(model: onnx.ModelProto) -> bool:
    """Whether each image of a batch of two gets what it gets alone, as computed."""
    images = np.random.default_rng(0).random((2, 4, 2, 2), np.float32)
    alone, beside = (
        [ReferenceEvaluator(model).run(None, {"f": batch})[0] for batch in batches]
        for batches in (images[:, None], images[None])
    )
    return np.concatenate(alone).shape == beside[0].shape and np.allclose(
        np.concatenate(alone), beside[0]
    )


@pytest.mark.parametrize("name", INDEPENDENT)
def test_images_are_independent(name: str) -> None:
    model = graph(INDEPENDENT[name])
    assert find_mixing(model) == ()
    assert gives_each_image_its_own(model)


@pytest.mark.parametrize("name", REGROUPED)
def test_rows_of_other_images_change_the_numbers(name: str) -> None:
    assert not gives_each_image_its_own(graph(REGROUPED[name][0]))


@pytest.mark.parametrize("name", NOT_SHOWN)
def test_what_the_rules_do_not_show_is_refused_by_its_operator(name: str) -> None:
    body, operator = NOT_SHOWN[name]
    (found,) = find_mixing(graph(body))
    assert found.startswith(operator)
    assert gives_each_image_its_own(graph(body))


@pytest.mark.parametrize("name", MIXING)
def test_the_operator_that_mixes_images_is_named(name: str) -> None:
    body, operator = MIXING[name]
    (found,) = find_mixing(graph(body))
    assert found.startswith(operator)


def test_a_graph_for_one_image_cannot_mix() -> None:
    model = graph("m = ReduceMean(v, zero)  logits = Sub(v, m)")
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    assert find_mixing(model) == ()
