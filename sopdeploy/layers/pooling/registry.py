"""All global poolings, as the type of a config field.

The value is a pooling's name, `"isqrt"`, or a name with options, `{"kind": "isqrt",
"iterations": 3}`.
"""

from typing import Annotated

import pydantic

from sopdeploy.base.config import with_registered
from sopdeploy.base.plugins import POOLINGS
from sopdeploy.layers.pooling.base import FlattenConfig, GapConfig, PoolingConfig
from sopdeploy.layers.pooling.bilinear import (
    BilinearConfig,
    GaussianConfig,
    ImprovedBilinearConfig,
)
from sopdeploy.layers.pooling.covariance import (
    ISqrtPoolingConfig,
    LogEuclideanConfig,
    MpnCovConfig,
)

AnyPoolingConfig = (
    GapConfig
    | FlattenConfig
    | ISqrtPoolingConfig
    | MpnCovConfig
    | LogEuclideanConfig
    | BilinearConfig
    | ImprovedBilinearConfig
    | GaussianConfig
)

Pooling = Annotated[
    AnyPoolingConfig,
    pydantic.Field(discriminator="kind"),
    with_registered(POOLINGS, PoolingConfig),
    pydantic.SerializeAsAny(),
    pydantic.BeforeValidator(
        lambda value: {"kind": value} if isinstance(value, str) else value
    ),
]


def register_pooling(config: type[PoolingConfig]) -> None:
    """Let networks name the pooling *config*, by the value of its field `kind`.

    Args:
        config: A subclass of `PoolingConfig`, whose `layer` is the module.

    Raises:
        ConfigError: *config* is not such a class, or its name is invalid or in use.

    Examples:
        >>> from typing import Literal
        >>> from sopdeploy.layers.pooling.base import GlobalPooling, PoolingConfig
        >>> class Maximum(GlobalPooling):
        ...     def __init__(self, config, channels):
        ...         super().__init__()
        ...         self.out_features = channels
        ...
        ...     def pool(self, features):
        ...         return features.amax(dim=(2, 3))
        >>> class MaximumConfig(PoolingConfig):
        ...     layer = Maximum
        ...     kind: Literal["maximum"] = "maximum"
        >>> sopdeploy.register_pooling(MaximumConfig)
        >>> sopdeploy.create_model("resnet8", pooling="maximum").pooling
        Maximum()
    """
    POOLINGS.register_config(config, PoolingConfig)
