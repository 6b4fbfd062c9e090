"""Declarations on layers that tell the exporter how to convert them.

The exporter reads these attributes instead of naming classes, so a new layer needs no change in
the exporter.
"""

from typing import ClassVar

from torch import nn


class ExportHints:
    """Mixin of class attributes for `nn.Module` subclasses that need special treatment at export.

    Attributes:
        keep_float32: The layer and its children stay in float32 when the network is converted to float16 or
            bfloat16, and so does what they compute without weights (covariance, softmax, means).
        low_precision_children: Names of children that are converted although `keep_float32` is set, such as
            the 1x1 convolution that precedes a covariance.
        cast_inputs: A layer without weights of its own receives its first input in float32. It has no
            effect where one of `low_precision_children` exists: that child receives the input instead.
        output_in_network_dtype: The output, which scales a feature map, is cast to the network's type.
        is_gate: A mixture gate with `feature`, `logits(feature)` and `chosen`; parity checks report routing.
        not_exportable: Why the layer has no ONNX form that every runtime accepts, and what to use instead.
            The exporter refuses the network with this message.
        is_captured: The exporter sets this while it captures the network. A layer may then compute the same
            by operators that are faster in a runtime than in eager mode.
    """

    keep_float32: ClassVar[bool] = False
    low_precision_children: ClassVar[tuple[str, ...]] = ()
    cast_inputs: ClassVar[bool] = False
    output_in_network_dtype: ClassVar[bool] = False
    is_gate: ClassVar[bool] = False
    not_exportable: str | None = None
    is_captured: bool = False


_DEFAULTS = ExportHints()


def export_hints(module: nn.Module) -> ExportHints:
    """Look up the declarations of *module*; modules of torch and timm have the defaults."""
    return module if isinstance(module, ExportHints) else _DEFAULTS
