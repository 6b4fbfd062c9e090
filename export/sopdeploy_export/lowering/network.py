"""Lowering a certified network: the rules in their order, on a copy, each proved where it is applied.

The certificate speaks of the network as it was trained and detached. Only after it holds is a copy rewritten,
captured anew and written as ONNX; parity then compares the file with the certified network, not with the
copy.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor, nn

from sopdeploy.backbones.base import Backbone
from sopdeploy.manifest import BatchRange
from sopdeploy.pooling.isqrt_cov import ISqrtCov
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
from sopdeploy_export.lowering.autotune import ByClock, ByThumb, as_it_is
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


class Wish(NamedTuple):
    """What was asked for: the rules or the papers' formulas; forms by the clock or by rule of thumb.

    `stored` is the type of Newton-Schulz's matrices between two products, `cast` what the clock does to a
    form before it times it: the casts that it will ship with.
    """

    rules: bool = True
    autotune: bool = False
    stored: Literal["float32", "float16"] = "float32"
    cast: Callable[[nn.Module], nn.Module] = as_it_is


BY_RULES = Wish()


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
    wish: Wish = BY_RULES,
) -> Rewritten:
    """Return a rewritten copy of *certified*; *images* are two normalised (2, 3, H, W) probe images.

    Raises `LoweringError` where a precondition does not hold or a rewritten part gives other numbers in
    float64.
    """
    network = copy.deepcopy(certified).eval()
    for part in network.modules():
        if isinstance(part, ISqrtCov):
            part.rule = part.rule._replace(stored=wish.stored)
    work = Work(
        network=network,
        calls=observe(network, (images,)),
        batch=batch,
        choose=ByClock(batch, wish.cast) if wish.autotune else ByThumb(),
    )
    for apply in RULES if wish.rules else FORMULAS:
        apply(work)
    return Rewritten(
        network=network, changed=work.changed, rules=tuple(work.rules), choices=tuple(work.choices)
    )
