"""Rule: a mixture evaluates only the K experts that its gate chose.

Three equivalent forms are available. By default, the form depends on the bundle's optimum batch: up to
sixteen images, each image gathers the weights of its experts; above, all experts' convolutions run and each
image gathers activations. If K = N, all experts run.
"""

from functools import partial

import torch
from torch import Tensor, nn

from sopdeploy.errors import LoweringError
from sopdeploy.layers.covariance import at_least_float32
from sopdeploy.layers.export_hints import ExportHints
from sopdeploy.layers.isqrt_cov import ISqrtCov
from sopdeploy.layers.mixture.components import Components
from sopdeploy.layers.newton_schulz import NewtonSchulzConfig
from sopdeploy_export.rewrites.context import Build, RewriteContext
from sopdeploy_export.rewrites.linear import affine
from sopdeploy_export.rewrites.newton_schulz import check_triangle, iterate, report_root, start

NAME = "K of N experts"
TRIANGLE = "one triangle gather after the weighted sum"
GATHER_UP_TO = 16  # images in a batch


class Experts(nn.Module, ExportHints):
    """Mixture layer: feature maps (B, C, H, W) and gate weights (B, N) in, weighted sum (B, D) out."""

    computes_roots = True

    def __init__(self, bank: Components, chosen: int) -> None:
        super().__init__()
        self.count, self.chosen = bank.components, chosen
        self.before, self.rectified = bank.before, bank.rectified
        weights, self.shifts = list(bank.weights), nn.ParameterList()
        for step, weight_Noi in enumerate(weights if len(bank.biases) or len(bank.norms) else []):
            weights[step], shift_No = folded(bank, step)
            self.shifts.append(shift_No.reshape(weight_Noi.shape[:2]))
        self.banks = nn.ParameterList(w.detach().transpose(1, 2).contiguous() for w in weights)
        self.config: NewtonSchulzConfig | None = None
        if isinstance(bank.after, ISqrtCov):
            self.config = bank.after.config
            self.register_buffer("triangle", bank.after.triangle)

    def evaluate(self, x_BMC: Tensor, weights_BN: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the maps (B, K or N, M, d) of the experts and their weights (B, K or N).

        All N experts run unless a form overrides this method.
        """
        return self._project_all(x_BMC), weights_BN

    def forward(self, features_BCHW: Tensor, weights_BN: Tensor) -> Tensor:
        """Compute the weighted sum (B, D) of the experts' vectors."""
        maps_BKMd, weights_BK = self._maps(features_BCHW, weights_BN)
        if self.config is None:
            means_BKd = at_least_float32(maps_BKMd).mean(dim=2)
            return (weights_BK.unsqueeze(1) @ means_BKd).squeeze(1)
        total_Bdd = _summed_roots(maps_BKMd, weights_BK, self.config)
        return total_Bdd.flatten(start_dim=1).index_select(1, self.get_buffer("triangle"))

    def roots(self, features_BCHW: Tensor, weights_BN: Tensor) -> tuple[Tensor, Tensor]:
        """Compute experts' maps (P, d, M, 1) and roots (P, d, d) for parity checks."""
        assert self.config is not None  # noqa: S101 - only called for experts with a root
        maps_BKMd, weights_BK = self._maps(features_BCHW, weights_BN)
        maps_PMd = maps_BKMd.flatten(end_dim=1)
        ones_P1 = torch.ones_like(weights_BK).reshape(-1, 1)
        roots_Pdd = _summed_roots(maps_PMd.unsqueeze(1), ones_P1, self.config)
        return maps_PMd.transpose(1, 2).unsqueeze(3), roots_Pdd

    def _maps(self, features_BCHW: Tensor, weights_BN: Tensor) -> tuple[Tensor, Tensor]:
        x_BMC = self.before(features_BCHW).flatten(start_dim=2).transpose(1, 2)
        return self.evaluate(x_BMC, weights_BN)

    def _project_all(self, x_BMC: Tensor) -> Tensor:
        x = x_BMC.unsqueeze(1)
        for step, bank_Nio in enumerate(self.banks):
            x = x @ bank_Nio
            if len(self.shifts):
                x = x + self.shifts[step].unsqueeze(1)
            x = x.relu() if self.rectified else x
        return x


def folded(bank: Components, step: int) -> tuple[Tensor, Tensor]:
    """Fold the batch norm after convolution *step* into weights (N, out, in) and biases (N * out,)."""
    weight_Noi = bank.weights[step].detach()
    shift = bank.biases[step].detach() if len(bank.biases) else weight_Noi.new_zeros(weight_Noi.shape[:2])
    shift = shift.flatten()
    if len(bank.norms):
        scale, offset = affine(bank.norms[step])
        weight_Noi = (weight_Noi.double() * scale.reshape(*weight_Noi.shape[:2], 1)).to(weight_Noi.dtype)
        shift = (shift.double() * scale + offset).to(weight_Noi.dtype)
    return weight_Noi, shift


def _summed_roots(maps_BKMd: Tensor, weights_BK: Tensor, config: NewtonSchulzConfig) -> Tensor:
    """Compute the weighted sum (B, d, d) of the experts' roots with one matrix product at the end."""
    experts, positions, width = maps_BKMd.shape[1:]
    x_PMd = at_least_float32(maps_BKMd).flatten(end_dim=1)
    x_PMd = x_PMd - x_PMd.mean(dim=1, keepdim=True)
    begin = start(x_PMd, config)
    last = iterate(begin.matrix, config.iterations)
    weight_P11 = weights_BK.reshape(-1, 1, 1)
    if begin.use_gram:
        scale = weight_P11 * begin.inner_scale(positions, compensate=config.compensate)
        left, right, rows = x_PMd, last.next_z(scale) @ x_PMd, positions
    else:
        scale = weight_P11 * begin.outer_scale(positions) if config.compensate else weight_P11
        left, right, rows = at_least_float32(last.y), at_least_float32(last.t) * scale, width
    stacked_left = left.reshape(-1, experts * rows, width)
    return stacked_left.transpose(1, 2) @ right.reshape(-1, experts * rows, width)


class GatheredWeights(Experts):
    """Gather the weights of the K experts of each image, and compute only these experts."""

    def evaluate(self, x_BMC: Tensor, weights_BN: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the maps (B, K, M, d) and weights (B, K)."""
        weights_BK, experts_BK = weights_BN.topk(self.chosen, dim=1)
        x = x_BMC.unsqueeze(1)
        for step, bank_Nio in enumerate(self.banks):
            own = bank_Nio.index_select(0, experts_BK.flatten())
            x = x @ own.reshape(-1, self.chosen, *bank_Nio.shape[1:])
            if len(self.shifts):
                shifts = self.shifts[step].index_select(0, experts_BK.flatten())
                x = x + shifts.reshape(-1, self.chosen, 1, shifts.shape[1])
            x = x.relu() if self.rectified else x
        return x, weights_BK


class ProjectedThenGathered(Experts):
    """Run the convolutions of all experts on all images, and keep K maps per image for the root."""

    def evaluate(self, x_BMC: Tensor, weights_BN: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the maps (B, K, M, d) and weights (B, K)."""
        weights_BK, experts_BK = weights_BN.topk(self.chosen, dim=1)
        maps_BNMd = self._project_all(x_BMC)
        first_B1 = torch.arange(weights_BN.shape[0], device=experts_BK.device).unsqueeze(1) * self.count
        kept = maps_BNMd.flatten(end_dim=1).index_select(0, (experts_BK + first_B1).flatten())
        return kept.reshape(-1, self.chosen, *maps_BNMd.shape[2:]), weights_BK


class AllMasked(Experts):
    """Run all N experts on all images; a weight of 0 masks an expert."""


def forms(chosen: int) -> dict[str, Build]:
    """Return functions that build the three forms of a mixture with *chosen* experts per image."""
    return {
        "gathered weights": partial(GatheredWeights, chosen=chosen),
        "all projected, activations gathered": partial(ProjectedThenGathered, chosen=chosen),
        "all, masked": partial(AllMasked, chosen=chosen),
    }


def apply(context: RewriteContext, where: str, bank: Components) -> None:
    """Replace one mixture whose experts are summed with gate weights.

    Raises `LoweringError` if more than K gate weights of an image are not 0.
    """
    inputs = context.activations[where].inputs
    if len(inputs) != 2:  # not routed: the components' vectors are concatenated
        return
    weights_BN, chosen = inputs[1], bank.counted
    most = int((weights_BN != 0).sum(dim=1).max())
    if weights_BN.shape[1] != bank.components or most > chosen:
        raise LoweringError(
            f"{where}: {most} of {weights_BN.shape[1]} weights are not 0, but the mixture "
            f"uses K = {chosen} of {bank.components}; --no-lowering exports without rewrite rules"
        )
    small = context.batch.optimum <= GATHER_UP_TO
    default = "gathered weights" if small else "all projected, activations gathered"
    default = "all, masked" if chosen == bank.components else default
    if isinstance(bank.after, ISqrtCov):
        check_triangle(f"{where}.after", bank.after)
    build, choice = context.choose_form(where, forms(chosen), default)
    context.replace(NAME, where, build)
    context.report(
        NAME,
        where,
        f"at most K = {chosen} of N = {bank.components} weights are not 0 for each probe image",
        f"{choice.form}; {choice.by}",
    )
    if isinstance(bank.after, ISqrtCov):
        channels, height, width = context.activations[f"{where}.after"].inputs[0].shape[1:]
        report_root(context, f"{where}.after", bank.after.config, channels, height * width)
        context.report(
            TRIANGLE,
            where,
            "reading the triangle is linear; it is the upper one, row by row",
            f"1 gather instead of {chosen}; the last product computes the sum",
        )
