"""What an operator without an ONNX form says to the owner of the network: which, where, and what to do."""

import re

from torch import fx
from torch.export import ExportedProgram

from sopdeploy.errors import first_line
from sopdeploy_export.program_hashes import arguments_by_name, place_of

# How the converter names the node that it cannot translate, and the operator of it.
_TRANSLATED = re.compile(r"translating node %(\w+) :.*?\[target=torch\.ops\.([\w.]+)\]")
# What to do instead of linear algebra that ONNX does not have, by the names of its operators.
_REMEDIES = (
    (
        re.compile(r"linalg_(eig|svd)"),
        "ONNX has no eigendecomposition; for the square root of a covariance, use "
        "sopdeploy.layers.ISqrtCov, which has no weights, with 15 steps for weights that were trained "
        "with an exact root; for a logarithm there is no such form, so train with the square root "
        "(docs/second-order.md)",
    ),
    (
        re.compile(r"linalg_(inv|pinv|solve|cholesky|lu|ldl|qr|lstsq|householder)|cholesky"),
        "ONNX has no inverses and factorizations of matrices; compute what depends on weights alone in __init__, and "
        "write others as matrix products (docs/second-order.md)",
    ),
)
# Convolutions whose kernel depends on the image, such as CondConv, have a group for each image.
_KERNEL_PER_IMAGE = (
    "ONNX fixes the number of groups; for a kernel (B, out, in, h, w) for each image, write "
    "(kernel.flatten(2) @ F.unfold(x, (h, w))).unflatten(2, size)"
)
_TRANSPOSED_PER_IMAGE = (
    "ONNX fixes the number of groups; for a kernel (B, in, out, h, w) for each image, write "
    "F.fold(kernel.flatten(2).mT @ x.flatten(2), size, (h, w))"
)


def describe_failure(error: BaseException, program: ExportedProgram) -> str:
    """Name the operator of *program* that the converter cannot translate, or else describe the first cause.

    *error* is the last error of a chain, in which the `__cause__` of each is the one before.
    """
    causes = [error]
    while (cause := causes[-1].__cause__) is not None:
        causes.append(cause)
    problems = [first_line(cause) for cause in causes]

    # The operator that an error names, with its place if its node is in the program.
    for problem in problems:
        match = _TRANSLATED.search(problem)
        if match is not None:
            node_name, operator = match.groups()
            nodes = [node for node in program.graph.nodes if node.name == node_name]
            remedies = [_remedy_for_groups(node) for node in nodes]
            remedy = next(filter(None, remedies), _remedy_for(operator))
            return f"{operator}{''.join(map(place_of, nodes))}; {remedy}"

    return problems[-1]


def _remedy_for_groups(node: fx.Node) -> str:
    """Say what to write instead of *node* if it is a convolution with a group for each image; "" otherwise."""
    if "conv" not in str(node.target):
        return ""
    arguments = arguments_by_name(node.target, node.args, node.kwargs)
    if isinstance(arguments["groups"], int):
        return ""
    is_transposed = "transpose" in str(node.target) or arguments.get("transposed")
    return _TRANSPOSED_PER_IMAGE if is_transposed else _KERNEL_PER_IMAGE


def _remedy_for(operator: str) -> str:
    """Say what to write instead of *operator*, such as `aten._linalg_eigh.default`."""
    for names, remedy in _REMEDIES:
        if names.search(operator):
            return remedy
    return "use other operators"
