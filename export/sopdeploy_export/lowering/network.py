"""Lowering a certified network: the rules in their order, on a copy, each proved where it is applied.

The certificate speaks of the network as it was trained and detached. Only after it holds is a copy rewritten,
captured anew and written as ONNX; parity then compares the file with the certified network, not with the
copy.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from sopdeploy.backbones.base import Backbone
from sopdeploy.manifest import BatchRange
from sopdeploy_export.lowering import (
    compensation,
    fusion_norm,
    gsop_centring,
    position,
    root,
    routing,
    row_conv,
    textbook,
)
from sopdeploy_export.lowering.autotune import ByClock, ByThumb
from sopdeploy_export.lowering.observe import observe
from sopdeploy_export.lowering.report import AppliedRule, Choice
from sopdeploy_export.lowering.work import Work

# A mixture goes before the roots: its experts share one.
RULES: tuple[Callable[[Work], None], ...] = (
    routing.apply,
    root.apply,
    compensation.apply,
    row_conv.apply,
    fusion_norm.apply,
    gsop_centring.apply,
    position.apply,
)
FORMULAS: tuple[Callable[[Work], None], ...] = (textbook.apply,)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rewritten:
    """The network to capture, whether its graph is another one than the certified, and what was done."""

    network: Backbone
    changed: bool
    rules: tuple[AppliedRule, ...]
    choices: tuple[Choice, ...]


def rewrite(
    certified: Backbone,
    images: Tensor,
    batch: BatchRange,
    *,
    textbook_only: bool = False,
    autotune: bool = False,
) -> Rewritten:
    """Return a rewritten copy of *certified*; *images* are two normalised (2, 3, H, W) probe images.

    With *textbook_only* the papers' formulas take the rules' place. Raises `LoweringError` where a
    precondition does not hold or a rewritten part gives other numbers in float64.
    """
    network = copy.deepcopy(certified).eval()
    work = Work(
        network=network,
        calls=observe(network, (images,)),
        batch=batch,
        choose=ByClock(batch) if autotune else ByThumb(),
    )
    for apply in FORMULAS if textbook_only else RULES:
        apply(work)
    return Rewritten(
        network=network, changed=work.changed, rules=tuple(work.rules), choices=tuple(work.choices)
    )
