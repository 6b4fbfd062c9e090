"""ONNX: the ONNX graphs of the compared networks have one Merkle root.

Networks with equal programs can differ here only through the converter. It is not proved that
the graph computes what the network computes: the statement "File" compares numbers.

Refused: a converter that gives two graphs for one program
(`test_a_converter_that_gives_two_networks_with_one_program_two_graphs_is_rejected`).
"""

from collections.abc import Iterable

import onnx

from sopdeploy.bundle.onnx_root import onnx_root
from sopdeploy.errors import CertificateError

STATEMENT = "The ONNX graphs of these networks have one Merkle root."


def prove_onnx(model: onnx.ModelProto, others: Iterable[tuple[str, onnx.ModelProto]]) -> str:
    """Return the root of *model*, the graph of the shipped network, which all *others* must have, by role.

    Raises `CertificateError` if another compared network gives another graph.
    """
    root = onnx_root(model)
    for role, other in others:
        if onnx_root(other) != root:
            raise CertificateError(
                f"the ONNX graph of the {role} network is not that of the detached one"
            )
    return root
