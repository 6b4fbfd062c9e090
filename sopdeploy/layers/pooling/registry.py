"""All global poolings, as one choice that any backbone's config can hold.

A pooling is written as its name, `"isqrt"`, or with its switches, `{"kind": "isqrt", "iterations": 3}`.
"""

from typing import Annotated, Any, get_args

import pydantic

from sopdeploy.errors import ConfigError
from sopdeploy.layers.pooling.base import GapConfig
from sopdeploy.layers.pooling.bilinear import BilinearConfig, ImprovedBilinearConfig, LowRankBilinearConfig
from sopdeploy.layers.pooling.codebook import NetFvConfig, NetVladConfig
from sopdeploy.layers.pooling.compact_bilinear import CompactBilinearConfig, KernelPoolingConfig
from sopdeploy.layers.pooling.eigenvalues import GaussianConfig, LogEuclideanConfig, MpnCovConfig
from sopdeploy.layers.pooling.isqrt import ISqrtPoolingConfig


def with_kind(choice: Any) -> Any:
    """Return a pooling's bare name as a config with that name."""
    return {"kind": choice} if isinstance(choice, str) else choice


AnyPoolingConfig = (
    GapConfig
    | ISqrtPoolingConfig
    | MpnCovConfig
    | LogEuclideanConfig
    | BilinearConfig
    | ImprovedBilinearConfig
    | GaussianConfig
    | CompactBilinearConfig
    | KernelPoolingConfig
    | LowRankBilinearConfig
    | NetVladConfig
    | NetFvConfig
)
POOLINGS: tuple[str, ...] = tuple(
    config.model_fields["kind"].default for config in get_args(AnyPoolingConfig)
)

Pooling = Annotated[
    AnyPoolingConfig,
    pydantic.Field(discriminator="kind"),
    pydantic.BeforeValidator(with_kind),
]


def check_name(pooling: str) -> str:
    """Return *pooling* if it is the name of one; raises `ConfigError` with all there are."""
    if pooling not in POOLINGS:
        raise ConfigError(f"pooling {pooling!r}: no such pooling; there are {', '.join(POOLINGS)}")
    return pooling
