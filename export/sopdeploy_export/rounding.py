"""How much the rounding of intermediate values can change the margin of the two largest logits.

A result of an operation that has to be rounded to its type changes by at most the unit roundoff of this
type times its absolute value, and the margin by the gradient times that, in first order. If roundings are
independent and zero on average, the sum of these changes exceeds 4 times the root of the sum of their squares
with a probability of 2 exp(-8) = 0.0007 at most (Hoeffding, 1963; for roundings: Higham and Mary, 2019).
This is not a sound bound: roundings are not independent, and a runtime also rounds within an operation, for
example the partial sums of a convolution.
"""

import math
import re
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from sopdeploy.bundle.manifest import Precision
from sopdeploy.config import StrictModel
from sopdeploy_export.float64 import REDUCED, InFloat64
from sopdeploy_export.graph import evenly_spread

_MAX_IMAGES = 4  # the gradients of an image take about five times as long as its logits in float64
_FACTOR = 4.0
# What torch says of its own operations and of custom ones
_NO_DERIVATIVE = re.compile("derivative for .* is not implemented|no autograd formula was registered")


class RoundingBound(StrictModel):
    """Margins of some probe images and the *bounds* of their change by rounding, in the unit of logits."""

    kind: Literal["probabilistic, first-order"] = "probabilistic, first-order"
    precision: Precision
    margins: tuple[float, ...]
    bounds: tuple[float, ...]


def bound_rounding(
    program: ExportedProgram, images: NDArray[np.uint8], precision: Precision
) -> RoundingBound | None:
    """Bound the effect of rounding in *program* for at most `_MAX_IMAGES` of the *images* (P, H, W, 3) uint8.

    The types are those of *program*, which has the casts of *precision*. None for int8, whose steps are no
    roundings of this kind, and for a network with an operation that has no derivative.
    """
    if precision == "int8":
        return None
    module, chosen = program.module(), evenly_spread(len(images), _MAX_IMAGES)
    try:
        found = [bound_margin(module, torch.tensor(images[[index]])) for index in chosen]
    except RuntimeError as error:
        if _NO_DERIVATIVE.search(str(error)) is None:
            raise
        return None
    margins, bounds = zip(*found, strict=True)
    return RoundingBound(precision=precision, margins=margins, bounds=bounds)


def bound_margin(module: fx.GraphModule, pixels: Tensor) -> tuple[float, float]:
    """Compute the margin of the image *pixels* (1, H, W, 3) and the bound of its change by rounding."""
    rounded = _Rounded(module)
    logits: Tensor = rounded.run(pixels)[0]
    highest = logits.topk(2).values[0]
    margin = highest[0] - highest[1]
    if margin.requires_grad:  # otherwise nothing was rounded
        margin.backward()  # type: ignore[no-untyped-call]
    return float(margin.detach()), _FACTOR * math.sqrt(rounded.squares)


class _Rounded(fx.Interpreter):
    """Runs *module* in float64 and rounds the result of each operation to its type.

    After a backward pass, *squares* is the sum of the squared changes of what is differentiated.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.squares = 0.0

    def run_node(self, n: fx.Node) -> Any:
        """Run the operation *n* in float64 and round what it returns."""
        with InFloat64():
            results = super().run_node(n)
        if n.op == "output" or "val" not in n.meta:
            return results
        if isinstance(results, tuple | list):
            return type(results)(map(self._round, results, n.meta["val"]))
        return self._round(results, n.meta["val"])

    def _round(self, exact: Any, like: Any) -> Any:
        """Round *exact* to the type of *like*, and add the squares of the changes in a backward pass.

        Parameters are stored in this type: those in float32 are exact, others were rounded before.
        """
        if not isinstance(like, Tensor) or like.dtype not in REDUCED:
            return exact
        is_parameter = isinstance(exact, nn.Parameter)
        exact = (exact.detach() if is_parameter else exact).double()
        value = exact.detach()
        rounded, change = value.to(like.dtype).double(), value.abs() * torch.finfo(like.dtype).eps / 2
        if not is_parameter or like.dtype == torch.float32:
            change[rounded == value] = 0.0  # these values are exact
        if not change.any():
            return exact
        result = exact + (rounded - value) if exact.requires_grad else rounded.requires_grad_()

        def add(gradient: Tensor) -> None:
            self.squares += float((gradient * change).square().sum())

        result.register_hook(add)
        return result
