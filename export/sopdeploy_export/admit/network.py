"""Checks of a network before anything runs."""

from torch import nn

from sopdeploy.errors import LoweringError
from sopdeploy.layers.export_hints import export_hints
from sopdeploy.models.base import is_in


def check_exportable(network: nn.Module, training_only: tuple[str, ...] = ()) -> None:
    """Raise `LoweringError` if a layer of *network* outside of *training_only* declares `not_exportable`."""
    for name, module in network.named_modules():
        reason = export_hints(module).not_exportable
        if reason is not None and not is_in(name, *training_only):
            raise LoweringError(f"{type(module).__name__} cannot be exported: {reason}")
