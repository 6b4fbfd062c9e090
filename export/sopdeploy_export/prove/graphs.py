"""Graphs: the trained network's output, the detached and the plain network have one Merkle root.

No operation of a removed part is behind an output. What all networks share, such as a frozen
buffer, is not compared with anything.

Refused: a branch times zero (`tests/attacks/planted/branches.py`).
"""

from collections.abc import Callable, Mapping, Set

from torch import nn

from sopdeploy.config import StrictModel
from sopdeploy.errors import CertificateError, LoweringError, shorten
from sopdeploy.models.base import is_in
from sopdeploy_export.capture.program import Capture, Captures
from sopdeploy_export.detach.stubs import removed_modules
from sopdeploy_export.program_hashes import describe_difference

STATEMENT = (
    "The trained network's output, the detached network and a plain network built independently have one "
    "Merkle root."
)


class Roots(StrictModel):
    """The Merkle root of the program that the networks share, for any batch size, over `num_operations`."""

    any_batch: str
    num_operations: int


def capture_networks(
    networks: Mapping[str, nn.Module],
    captures: Captures,
    on_network: Callable[[str], None] = lambda _: None,
) -> dict[str, Capture]:
    """Return the programs of *networks*, in the same order; call *on_network* as each begins.

    The detached network, if there is one, is captured before the others: networks that share
    programs have the names of the first one, and so has the exported file. Raises
    `CertificateError` with the role.
    """
    programs = {}
    for role in ("detached", "trained", *networks):
        try:
            if role in networks:
                on_network(f"{role} network")
                programs[role] = captures.of(networks[role])
        except LoweringError as error:
            raise CertificateError(f"{role} network: {error}") from error
    return {role: programs[role] for role in networks}


def prove_graphs(
    captured: Mapping[str, Capture], trained: nn.Module, training_only: tuple[str, ...]
) -> tuple[Roots, Set[str]]:
    """Check that all networks have the Merkle root of the first one.

    Returns the root, and the names of the tensors that the outputs depend on. Raises
    `CertificateError` with the removed weights or modules that an output depends on, or with
    the first operation that differs from the first network.
    """
    first_role, first = next(iter(captured.items()))
    expected = first.root
    removed = removed_modules(trained, training_only).keys()
    reached: set[str] = set()
    for role, capture in captured.items():
        root = capture.root
        if leaking := sorted(name for name in capture.needed if is_in(name, *training_only)):
            raise CertificateError(
                f"the output still depends on training-only weights: {shorten(leaking)}; a branch "
                "affects the main output"
            )
        if role == "trained" and (leaking := sorted(root.modules & removed)):
            raise CertificateError(
                f"the output depends on operations of {shorten(leaking)}: a removed part changes a "
                "value that is needed; keep it"
            )
        if root.sha256 != expected.sha256:
            difference = describe_difference(root, expected, first_role)
            raise CertificateError(
                f"the {role} network is not the {first_role} one: {difference}"
            )
        if role in ("trained", "detached"):
            reached |= capture.needed
    return Roots(any_batch=expected.sha256, num_operations=len(expected.nodes)), reached
