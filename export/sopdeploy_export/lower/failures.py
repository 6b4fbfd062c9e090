"""What an operator without an ONNX form says to the owner of the network: which, where, and what to do."""

import re

from torch import fx
from torch.export import ExportedProgram

from sopdeploy.errors import first_line
from sopdeploy_export.capture.failures import at_line
from sopdeploy_export.network import is_network_code
from sopdeploy_export.program_hashes import module_of

# How the converter names the node that it cannot translate, and the operator of it.
_TRANSLATED = re.compile(r"translating node %(\w+) :.*?\[target=torch\.ops\.([\w.]+)\]")
_FRAME = re.compile(r'File "(.+)", line (\d+), in ')  # of the trace that torch keeps of a node
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
            places = [place_of(node) for node in program.graph.nodes if node.name == node_name]
            return f"{operator}{''.join(places)}; {_remedy_for(operator)}"

    return problems[-1]


def place_of(node: fx.Node) -> str:
    """Write the module of *node* and the line of its code as ` in head, in net.py:12 (the line)`.

    The line is the innermost one in a `forward` of the network's own code; without one, it is left out.
    """
    place = f" in {module_of(node)}"
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    for file, number in reversed(frames):
        if is_network_code(file):
            return f"{place},{at_line(file, int(number))}"
    return place


def _remedy_for(operator: str) -> str:
    """Say what to write instead of *operator*, such as `aten._linalg_eigh.default`."""
    for names, remedy in _REMEDIES:
        if names.search(operator):
            return remedy
    return "use other operators"
