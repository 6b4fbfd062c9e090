"""Graph: the trained network's graph and an independently built plain network have one graph hash.

The graph is captured from the network as it was given, without what its outputs do not need. It is
what is exported. What both networks share, such as a frozen buffer, is not compared with anything.
Without a plain network, there is only the hash of the trained network.

Refused: a plain network with other operations (`OTHERS` in `tests/attacks/planted/graphs.py`).
"""

from sopdeploy.errors import CertificateError
from sopdeploy_export.program_hashes import describe_difference
from sopdeploy_export.prove.networks import Compared

STATEMENT = (
    "With the same weights, the plain network has the same graph hash as the trained network without the "
    "operators that no output needs."
)
IS_PROVED = True


def prove_graph(trained: Compared, plain: Compared | None) -> None:
    """Raise `CertificateError` if *plain* has another root than *trained*."""
    if plain is not None and plain.root.sha256 != trained.root.sha256:
        difference = describe_difference(trained.root, plain.root, plain.role)
        raise CertificateError(
            f"the trained network differs from the {plain.role} one: {difference}"
        )
