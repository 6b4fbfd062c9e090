"""The optimizers that a recipe can select, by the settings of their tables. Imports torch only to create one.

A recipe without `optimizer.kind` uses SGD. Weight decay applies to every parameter, as in the papers.
`clip_norm` limits the norm of the whole gradient; 0 disables clipping.
"""

from typing import TYPE_CHECKING, Annotated, Any, Literal

import pydantic

from sopdeploy.config import FractionBelowOne, NonNegative, Positive, PositiveRate, StrictModel
from sopdeploy.environment import import_optional
from sopdeploy.errors import MissingPackageError

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from sopdeploy.training.adahessian import Parameters

Betas = tuple[FractionBelowOne, FractionBelowOne]


class OptimizerSettings(StrictModel):
    """Common settings; subclasses add the other arguments of their optimizer."""

    lr: PositiveRate
    weight_decay: Annotated[float, pydantic.Field(ge=0, le=1e6)] = 0.0
    clip_norm: NonNegative = 0.0


class Sgd(OptimizerSettings):
    """Stochastic gradient descent with momentum; weight decay is part of the gradient."""

    kind: Literal["sgd"] = "sgd"
    momentum: FractionBelowOne = 0.9
    nesterov: bool = False

    @pydantic.model_validator(mode="after")
    def _check_nesterov(self) -> "Sgd":
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum above 0")
        return self


class AdamW(OptimizerSettings):
    """Adam with decoupled weight decay. Source: Loshchilov and Hutter (ICLR 2019)."""

    kind: Literal["adamw"]
    betas: Betas = (0.9, 0.999)
    eps: Positive = 1e-8
    weight_decay: Annotated[float, pydantic.Field(ge=0, le=1e6)] = 0.01


class RAdam(OptimizerSettings):
    """Rectified Adam with decoupled weight decay. Source: Liu et al. (ICLR 2020)."""

    kind: Literal["radam"]
    betas: Betas = (0.9, 0.999)
    eps: Positive = 1e-8


class RMSProp(OptimizerSettings):
    """RMSProp with momentum; weight decay is part of the gradient.

    With `tensorflow`, `eps` is added inside of the root and the mean of the squares starts at 1, as in
    EfficientNet's code. With an `eps` of 1e-3, small gradients then have up to 32 times shorter steps.
    """

    kind: Literal["rmsprop"]
    alpha: FractionBelowOne = 0.9
    momentum: FractionBelowOne = 0.9
    eps: Positive = 1e-3
    tensorflow: bool = False


class AdaHessianConfig(OptimizerSettings):
    """AdaHessian, with the defaults of its paper."""

    kind: Literal["adahessian"]
    betas: Betas = (0.9, 0.999)
    eps: Positive = 1e-4
    power: Annotated[float, pydantic.Field(gt=0, le=1)] = 1.0


OptimizerConfig = Annotated[
    Sgd | AdamW | RAdam | RMSProp | AdaHessianConfig,
    pydantic.Field(discriminator="kind"),
    pydantic.BeforeValidator(lambda value: {"kind": "sgd", **value} if isinstance(value, dict) else value),
]


def create_optimizer(config: OptimizerConfig, parameters: "Parameters") -> "Optimizer":
    """Create the optimizer of *config* for *parameters* or their groups.

    "foreach" updates all parameters in a few calls, with the bits of a loop over them; RAdam has other bits.
    """
    import torch.optim  # noqa: PLC0415 # slow, and recipes are read without it

    from sopdeploy.training.adahessian import AdaHessian  # noqa: PLC0415 # imports torch

    options: dict[str, Any] = config.model_dump(exclude={"kind", "clip_norm", "tensorflow"})
    if isinstance(config, AdaHessianConfig):
        return AdaHessian(parameters, **options)
    if isinstance(config, RAdam):
        return torch.optim.RAdam(parameters, decoupled_weight_decay=True, **options)
    form: Any = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW, "rmsprop": torch.optim.RMSprop}
    chosen = form[config.kind]
    if isinstance(config, RMSProp) and config.tensorflow:
        timm_optim = import_optional("timm.optim", "timm", "sopdeploy[train]", MissingPackageError)
        chosen = timm_optim.RMSpropTF
    created: Optimizer = chosen(parameters, foreach=True, **options)
    return created
