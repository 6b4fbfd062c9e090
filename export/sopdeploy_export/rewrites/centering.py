"""Rule: a product with a constant alpha I + beta 11^T is a scaling and a sum, and centring is a mean.

Algebra: X (alpha I + beta 11^T) = alpha X + beta (X 1) 1^T for any alpha and beta. Only where alpha + n beta
= 0, with n the size of the constant, are its rows sums of zero, and the product is alpha (X - mean(X)).
GSoP's released position block writes I / P - 11^T / P^2 with ones of another size: that is not centring, and
a rule that knows the pattern but not the numbers would change the answer.

The product costs n^2 per row of X and puts n^2 numbers into the file; the sum costs n.
"""

from typing import NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from sopdeploy_export.rewrites.context import AppliedRule

NAME = "centring by mean"
SMALLEST = 3  # smaller constants are not worth a rule
ROUNDING = 16 * float(np.finfo(np.float32).eps)


class Centering(NamedTuple):
    """alpha I + beta 11^T of *size* rows."""

    alpha: float
    beta: float
    size: int

    @property
    def removes_the_mean(self) -> bool:
        """Say whether alpha + n beta is 0, up to the rounding of float32."""
        return abs(self.alpha + self.size * self.beta) <= ROUNDING * abs(self.alpha)


def recognise(matrix: NDArray[np.floating]) -> Centering | None:
    """Return alpha and beta of a constant of that form, `None` for any other matrix."""
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or len(matrix) < SMALLEST:
        return None
    exact = matrix.astype(np.float64)
    beta = float(exact[0, 1])
    alpha = float(exact[0, 0]) - beta
    rebuilt = alpha * np.eye(len(exact)) + beta
    if alpha == 0 or np.abs(rebuilt - exact).max() > ROUNDING * np.abs(exact).max():
        return None
    return Centering(alpha, beta, len(exact))


def textbook_centring(positions: int) -> NDArray[np.float64]:
    """Return I / M - 11^T / M^2, the constant of the papers."""
    return np.eye(positions) / positions - np.ones((positions, positions)) / positions**2


def center_by_mean(model: onnx.ModelProto) -> tuple[onnx.ModelProto, list[AppliedRule]]:
    """Return *model* with every product by such a constant rewritten, and what was done.

    Constants with beta = 0, the identity among them, and products that have the constant on the left stay;
    so do constants of another type than float32, whose rounding hides whether alpha + n beta is 0.
    """
    constants = {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in model.graph.initializer
        if len(tensor.dims) == 2 and tensor.data_type == onnx.TensorProto.FLOAT
    }
    found = {name: recognise(value) for name, value in constants.items()}
    nodes: list[onnx.NodeProto] = []
    rules: list[AppliedRule] = []
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for node in model.graph.node:
        known = found.get(node.input[1]) if node.op_type == "MatMul" else None
        if known is None or known.beta == 0:
            nodes.append(node)
            continue
        nodes += replacement(copy.graph, node, known)
        zero = f"alpha + {known.size} beta = {known.alpha + known.size * known.beta:.1g}"
        kind = "the mean is subtracted" if known.removes_the_mean else "not centring: the sum stays in"
        rules.append(
            AppliedRule(
                name=NAME,
                where=node.input[1],
                precondition=f"a constant alpha I + beta 11^T; {zero}",
                effect=f"{kind}; {known.size**2} multiply-adds per row become {known.size}",
            )
        )
    if rules:
        rebuild(copy.graph, nodes)
    return copy, rules


def replacement(graph: onnx.GraphProto, node: onnx.NodeProto, known: Centering) -> list[onnx.NodeProto]:
    """Return the nodes that compute alpha (X - mean) or alpha X + beta sum; adds their constants."""
    x, out = node.input[0], node.output[0]
    reduced, scaled = f"{out}_reduced", f"{out}_scaled"
    axes, alpha, beta = f"{out}_axes", f"{out}_alpha", f"{out}_beta"
    graph.initializer.append(numpy_helper.from_array(np.array([-1], dtype=np.int64), axes))
    graph.initializer.append(numpy_helper.from_array(np.array(known.alpha, dtype=np.float32), alpha))
    if known.removes_the_mean:
        return [
            helper.make_node("ReduceMean", [x, axes], [reduced], keepdims=1),
            helper.make_node("Sub", [x, reduced], [scaled]),
            helper.make_node("Mul", [scaled, alpha], [out]),
        ]
    graph.initializer.append(numpy_helper.from_array(np.array(known.beta, dtype=np.float32), beta))
    return [
        helper.make_node("ReduceSum", [x, axes], [reduced], keepdims=1),
        helper.make_node("Mul", [reduced, beta], [f"{reduced}_scaled"]),
        helper.make_node("Mul", [x, alpha], [scaled]),
        helper.make_node("Add", [scaled, f"{reduced}_scaled"], [out]),
    ]


def rebuild(graph: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> None:
    """Give *graph* these nodes, and drop the constants that none of them reads."""
    del graph.node[:]
    graph.node.extend(nodes)
    read = {name for node in nodes for name in node.input} | {value.name for value in graph.output}
    kept = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.initializer[:]
    graph.initializer.extend(kept)
