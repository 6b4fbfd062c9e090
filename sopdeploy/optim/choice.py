"""What a recipe's `optimizer` may hold; without `kind` it is SGD, as in the first recipes.

Decay acts on every parameter, as in the papers. `clip_norm` is the largest norm of the whole gradient, 0 for
any.
"""

from collections.abc import Iterable
from typing import Annotated, Any, Literal

import pydantic
import torch
from torch import Tensor

from sopdeploy.frozen import Frozen, NotNegative, Part, Positive
from sopdeploy.optim.adahessian import AdaHessian

Betas = tuple[Part, Part]
Parameters = Iterable[Tensor] | Iterable[dict[str, Any]]  # or groups of them with values of their own


class Sgd(Frozen):
    """Stochastic gradient descent; its decay is part of the gradient."""

    kind: Literal["sgd"] = "sgd"
    lr: Positive
    momentum: Part = 0.9
    nesterov: bool = False
    weight_decay: NotNegative = 0.0
    clip_norm: NotNegative = 0.0

    @pydantic.model_validator(mode="after")
    def _nesterov_has_momentum(self) -> "Sgd":
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum above 0")
        return self

    def make(self, parameters: Parameters) -> torch.optim.Optimizer:
        """Return the optimizer of *parameters*."""
        return torch.optim.SGD(
            parameters,
            lr=self.lr,
            momentum=self.momentum,
            nesterov=self.nesterov,
            weight_decay=self.weight_decay,
        )


class AdamW(Frozen):
    """Adam with decoupled decay. Source: Loshchilov and Hutter (ICLR 2019)."""

    kind: Literal["adamw"]
    lr: Positive
    betas: Betas = (0.9, 0.999)
    eps: Positive = 1e-8
    weight_decay: NotNegative = 0.01
    clip_norm: NotNegative = 0.0

    def make(self, parameters: Parameters) -> torch.optim.Optimizer:
        """Return the optimizer of *parameters*."""
        return torch.optim.AdamW(
            parameters, lr=self.lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay
        )


class RAdam(Frozen):
    """Adam with its variance rectified, and decoupled decay. Source: Liu et al. (ICLR 2020)."""

    kind: Literal["radam"]
    lr: Positive
    betas: Betas = (0.9, 0.999)
    eps: Positive = 1e-8
    weight_decay: NotNegative = 0.0
    clip_norm: NotNegative = 0.0

    def make(self, parameters: Parameters) -> torch.optim.Optimizer:
        """Return the optimizer of *parameters*."""
        return torch.optim.RAdam(
            parameters,
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            decoupled_weight_decay=True,
        )


class RMSProp(Frozen):
    """RMSProp with momentum, as EfficientNet learns. Its decay is part of the gradient."""

    kind: Literal["rmsprop"]
    lr: Positive
    alpha: Part = 0.9
    momentum: Part = 0.9
    eps: Positive = 1e-3
    weight_decay: NotNegative = 0.0
    clip_norm: NotNegative = 0.0

    def make(self, parameters: Parameters) -> torch.optim.Optimizer:
        """Return the optimizer of *parameters*."""
        return torch.optim.RMSprop(
            parameters,
            lr=self.lr,
            alpha=self.alpha,
            momentum=self.momentum,
            eps=self.eps,
            weight_decay=self.weight_decay,
        )


class AdaHessianChoice(Frozen):
    """AdaHessian: two more derivatives a step, in float32 or bfloat16 and without a compiler."""

    kind: Literal["adahessian"]
    lr: Positive
    betas: Betas = (0.9, 0.999)
    eps: Positive = 1e-4
    weight_decay: NotNegative = 0.0
    power: Annotated[float, pydantic.Field(gt=0, le=1)] = 1.0
    clip_norm: NotNegative = 0.0

    def make(self, parameters: Parameters) -> torch.optim.Optimizer:
        """Return the optimizer of *parameters*."""
        return AdaHessian(
            parameters,
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            power=self.power,
        )


def sgd_where_no_kind(value: Any) -> Any:
    """Return the table of a recipe with `kind = "sgd"` where it names none."""
    return {"kind": "sgd", **value} if isinstance(value, dict) else value


OptimizerChoice = Annotated[
    Sgd | AdamW | RAdam | RMSProp | AdaHessianChoice,
    pydantic.Field(discriminator="kind"),
    pydantic.BeforeValidator(sgd_where_no_kind),
]
