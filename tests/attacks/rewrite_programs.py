"""Small ONNX graphs around the patterns of the rewrite rules, in float64."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from tests.export.rewrites.test_rules import Net

BATCH = 2


class Program(Net):
    """A graph whose constants and inputs come from a random generator."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(lambda _strategy: None)
        self.random = np.random.default_rng(seed)

    def values(self, *shape: int, low: float = 0.0, high: float = 1.0) -> NDArray[np.float64]:
        return self.random.uniform(low, high, shape)

    def choose(self, *options: Any) -> Any:
        return options[int(self.random.integers(len(options)))]


def textbook_root(
    net: Program,
    x: str,
    d: int,
    m: int,
    *,
    steps: int = 3,
    norm: str = "trace",
    centered: float | None = None,
    of_matrix: Callable[[str], str] = str,
    of_norm: Callable[[str], str] = str,
    in_loop: Callable[[str], str] = str,
    compensated: bool = True,
) -> str:
    """The loop of the paper; *of_matrix*, *of_norm* and *in_loop* compute more with A, n and Y."""
    transposed, eye = net.Transpose(x, perm=[0, 2, 1]), np.eye(d)
    if centered is not None:
        x = net.MatMul(x, centered * (np.eye(m) - 1 / m))
    a = of_matrix(net.Div(net.MatMul(x, transposed), float(m)))
    if norm == "trace":
        n = net.Add(net.ReduceSum(net.Mul(a, eye), np.array([1, 2]), keepdims=1), 0.0625)
    elif norm == "frobenius":
        n = net.Clip(net.Sqrt(net.ReduceSum(net.Mul(a, a), np.array([1, 2]), keepdims=1)), 1e-12)
    else:  # `sum(-1, keepdim=True).sum(-1, keepdim=True)`
        n = net.Mul(a, eye)
        for axis in (-1, -2):
            n = net.ReduceSum(n, np.array([axis]), keepdims=1)
    n = of_norm(n)
    y, z = net.Div(a, n), net.constant(eye)
    for _ in range(steps):
        y = in_loop(y)
        t = net.Mul(net.Sub(3 * eye, net.MatMul(z, y)), 0.5)
        y, z = net.MatMul(y, t), net.MatMul(t, z)
    return net.Mul(y, net.Sqrt(n)) if compensated else y


def rank_gate(net: Program, logits: str, count: int, chosen: int, **wrong: Any) -> str:
    """Softmax weights of which *chosen* of *count* are not 0, by comparisons."""
    other, own = net.Unsqueeze(logits, np.array([1])), net.Unsqueeze(logits, np.array([2]))
    earlier = wrong.get("earlier", np.tril(np.ones((count, count), bool), -1))
    ahead = net.Or(net.Greater(other, own), net.And(net.Equal(other, own), earlier))
    kind = wrong.get("type", onnx.TensorProto.INT32)
    limit = np.asarray(wrong.get("limit", chosen), onnx.helper.tensor_dtype_to_np_dtype(kind))
    rank = net.ReduceSum(net.Cast(ahead, to=kind), np.array([2]), keepdims=0)
    return net.Softmax(net.Where(net.GreaterOrEqual(rank, limit), -np.inf, logits), axis=1)


def mixture(
    net: Program,
    x: str,
    weights: str,
    count: int,
    *,
    c: int = 3,
    of_maps: Callable[[str], str] = str,
    reduced: Any = (2,),
) -> str:
    """The weighted sum of the means of *count* experts on maps (B, 2, 2, 2)."""
    maps = net.Relu(net.Conv(x, net.values(count * 2, 2, 1, 1, low=-1), net.values(count * 2)))
    maps = net.Conv(maps, net.values(count * c, 2, 1, 1, low=-1), net.values(count * c), group=count)
    rows = of_maps(net.Reshape(maps, np.array([-1, c, 4])))
    vectors = net.ReduceMean(rows, np.array(reduced, np.int64), keepdims=0)
    vectors = net.Gather(vectors, np.arange(c)[::-1].copy(), axis=1)
    split = net.Reshape(vectors, np.array([-1, count, c]))
    return net.ReduceSum(net.Mul(split, net.Unsqueeze(weights, np.array([2]))), np.array([1]), keepdims=0)
