"""One row of a paper's table, to stand beside what is counted here.

DSoP's GFLOPs are multiply-adds plus 5 per output of a batch norm, and while training 42 d^3 per covariance
root: the 5 is fvcore's, the 42 was fitted to ten printed rows (12 d^3 are computed; its origin is unknown).
The other papers count the multiply-adds alone, or name what else they count in the row's note.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

RESNET50_PARAMS, RESNET50_OPS = 25.5e6, 3.86e9  # what GSoP's Table 5 divides by


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One network of a paper's table, as printed.

    `params` are in millions, `ops` in billions, or both times those of ResNet-50 (`times_resnet50`); `dim` is
    the length of the representation in thousands. `part` says of which network they are, while training or
    shipped, `module` of which part of it. `dsop_ops` says that operations are counted as in DSoP's tables,
    `extra_ops` what the paper counts beside. `cut` figures are printed without rounding; where `reached` is
    false no network gives them, and `note` says why.
    """

    source: str
    model: str
    config: Mapping[str, Any] = field(default_factory=dict)
    num_classes: int | None = None
    part: Literal["training", "shipped"] = "shipped"
    module: str = ""
    params: float | None = None
    ops: float | None = None
    dim: float | None = None
    times_resnet50: bool = False
    dsop_ops: bool = False
    extra_ops: int = 0
    cut: bool = False
    reached: bool = True
    note: str = ""
