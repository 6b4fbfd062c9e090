"""Graph: the trained network's graph and that of a plain network, built independently, have one Merkle root.

The graph is that of the network as it was given, without what its outputs do not need; it is
what ships. What both networks share, such as a frozen buffer, is not compared with anything.
Without a plain network, the root is that of the trained one alone.

Refused: a plain network with other operations (`OTHERS` in `tests/attacks/planted/graphs.py`).
"""

from sopdeploy.errors import CertificateError
from sopdeploy_export.program_hashes import describe_difference
from sopdeploy_export.prove.networks import Compared

STATEMENT = (
    "The graph, without what its outputs do not need, has the graph hash of a plain network that was built "
    "independently, with these weights."
)
IS_PROVED = True


def prove_graph(trained: Compared, plain: Compared | None) -> None:
    """Raise `CertificateError` if *plain* has another root than *trained*."""
    if plain is not None and plain.root.sha256 != trained.root.sha256:
        difference = describe_difference(trained.root, plain.root, plain.role)
        raise CertificateError(f"the trained network is not the {plain.role} one: {difference}")
