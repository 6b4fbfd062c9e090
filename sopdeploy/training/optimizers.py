"""What a recipe's `optimizer` may hold; without `kind` it is SGD, as in the first recipes.

Decay acts on every parameter, as in the papers. `clip_norm` is the largest norm of the whole gradient, 0 for
any.
"""

from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal

import pydantic
import torch
from torch import Tensor
from torch.optim import Optimizer

from sopdeploy.config import FractionBelowOne, NonNegative, Positive, StrictModel
from sopdeploy.seeds import derive_seed


class AdaHessian(Optimizer):
    """`differentiate` each piece of a batch, then `step`; decay is decoupled, as in AdamW.

    *betas* are those of the two running means, *eps* keeps the division finite, *power* is k of Eq. 11.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-4,
        weight_decay: float = 0.0,
        power: float = 1.0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "power": power}
        super().__init__(params, defaults)
        self.curvatures: dict[Tensor, Tensor] = {}

    def parameters(self) -> list[Tensor]:
        """Return the parameters that learn, in the order in which z is drawn."""
        return [p for group in self.param_groups for p in group["params"] if p.requires_grad]

    def differentiate(self, loss: Tensor, seed: int) -> None:
        """Add the gradient of *loss* to `grad` and H z, with z from *seed*, to `curvatures`.

        Every piece of a batch gets the same seed: H z is linear in the loss, so that pieces add up to the
        whole. The network must be differentiable twice.
        """
        parameters = self.parameters()
        gradients = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
        used = [(p, g) for p, g in zip(parameters, gradients, strict=True) if g is not None]
        curved = [(p, g) for p, g in used if g.requires_grad]
        products = torch.autograd.grad(
            [g for _, g in curved],
            [p for p, _ in curved],
            grad_outputs=[signs(seed, number, p) for number, (p, _) in enumerate(curved)],
            allow_unused=True,
        )
        for parameter, gradient in used:
            parameter.grad = add(parameter.grad, gradient.detach())
        for (parameter, _), product in zip(curved, products, strict=True):
            if product is not None:
                self.curvatures[parameter] = add(self.curvatures.get(parameter), product)

    def sum_over(self, sums: Callable[[list[Tensor | None], list[Tensor]], list[Tensor | None]]) -> None:
        """Replace gradients and curvatures by what *sums* makes of them: their sums over processes."""
        parameters = self.parameters()
        gradients = sums([parameter.grad for parameter in parameters], parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        curvatures = sums([self.curvatures.get(parameter) for parameter in parameters], parameters)
        pairs = zip(parameters, curvatures, strict=True)
        self.curvatures = {parameter: curvature for parameter, curvature in pairs if curvature is not None}

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget gradients and curvatures."""
        super().zero_grad(set_to_none)
        self.curvatures = {}

    @torch.no_grad()
    def step(self, _closure: Any = None, /) -> None:  # type: ignore[override]
        """Move the parameters that have a gradient; there is no closure to call."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.move(parameter, group)

    def move(self, parameter: Tensor, group: dict[str, Any]) -> None:
        """Do one parameter's update: Eqs. 11 and 12."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["mean"] = torch.zeros_like(parameter)
            state["curvature"] = torch.zeros_like(parameter)
        state["step"] += 1
        first, second = group["betas"]
        count = int(state["step"])
        diagonal = self.curvatures.get(parameter, torch.zeros_like(parameter)).abs()
        if diagonal.dim() == 4:
            diagonal = diagonal.mean(dim=(2, 3), keepdim=True).expand_as(parameter)
        state["mean"].lerp_(parameter.grad, 1 - first)
        state["curvature"].mul_(second).addcmul_(diagonal, diagonal, value=1 - second)
        root = (state["curvature"] / (1 - second**count)).sqrt().pow(group["power"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.addcdiv_(state["mean"], root.add_(group["eps"]), value=-group["lr"] / (1 - first**count))


def signs(seed: int, number: int, like: Tensor) -> Tensor:
    """Return -1 and 1 by chance in the shape of *like*, a function of *seed* and the parameter's *number*."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "signs", number))
    drawn = torch.randint(0, 2, like.shape, generator=generator, dtype=torch.int8)
    return drawn.to(like.device, like.dtype).mul_(2).sub_(1)


def add(sum_so_far: Tensor | None, tensor: Tensor) -> Tensor:
    """Return the sum, where there may be none so far."""
    return tensor.clone() if sum_so_far is None else sum_so_far.add_(tensor)


Betas = tuple[FractionBelowOne, FractionBelowOne]
Parameters = Iterable[Tensor] | Iterable[dict[str, Any]]  # or groups of them with values of their own


class Sgd(StrictModel):
    """Stochastic gradient descent; its decay is part of the gradient."""

    kind: Literal["sgd"] = "sgd"
    lr: Positive
    momentum: FractionBelowOne = 0.9
    nesterov: bool = False
    weight_decay: NonNegative = 0.0
    clip_norm: NonNegative = 0.0

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


class AdamW(StrictModel):
    """Adam with decoupled decay. Source: Loshchilov and Hutter (ICLR 2019)."""

    kind: Literal["adamw"]
    lr: Positive
    betas: Betas = (0.9, 0.999)
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.01
    clip_norm: NonNegative = 0.0

    def make(self, parameters: Parameters) -> torch.optim.Optimizer:
        """Return the optimizer of *parameters*."""
        return torch.optim.AdamW(
            parameters, lr=self.lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay
        )


class RAdam(StrictModel):
    """Adam with its variance rectified, and decoupled decay. Source: Liu et al. (ICLR 2020)."""

    kind: Literal["radam"]
    lr: Positive
    betas: Betas = (0.9, 0.999)
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.0
    clip_norm: NonNegative = 0.0

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


class RMSProp(StrictModel):
    """RMSProp with momentum, as EfficientNet learns. Its decay is part of the gradient."""

    kind: Literal["rmsprop"]
    lr: Positive
    alpha: FractionBelowOne = 0.9
    momentum: FractionBelowOne = 0.9
    eps: Positive = 1e-3
    weight_decay: NonNegative = 0.0
    clip_norm: NonNegative = 0.0

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


class AdaHessianChoice(StrictModel):
    """AdaHessian: two more derivatives a step, in float32 or bfloat16 and without a compiler."""

    kind: Literal["adahessian"]
    lr: Positive
    betas: Betas = (0.9, 0.999)
    eps: Positive = 1e-4
    weight_decay: NonNegative = 0.0
    power: Annotated[float, pydantic.Field(gt=0, le=1)] = 1.0
    clip_norm: NonNegative = 0.0

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
