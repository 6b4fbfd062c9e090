"""Rule: replace a product with alpha I + beta 11^T by a sum or mean subtraction.

X (alpha I + beta 11^T) = alpha X + beta (X 1) 1^T for any alpha and beta. Only if alpha + n beta = 0, with
n the size of the constant, do its rows sum to zero, and the product is alpha (X - mean(X)). The released
GSoP position block uses I / P - 11^T / P^2 with ones of another size, which does not center. So the rule
checks the numbers and not only the pattern.

The product costs n^2 multiply-adds per row of X and stores n^2 numbers in the file; the sum costs n
additions.
"""

from typing import NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from sopdeploy_export.rewrites.context import AppliedRule

NAME = "centering by mean"
MIN_SIZE = 3  # smaller constants do not pay off
ROUNDING = 16 * float(np.finfo(np.float32).eps)


class Centering(NamedTuple):
    """The matrix alpha I + beta 11^T with *size* rows."""

    alpha: float
    beta: float
    size: int

    @property
    def removes_the_mean(self) -> bool:
        """Whether alpha + n beta is 0, up to float32 rounding."""
        return abs(self.alpha + self.size * self.beta) <= ROUNDING * abs(self.alpha)


def recognize(matrix: NDArray[np.floating]) -> Centering | None:
    """Find alpha and beta of a constant of this form; `None` for any other matrix."""
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or len(matrix) < MIN_SIZE:
        return None
    exact = matrix.astype(np.float64)
    beta = float(exact[0, 1])
    alpha = float(exact[0, 0]) - beta
    rebuilt = alpha * np.eye(len(exact)) + beta
    if alpha == 0 or np.abs(rebuilt - exact).max() > ROUNDING * np.abs(exact).max():
        return None
    return Centering(alpha, beta, len(exact))


def center_by_mean(model: onnx.ModelProto) -> tuple[onnx.ModelProto, list[AppliedRule]]:
    """Copy *model*, replace products with such constants, and list what was done.

    Left out are constants with beta = 0 (such as the identity), products with the constant on the left, and
    constants that are not float32, whose rounding hides whether alpha + n beta is 0.
    """
    found = {
        tensor.name: recognize(numpy_helper.to_array(tensor))
        for tensor in model.graph.initializer
        if len(tensor.dims) == 2 and tensor.data_type == onnx.TensorProto.FLOAT
    }
    nodes: list[onnx.NodeProto] = []
    rules: list[AppliedRule] = []
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for node in model.graph.node:
        known = found.get(node.input[1]) if node.op_type == "MatMul" else None
        if known is None or known.beta == 0:
            nodes.append(node)
            continue
        nodes += _replacement(copy.graph, node, known)
        total = f"alpha + {known.size} beta = {known.alpha + known.size * known.beta:.1g}"
        kind = "the mean is subtracted" if known.removes_the_mean else "not centering: the sum is added"
        rules.append(
            AppliedRule(
                name=NAME,
                where=node.input[1],
                precondition=f"a constant alpha I + beta 11^T; {total}",
                effect=f"{kind}; {known.size**2} multiply-adds per row become {known.size}",
            )
        )
    if rules:
        del copy.graph.node[:]
        copy.graph.node.extend(nodes)
        used = {name for node in nodes for name in node.input} | {value.name for value in copy.graph.output}
        kept = [tensor for tensor in copy.graph.initializer if tensor.name in used]
        del copy.graph.initializer[:]
        copy.graph.initializer.extend(kept)
    return copy, rules


def _replacement(graph: onnx.GraphProto, node: onnx.NodeProto, known: Centering) -> list[onnx.NodeProto]:
    """Build nodes for alpha (X - mean) or alpha X + beta sum, with constants."""
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
