"""All global poolings, as the type of a config field.

The value is a pooling's name, `"isqrt"`, or a name with options, `{"kind": "isqrt",
"iterations": 3}`.
"""

import inspect
import re
from typing import Annotated, Literal, TypeVar

import pydantic
from torch import nn

from sopdeploy.base.config import FieldValues, with_registered
from sopdeploy.base.plugins import POOLINGS
from sopdeploy.errors import ConfigError
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


Registered = TypeVar("Registered", bound=type)


def register_pooling(pooling: Registered) -> Registered:
    """Let networks name a pooling: a module, or a `PoolingConfig` under the value of its field `kind`.

    Args:
        pooling: A module class, whose first argument is the number of channels of the map. It maps features
            (B, C, H, W) to vectors (B, D). Its name is that of the class in lower case, `MyPool` is `my-pool`, and
            its other arguments, which have defaults, are the options. Or a subclass of `PoolingConfig`,
            whose `layer` is the module.

    Returns:
        *pooling*, so that this is a decorator.

    Raises:
        ConfigError: *pooling* is neither, or its name is invalid or in use.

    Examples:
        >>> @sopdeploy.register_pooling
        ... class Maximum(torch.nn.Module):
        ...     def __init__(self, channels: int):
        ...         super().__init__()
        ...         self.out_features = channels
        ...
        ...     def forward(self, features):
        ...         return features.amax(dim=(2, 3))
        >>> sopdeploy.create_model("resnet8", pooling="maximum").pooling
        Maximum()
    """
    is_module = isinstance(pooling, type) and issubclass(pooling, nn.Module)
    POOLINGS.register_config(config_of(pooling) if is_module else pooling, PoolingConfig)
    return pooling


def config_of(module: type[nn.Module]) -> type[PoolingConfig]:
    """Derive the config of a pooling from the arguments of its *module* class.

    Raises `ConfigError` for an argument without a default beside the number of channels.
    """
    kind = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", module.__name__).lower()
    _, *arguments = inspect.signature(module).parameters.values()
    without = [name.name for name in arguments if name.default is name.empty]
    if without:
        raise ConfigError(
            f"pooling {module.__name__}: give the argument {without[0]} a default; only the first argument, the "
            "number of channels, needs none"
        )
    options: FieldValues = {
        argument.name: (type(argument.default), argument.default) for argument in arguments
    }

    def build(config: PoolingConfig, channels: int) -> nn.Module:
        return module(channels, **{name: getattr(config, name) for name in options})

    fields: FieldValues = {"kind": (Literal[kind], kind), **options}
    derived = pydantic.create_model(
        f"{module.__name__}Config",
        __base__=PoolingConfig,
        __module__=module.__module__,
        **fields,
    )
    derived.layer = staticmethod(build)
    return derived
