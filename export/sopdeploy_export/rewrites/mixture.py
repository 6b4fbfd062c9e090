"""Rule: a mixture evaluates only the K experts that its gate chose, and sums before it takes the triangle.

Rule of thumb: gathered weights up to batches of sixteen, beyond them all experts' convolutions and gathered
activations; all of them where K = N.
"""

from abc import ABC, abstractmethod
from functools import partial

import torch
from torch import Tensor, nn

from sopdeploy.errors import LoweringError
from sopdeploy.layers.covariance import at_least_float32
from sopdeploy.layers.isqrt_cov import ISqrtCov
from sopdeploy.layers.mixture.components import Components
from sopdeploy.layers.newton_schulz import NewtonSchulzConfig
from sopdeploy_export.rewrites.context import RewriteContext
from sopdeploy_export.rewrites.equivalence import Build
from sopdeploy_export.rewrites.newton_schulz import (
    describe,
    inner_scale,
    iterate,
    outer_scale,
    refuse_other_triangle,
    start,
)


class Experts(nn.Module, ABC):
    """Feature map (B, C, H, W) and gate weights (B, N) in, the weighted sum (B, D) out."""

    def __init__(self, bank: Components, chosen: int) -> None:
        super().__init__()
        self.count, self.chosen = bank.components, chosen
        self.before, self.rectified = bank.before, bank.rectified
        self.banks = nn.ParameterList(w.detach().transpose(1, 2).contiguous() for w in bank.weights)
        self.root: NewtonSchulzConfig | None = bank.after.config if isinstance(bank.after, ISqrtCov) else None
        if isinstance(bank.after, ISqrtCov):
            self.register_buffer("triangle", bank.after.triangle)

    @abstractmethod
    def evaluate(self, x_BMC: Tensor, weights_BN: Tensor) -> tuple[Tensor, Tensor]:
        """Return the maps (B, K or N, M, d) of the experts that count, and their weights (B, K or N)."""

    def forward(self, features_BCHW: Tensor, weights_BN: Tensor) -> Tensor:
        """Return the sum."""
        x_BMC = self.before(features_BCHW).flatten(start_dim=2).transpose(1, 2)
        maps_BKMd, weights_BK = self.evaluate(x_BMC, weights_BN)
        rule = self.root
        if rule is None:
            means_BKd = at_least_float32(maps_BKMd).mean(dim=2)
            return (weights_BK.unsqueeze(1) @ means_BKd).squeeze(1)
        total_Bdd = summed_roots(maps_BKMd, weights_BK, rule)
        return total_Bdd.flatten(start_dim=1).index_select(1, self.get_buffer("triangle"))

    def roots(self, features_BCHW: Tensor, weights_BN: Tensor) -> tuple[Tensor, Tensor]:
        """Return the maps (P, d, M, 1) of the experts that count, and their roots (P, d, d), one by one."""
        x_BMC = self.before(features_BCHW).flatten(start_dim=2).transpose(1, 2)
        maps_BKMd, weights_BK = self.evaluate(x_BMC, weights_BN)
        maps_PMd = maps_BKMd.flatten(end_dim=1)
        assert self.root is not None  # noqa: S101 - for the type; asked of experts with a root only
        roots_Pdd = summed_roots(maps_PMd.unsqueeze(1), torch.ones_like(weights_BK).reshape(-1, 1), self.root)
        return maps_PMd.transpose(1, 2).unsqueeze(3), roots_Pdd

    def rectify(self, x: Tensor) -> Tensor:
        """Return *x*, rectified where the experts have a ReLU."""
        return x.relu() if self.rectified else x


def summed_roots(maps_BKMd: Tensor, weights_BK: Tensor, rule: NewtonSchulzConfig) -> Tensor:
    """Return the weighted sum of the experts' roots, (B, d, d), from one last product."""
    experts, positions, width = maps_BKMd.shape[1:]
    x_PMd = at_least_float32(maps_BKMd).flatten(end_dim=1)
    x_PMd = x_PMd - x_PMd.mean(dim=1, keepdim=True)
    matrix, norm, by_positions = start(x_PMd, rule)
    last = iterate(matrix, rule.iterations)
    share_P11 = weights_BK.reshape(-1, 1, 1)
    if by_positions:
        scale = share_P11 * inner_scale(norm, positions, compensate=rule.compensate)
        left, right, rows = x_PMd, last.next_z(scale) @ x_PMd, positions
    else:
        scale = share_P11 * outer_scale(norm, positions) if rule.compensate else share_P11
        left, right, rows = at_least_float32(last.y), at_least_float32(last.t) * scale, width
    stacked_left = left.reshape(-1, experts * rows, width)
    return stacked_left.transpose(1, 2) @ right.reshape(-1, experts * rows, width)


class GatheredWeights(Experts):
    """Each image gathers the weights of its K experts and meets no others."""

    def evaluate(self, x_BMC: Tensor, weights_BN: Tensor) -> tuple[Tensor, Tensor]:
        """Return the maps (B, K, M, d) and weights (B, K)."""
        weights_BK, experts_BK = weights_BN.topk(self.chosen, dim=1)
        x = x_BMC.unsqueeze(1)
        for bank_Nio in self.banks:
            own = bank_Nio.index_select(0, experts_BK.flatten())
            x = self.rectify(x @ own.reshape(-1, self.chosen, *bank_Nio.shape[1:]))
        return x, weights_BK


class ProjectedThenGathered(Experts):
    """All experts' convolutions meet all images; only K maps for each image go on to the root."""

    def evaluate(self, x_BMC: Tensor, weights_BN: Tensor) -> tuple[Tensor, Tensor]:
        """Return the maps (B, K, M, d) and weights (B, K)."""
        weights_BK, experts_BK = weights_BN.topk(self.chosen, dim=1)
        maps_BNMd = project_all(self, x_BMC)
        first_B1 = torch.arange(weights_BN.shape[0], device=experts_BK.device).unsqueeze(1) * self.count
        kept = maps_BNMd.flatten(end_dim=1).index_select(0, (experts_BK + first_B1).flatten())
        return kept.reshape(-1, self.chosen, *maps_BNMd.shape[2:]), weights_BK


class AllMasked(Experts):
    """All N experts run on all images; weights of 0 mask those that were not chosen."""

    def evaluate(self, x_BMC: Tensor, weights_BN: Tensor) -> tuple[Tensor, Tensor]:
        """Return the maps (B, N, M, d) and weights (B, N)."""
        return project_all(self, x_BMC), weights_BN


def project_all(experts: Experts, x_BMC: Tensor) -> Tensor:
    """Return the maps of all experts, (B, N, M, d)."""
    x = x_BMC.unsqueeze(1)
    for bank_Nio in experts.banks:
        x = experts.rectify(x @ bank_Nio)
    return x


def forms(chosen: int) -> dict[str, Build]:
    """Return the three forms of a mixture of which *chosen* experts count."""
    return {
        "gathered weights": partial(GatheredWeights, chosen=chosen),
        "all projected, activations gathered": partial(ProjectedThenGathered, chosen=chosen),
        "all, masked": partial(AllMasked, chosen=chosen),
    }


NAME = "K of N experts"
TRIANGLE = "one triangle gather after the weighted sum"
GATHER_UP_TO = 16  # images in a batch


def apply(work: RewriteContext) -> None:
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


def describe_roots(work: RewriteContext, where: str, after: ISqrtCov, chosen: int) -> None:
    """Write down the rules that the experts' roots follow."""
    shape = work.calls[f"{where}.after"].inputs[0].shape
    describe(work, f"{where}.after", after.config, shape[1], shape[2] * shape[3])
    work.note(
        TRIANGLE,
        where,
        "taking the triangle is linear; it is the upper one, row by row",
        f"1 gather for {chosen}; the sum happens inside the last product",
    )
