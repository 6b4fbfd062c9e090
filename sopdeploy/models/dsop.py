"""DSoP: detachable second-order pooling. Branches train a first-order network and are then removed.

Paper: "DSoP: Detachable Second-Order Pooling", section III. A branch on the output of convK_x
consists of a_convK_x (blocks of the backbone's own kind, no down-sampling), dimension reduction
(DR) if there are more channels than the target, iSQRT-COV and a linear classifier. The loss is
the weighted sum of all losses.

The paper's text and its tables disagree: the parameters and FLOPs printed for ResNet-18 and
ResNet-34 belong to branches whose a_conv3_x and a_conv4_x have stride 2. `aux_stride="text"`
follows the text, "table" reproduces the printed counts (ResNet-50 then needs 3, 4, 7, 3 blocks
and four heads of 256).

On the backbones for 32-pixel images (section V-D, Table IV) covariances have at most 128
channels, dropout of 0.5 follows those of 128, and the losses of the three stages have weights
0.1, 0.2 and 0.3. Branches follow the blocks of a stage in patterns such as [0, 0, 3] x 6: a
branch of three blocks after every third block. Section V-D prints vectors of 2K, 4K and 4K for
the branches of the three stages, with ResNet-110 as the example, where dropout keeps half of
the elements. The stages of ResNet-110 have 16, 32 and 64 channels, so its vectors have 136, 528
and 2,080 elements. Only ResNet-164 fits, with 2,080, 8,256 and 8,256.
"""

from collections import OrderedDict
from collections.abc import Collection, Sequence
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, cast

import pydantic
from torch import Tensor, nn

from sopdeploy.base.config import Count, NonNegative
from sopdeploy.errors import ConfigError
from sopdeploy.layers.isqrt_cov import ISqrtCov, NewtonSchulzOptions
from sopdeploy.layers.pooling.base import dimension_reduction
from sopdeploy.models.backbones.base import initialize
from sopdeploy.models.base import Classifier

Blocks = Annotated[int, pydantic.Field(ge=0)]


class DSoPConfig(NewtonSchulzOptions):
    """The branches, stage by stage; `None` selects the paper's value for this backbone.

    `aux_blocks` has a value for each stage: the number of blocks of a branch after its last block
    (0: no branch), or one such number per block of the stage, as in section V-D's pattern
    [1, 0, 2]. `aux_widths` are the target channels of the covariance, `aux_weights` the weights
    of the losses (beta), `main_weight` the weight of the main loss (alpha). `aux_pooling` is
    iSQRT-COV or "gap", Table VII's control. `keep_unused_branches` keeps one block and the head
    of a branch of 0 blocks, as Table X counts.
    """

    aux_blocks: tuple[Blocks | tuple[Blocks, ...], ...] | None = None
    aux_widths: tuple[Count, ...] | None = None
    aux_weights: tuple[NonNegative, ...] | None = None
    aux_pooling: Literal["isqrt", "gap"] = "isqrt"
    main_weight: NonNegative = 1.0
    keep_unused_branches: bool = False


class PaperBranches(NamedTuple):
    """The paper's branches on one backbone, stage by stage; *weights* and *strides* are 1 if empty.

    `dropout_rate` applies to covariances of at least `dropout_from` channels.
    """

    blocks: tuple[int | tuple[int, ...], ...]
    widths: tuple[int, ...]
    weights: tuple[float, ...] = ()
    strides: tuple[int, ...] = ()
    dropout_rate: float = 0.0
    dropout_from: int = 1


class BranchPlan(NamedTuple):
    """One branch: its tap and its layers. A branch that is not `used` has parameters, but never runs."""

    tap: str
    used: bool
    blocks: int
    stride: int
    weight: float
    width: int
    dropout: float


class DSoP(Classifier):
    """Mixin that trains a first-order backbone with second-order branches.

    Put it before a backbone in the bases. In eval mode only the backbone runs. Its parts keep
    their names; the branches are under `branches`.

    Attributes:
        tap_stages: The taps of each stage: `layer2` has `layer2.0`, `layer2.1` and so on.
        taps_are_stages: Each tap is a stage of its own.
        branch_activation: The activation at the end of a branch's dimension reduction.
        normalize_branches: Batch norm and ReLU precede the pooling of a branch, for backbones whose blocks do
            not end in an activation.
    """

    training_only = ("branches",)
    taps_are_stages: ClassVar[bool] = False
    branch_activation: ClassVar[type[nn.ReLU] | type[nn.SiLU]] = nn.ReLU
    normalize_branches: ClassVar[bool] = False
    config: DSoPConfig

    def __init__(self, config: Any, *arguments: Any) -> None:
        super().__init__(config, *arguments)
        self.tap_stages: dict[str, list[str]] = {}  # the taps of each stage
        for tap in self.tap_channels:
            stage = tap if self.taps_are_stages else tap.rpartition(".")[0]
            self.tap_stages.setdefault(stage, []).append(tap)

        # By the name of the branch: `layer2_0` for the tap `layer2.0`, as names of parts
        # contain no dots.
        self.plans: dict[str, BranchPlan] = {
            plan.tap.replace(".", "_"): plan for plan in self.plan()
        }
        self.branches = nn.ModuleDict(
            {name: self._branch(plan) for name, plan in self.plans.items()}
        )
        initialize(self.branches)

        # By the tap: the name of its branch, if that branch runs.
        self.taps: dict[str, str] = {
            plan.tap: name for name, plan in self.plans.items() if plan.used
        }

    def paper_branches(self) -> PaperBranches:
        """Return the paper's branches on this backbone.

        Assumption for backbones that the paper does not cover: two blocks and at most 256
        channels for every stage, and all losses have the same weight.
        """
        stages = len(self.tap_stages)
        return PaperBranches(blocks=(2,) * stages, widths=(256,) * stages)

    def plan(self) -> list[BranchPlan]:
        """Plan the branches in the order of computation: the config's values, else the paper's.

        Raises `ConfigError` for options that do not match the stages.
        """
        # The values of the config, else those of the paper.
        config = self.config
        paper = self.paper_branches()
        stages = self.tap_stages
        blocks = paper.blocks if config.aux_blocks is None else config.aux_blocks
        widths = paper.widths if config.aux_widths is None else config.aux_widths
        paper_weights = paper.weights or (1.0,) * len(stages)
        weights = paper_weights if config.aux_weights is None else config.aux_weights
        strides = paper.strides or (1,) * len(stages)

        # Each of these options has one value per stage.
        for key, values in (
            ("aux_blocks", blocks),
            ("aux_widths", widths),
            ("aux_weights", weights),
        ):
            if len(values) != len(stages):
                raise ConfigError(
                    f"{key}: {len(values)} values for {len(stages)} stages; give one per stage"
                )

        # One branch for each tap of a stage that has blocks in it.
        plans = []
        for index, (stage, taps) in enumerate(stages.items()):
            counts = _blocks_by_tap(stage, taps, blocks[index])
            for tap, count in zip(taps, counts, strict=True):
                is_kept_unused = config.keep_unused_branches and tap == taps[-1]
                if count == 0 and not is_kept_unused:
                    continue

                width = min(widths[index], self.tap_channels[tap])
                plan = BranchPlan(
                    tap=tap,
                    used=count > 0,
                    blocks=max(count, 1),  # an unused branch has one block
                    stride=strides[index],
                    weight=weights[index],
                    width=width,
                    dropout=paper.dropout_rate if width >= paper.dropout_from else 0.0,
                )
                plans.append(plan)

        # The last branch reads what the pooling reads.
        if self.last_map is not None and plans and plans[-1].used and plans[-1].tap in taps:
            tap, channels = self.last_map
            plans[-1] = plans[-1]._replace(
                tap=tap, blocks=0, stride=1, width=min(widths[-1], channels)
            )
        return plans

    @property
    def last_map(self) -> tuple[str, int] | None:
        """Name and channels of the last feature map, if a convolution computes it from that of the last stage.

        The branch of the last stage then reads this map, right before the pooling (section III-A), and has
        no blocks: one block of so many channels has more parameters than a whole stage.
        """
        return None

    def heads(self, images: Tensor) -> dict[str, Tensor]:
        """Compute the logits of every used branch and of the network itself."""
        if not self.has_training_heads:
            return super().heads(images)
        features, maps = self.maps_at(images, self.taps)
        logits = {name: self.branches[name](maps[tap]) for tap, name in self.taps.items()}
        return {**logits, "main": self.classify(features)}

    def maps_at(
        self, images: Tensor, taps: Collection[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the last feature map (B, C, h, w), and the maps of *taps*, of which `last_map` may be one."""
        in_stages = [tap for tap in self.tap_channels if tap in taps]
        features, tapped = self.feature_maps(images, in_stages)
        maps = dict(zip(in_stages, tapped, strict=True))
        if self.last_map is not None:
            maps[self.last_map[0]] = features
        return features, maps

    def branch_vectors(self, images: Tensor) -> dict[str, Tensor]:
        """Compute the vectors (B, D) that the classifiers of the used branches read, without dropout."""
        _, maps = self.maps_at(images, self.taps)
        vectors = {}
        for tap, name in self.taps.items():
            x = maps[tap]
            for part, module in self.branches[name].named_children():
                if part not in ("dropout", "fc"):
                    x = module(x)
            vectors[name] = x
        return vectors

    def branch_classifier(self, name: str) -> nn.Linear:
        """Return the linear classifier of the branch *name*."""
        return cast(nn.Linear, self.branches[name].get_submodule("fc"))

    def loss_weights(self) -> dict[str, float]:
        """Return alpha as `main` and beta of every used branch."""
        betas = {name: self.plans[name].weight for name in self.taps.values()}
        return {"main": self.config.main_weight, **betas}

    def without_branches(self) -> "DSoP":
        """Build the network without branches, or return this one if none is used; all other weights stay."""
        if not self.taps:
            return self
        no_branches = {"aux_blocks": (0,) * len(self.tap_stages), "keep_unused_branches": False}
        network = type(self)(self.config.model_copy(update=no_branches), self.num_classes)

        network.load_state_dict(
            {name: self.state_dict()[name] for name in network.state_dict()}
        )
        return network

    def _branch(self, plan: BranchPlan) -> nn.Sequential:
        """Build a branch, which maps features (B, C, H, W) of the backbone to (B, classes) logits.

        `blocks` are of the backbone's kind, `ending` is what the backbone has between its last
        block and its pooling, `reduction` reduces the channels to those of the covariance.
        """
        # Blocks that go on where the tap leaves the backbone.
        last_tap, last_channels = self.last_map or ("", 0)
        channels = last_channels if plan.tap == last_tap else self.tap_channels[plan.tap]
        blocks = [
            self.branch_block(channels, channels, plan.stride if index == 0 else 1)
            for index in range(plan.blocks)
        ]

        # First-order pooling without reduction, unless the branch is second-order.
        ending: nn.Module = nn.Identity()
        reduction: nn.Module = nn.Identity()
        pooling: nn.Module = nn.AdaptiveAvgPool2d(1)

        length = channels
        # The last map has its norm and activation.
        if self.normalize_branches and plan.tap != last_tap:
            ending = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(inplace=True))
        if self.config.aux_pooling == "isqrt":
            # `plan` limits the width to the channels, so otherwise they are equal.
            if channels > plan.width:
                reduction = dimension_reduction(channels, plan.width, self.branch_activation)
            root = ISqrtCov(plan.width, self.config.root_config())
            pooling = root
            length = root.out_features

        layers = {
            "blocks": nn.Sequential(*blocks),
            "ending": ending,
            "reduction": reduction,
            "pooling": pooling,
            "flatten": nn.Flatten(),
            "dropout": nn.Dropout(plan.dropout),
            "fc": nn.Linear(length, self.num_classes),
        }
        return nn.Sequential(OrderedDict(layers))


def _blocks_by_tap(
    stage: str, taps: Sequence[str], blocks: int | tuple[int, ...]
) -> tuple[int, ...]:
    """Return the number of blocks in the branch of each of *taps*; a single one is for the last tap.

    Raises `ConfigError` for another number of them.
    """
    counts = (*[0] * (len(taps) - 1), blocks) if isinstance(blocks, int) else blocks
    if len(counts) != len(taps):
        raise ConfigError(
            f"aux_blocks: {len(counts)} values for the {len(taps)} blocks of "
            f"{stage}; give one per block"
        )
    return counts
