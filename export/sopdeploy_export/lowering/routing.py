"""Rule: a mixture evaluates only the K experts that its gate chose, and sums before it takes the triangle.

Rule of thumb: gathered weights up to batches of sixteen, beyond them all experts' convolutions and gathered
activations; all of them where K = N.
"""

import torch

from sopdeploy.blocks.components import Components
from sopdeploy.errors import LoweringError
from sopdeploy.pooling.isqrt_cov import ISqrtCov
from sopdeploy_export.lowering.experts import forms
from sopdeploy_export.lowering.root import describe, refuse_other_triangle
from sopdeploy_export.lowering.work import Work

NAME = "K of N experts"
TRIANGLE = "one triangle gather after the weighted sum"
GATHER_UP_TO = 16  # images in a batch


def apply(work: Work) -> None:
    """Rewrite every mixture that is summed by a gate's weights."""
    for where, bank in work.parts(Components):
        inputs = work.calls[where].inputs
        if len(inputs) != 2:
            continue
        chosen = count_chosen(where, bank, inputs[1])
        thumb = (
            "gathered weights"
            if work.batch.optimum <= GATHER_UP_TO
            else ("all projected, activations gathered")
        )
        thumb = "all, masked" if chosen == bank.components else thumb
        if isinstance(bank.after, ISqrtCov):
            refuse_other_triangle(f"{where}.after", bank.after)
        work.replace(NAME, where, work.pick(where, forms(chosen), thumb))
        choice = work.choices[-1]
        work.note(
            NAME,
            where,
            f"at most K = {chosen} of N = {bank.components} weights are not 0, in every row seen",
            f"{choice.form}; {choice.by}",
        )
        if isinstance(bank.after, ISqrtCov):
            describe_roots(work, where, bank.after, chosen)


def count_chosen(where: str, bank: Components, weights_BN: torch.Tensor) -> int:
    """Return K as the network counts it; refuse a gate that gives more experts a weight."""
    most = int((weights_BN != 0).sum(dim=1).max())
    if weights_BN.shape[1] != bank.components or most > bank.counted:
        raise LoweringError(
            f"{where}: {most} of {weights_BN.shape[1]} weights are not 0, but K = {bank.counted} of "
            f"{bank.components} are to be"
        )
    return bank.counted


def describe_roots(work: Work, where: str, after: ISqrtCov, chosen: int) -> None:
    """Write down the rules that the experts' roots follow."""
    shape = work.calls[f"{where}.after"].inputs[0].shape
    describe(work, f"{where}.after", after.rule, shape[1], shape[2] * shape[3])
    work.note(
        TRIANGLE,
        where,
        "taking the triangle is linear; it is the upper one, row by row",
        f"1 gather for {chosen}; the sum happens inside the last product",
    )
