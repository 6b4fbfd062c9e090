"""Networks whose second-order head is a gated mixture: `gmsop-head:NAME` for every network NAME (GM-SOP).

Paper: Wang et al., "Global Gated Mixture of Second-order Pooling for Improving Deep Convolutional Neural
Networks" (NeurIPS 2018), section 2. At each tap of `head:NAME`, N projections, each with its covariance and matrix
square root, take the place of one. One gate, which reads the last tap, selects K of them for each image.

Two differences from the paper (`models.gmsop`) let the closed form of `head:NAME` be the start: projections have
no ReLU, and no batch norm follows the sum. N equal components would compute the vector of one, because the weights
of an image sum to 1. Equal components have equal gradients, so each begins with its own random difference from the
projection of the closed form (`SPREAD`).

Letters: B images, C channels, N components, K chosen ones, D length of a vector.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Annotated, Any

import pydantic
import torch
from torch import Tensor, nn

from sopdeploy.base.config import Count, NonNegative
from sopdeploy.errors import ConfigError
from sopdeploy.layers.isqrt_cov import ISqrtCov
from sopdeploy.layers.mixture import (
    Components,
    GateNoise,
    SparseGate,
    balance_loss,
    softmax_of_largest,
)
from sopdeploy.models.backbones.resnet import initialize_by_fan_in
from sopdeploy.models.base import TrainingOutput
from sopdeploy.models.registry import Entry
from sopdeploy.models.second_order_head import (
    POOLED_HEAD,
    HeadConfig,
    PooledHead,
    SecondOrderHead,
    head_entry,
)

SPREAD = 0.3  # norm of the difference of a component, relative to that of its projection


class GatedHeadConfig(HeadConfig):
    """The head of `gmsop-head:NAME`: `chosen` of `components` poolings per image (K of N).

    `gate_width` are the channels of the gate's covariance. `balance_weight` is alpha; None gives the
    balance loss the paper's weight, 100 / 256, for any batch.
    """

    components: Annotated[int, pydantic.Field(ge=2)] = 16
    chosen: Annotated[int, pydantic.Field(ge=2)] = 8  # with 1, the gate has no gradient
    gate_width: Count = 32
    balance_weight: NonNegative | None = None

    @pydantic.model_validator(mode="after")
    def _check_mixture(self) -> "GatedHeadConfig":
        if self.chosen > self.components:
            raise ValueError(
                f"chosen ({self.chosen}) is more than components ({self.components})"
            )
        if "isqrt" not in self.parts:
            raise ValueError(f"kind {self.kind} has no second-order pooling for the gate")
        return self


def spread(projection_dC: Tensor, components: int) -> Tensor:
    """Build the projections (N, d, C) of the *components* from one: each has its own random difference.

    They depend on the shape alone, so that a run can be repeated.
    """
    random = torch.Generator().manual_seed(0)
    shape = (components, *projection_dC.shape)
    noise_NdC = torch.randn(shape, generator=random, dtype=torch.float64).to(projection_dC)
    deviation = projection_dC.square().mean().sqrt()  # of an element
    return projection_dC + SPREAD * deviation * noise_NdC


class GatedPooledHead(PooledHead):
    """The head on statistics, of which the matrix square roots are weighted sums of those of K components.

    `gate` selects them, from the map at the last tap.
    """

    config: GatedHeadConfig

    def __init__(
        self,
        config: GatedHeadConfig,
        own_length: int,
        channels: Mapping[str, int],
        num_classes: int,
    ) -> None:
        super().__init__(config, own_length, channels, num_classes)
        self.gate_tap, gate_channels = tuple(channels.items())[-1]
        root = ISqrtCov(config.gate_width, config.root_config())
        predict = nn.Sequential(
            nn.Conv2d(gate_channels, config.gate_width, 1, bias=False), nn.ReLU(), root
        )
        self.gate = SparseGate(predict, root.out_features, config.components, config.chosen)
        initialize_by_fan_in(self.gate)

    def build_pooling(self, channels: int) -> Components:
        """Build N projections of a map of *channels*, each with its matrix square root."""
        return Components(
            "sop",
            channels,
            (min(channels, self.config.width),),
            components=self.config.components,
            evaluated=self.config.chosen,
            root=self.config.root_config(compensate=False),
            relu=False,
        )

    def set_projection(self, tap: str, projection_dC: Tensor) -> None:
        """Set the projections of the components of the map at *tap*: *projection_dC*, with their own differences."""
        weight_NdC = self.poolings[tap.replace(".", "_")].get_parameter("weights.0")
        weight_NdC.copy_(spread(projection_dC, len(weight_NdC)))

    def pool(
        self, maps: Mapping[str, Tensor], weights_BN: Tensor | None = None
    ) -> list[Tensor]:
        """Sum the components of each map by *weights_BN*, by default those of the gate without noise."""
        if weights_BN is None:
            weights_BN = self.gate(maps[self.gate_tap])
        # On `meta`, weights have no values that could be compared with 0 to route by them.
        routes = self.training and not weights_BN.is_meta
        return [
            self.poolings[tap.replace(".", "_")](
                maps[tap], weights_BN, gather=self.is_captured, route=routes
            )
            for tap in self.channels
        ]


class GatedHead(SecondOrderHead):
    """Mixin of inference models: logits and the gate's weights; put it before the class of `head:NAME`."""

    outputs = ("logits", "gates")
    head_class = GatedPooledHead
    pooled_head: GatedPooledHead

    def start_from(self, fitted: SecondOrderHead, others: Mapping[str, Tensor]) -> None:
        """Load the weights of *fitted*, from whose projections the components begin, and *others*."""
        tensors = dict(fitted.state_dict())
        for name, pooling in self.pooled_head.poolings.items():
            prefix = f"{POOLED_HEAD}.poolings.{name}"
            weight = pooling.get_parameter("weights.0")
            # A map of few channels is not projected.
            projection = torch.eye(weight.shape[1])
            if (stored := tensors.pop(f"{prefix}.layer_reduce.weight", None)) is not None:
                projection = stored[:, :, 0, 0]
            tensors[f"{prefix}.weights.0"] = spread(projection, len(weight))
        self.load_state_dict({**others, **tensors})

    def forward(self, images: Tensor) -> Any:
        """Compute (B, classes) logits of normalized (B, 3, H, W) images."""
        return self.outputs_tuple(images)[0]

    def outputs_tuple(self, images: Tensor) -> tuple[Tensor, ...]:
        """Compute logits (B, classes) and the gate's weights (B, N), K of them not 0, without noise."""
        own_BD, maps = self.head_inputs(images)
        weights_BN = self.pooled_head.gate(maps[self.pooled_head.gate_tap])
        return self.pooled_head(own_BD, maps, weights_BN), weights_BN


class TrainableGatedHead(GatedHead):
    """Mixin that adds the training-only noise of the gate, and the balance loss."""

    training_only = (f"{POOLED_HEAD}.gate.noise",)
    batches_per_step: int

    def __init__(self, config: Any, num_classes: int) -> None:
        super().__init__(config, num_classes)
        gate = self.pooled_head.gate
        components, length = gate.weight.shape
        gate.add_module("noise", GateNoise(length, components, "component"))

    def forward(self, images: Tensor) -> Any:
        """Compute (B, classes) logits in eval mode, a `TrainingOutput` in train mode."""
        if not self.training:
            return super().forward(images)

        # The gate selects with noise.
        own_BD, maps = self.head_inputs(images)
        gate = self.pooled_head.gate
        feature_BD = gate.feature(maps[self.pooled_head.gate_tap])
        noise_BN: Tensor = gate.get_submodule("noise")(feature_BD)
        weights_BN = softmax_of_largest(gate.logits(feature_BD) + noise_BN, gate.chosen)

        logits_BK: Tensor = self.pooled_head(own_BD, maps, weights_BN)
        balance = balance_loss(
            weights_BN, self.pooled_head.config.balance_weight, self.batches_per_step
        )
        return TrainingOutput(
            logits_BK,
            branches={},
            penalties={"balance": balance},
            component_counts=(weights_BN > 0).sum(dim=0),
        )


def gated_head_entry(prefix: str, name: str) -> Entry:
    """Build the entry of `gmsop-head:NAME` for the network *name*; raises `ConfigError` as `head_entry`."""
    base = head_entry(prefix, name)
    if base.network.training_only:
        raise ConfigError(
            f"{prefix}:{name}: {name} has training-only parts; use a network without them"
        )
    classes: Any = base.network, base.config  # mypy takes their type for one without a hash
    network, config = _derive_gated_classes(*classes)
    summary = f"{base.summary} with a gate"
    return replace(base, network_source=network, config_source=config, summary=summary)


@cache
def _derive_gated_classes(network: Any, config: Any) -> tuple[Any, Any]:
    """Derive the classes of *network*, which has a head, with a gate, and of its *config*."""
    with_gate = pydantic.create_model(
        f"GMSOP{config.__name__}", __base__=config, head=(GatedHeadConfig, GatedHeadConfig())
    )
    inference = type(f"Gated{network.__name__}", (GatedHead, network), {})
    parts = {"inference_class": inference}
    return type(f"GMSOP{network.__name__}", (TrainableGatedHead, network), parts), with_gate
