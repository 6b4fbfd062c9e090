"""AdaHessian: Adam with the diagonal of the Hessian in place of the squared gradient.

Paper: Yao et al., "ADAHESSIAN: An Adaptive Second Order Optimizer for Machine Learning" (AAAI 2021).
Letters: g gradient, H Hessian, z a vector of -1 and 1. Hutchinson's estimate of the diagonal is z * (H z)
(Eq. 8); that of a convolution is averaged over its kernel (Eq. 10). The numbers of z are drawn anew in each
step from a seed that the caller gives, so that a resumed run draws the same.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sopdeploy.seeds import seed_of


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
    generator = torch.Generator().manual_seed(seed_of(seed, "signs", number))
    drawn = torch.randint(0, 2, like.shape, generator=generator, dtype=torch.int8)
    return drawn.to(like.device, like.dtype).mul_(2).sub_(1)


def add(sum_so_far: Tensor | None, tensor: Tensor) -> Tensor:
    """Return the sum, where there may be none so far."""
    return tensor.clone() if sum_so_far is None else sum_so_far.add_(tensor)
