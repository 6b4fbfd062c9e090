"""Parity: the file that ships, reloaded from disk, must give the network's numbers."""

from sopdeploy_export.parity.compare import compare, with_spectral
from sopdeploy_export.parity.reference import Reference, reference
from sopdeploy_export.parity.report import FLOORS, Agreement, OutputParity, ParityReport, agreement

__all__ = [
    "FLOORS",
    "Agreement",
    "OutputParity",
    "ParityReport",
    "Reference",
    "agreement",
    "compare",
    "reference",
    "with_spectral",
]
