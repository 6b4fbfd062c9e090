"""AdaHessian, an optimizer that estimates the diagonal of the Hessian.

DSoP's Table IX compares optimizers. Source: Yao et al., "AdaHessian: An Adaptive Second Order
Optimizer for Machine Learning" (AAAI 2021).
"""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import pydantic
import torch
from torch import Tensor

from sopdeploy.base.config import Positive
from sopdeploy.base.seeds import derive_seed
from sopdeploy.training.loop.optimizer import AddOverProcesses, CurvatureOptimizer, Parameters
from sopdeploy.training.settings.loop import Betas, RegisteredOptimizer


class AdaHessianConfig(RegisteredOptimizer):
    """AdaHessian, with the defaults of its paper."""

    needs_whole_step: ClassVar[bool] = True
    kind: Literal["adahessian"]
    betas: Betas = (0.9, 0.999)
    eps: Positive = 1e-4
    power: Annotated[float, pydantic.Field(gt=0, le=1)] = 1.0

    def create(self, parameters: Parameters) -> "AdaHessian":
        """Create the optimizer for *parameters* or their groups."""
        return AdaHessian(parameters, **self.model_dump(exclude={"kind", "clip_norm"}))


class AdaHessian(CurvatureOptimizer):
    """Adam with the diagonal of the Hessian in its second moment.

    Call this `backward` instead of `loss.backward`, then `step`. *betas* are the decay rates of the
    two running means, *eps* is added to the denominator, *power* is k of Eq. (11). Weight decay
    is decoupled as in AdamW. Source: Yao et al., "AdaHessian: An Adaptive Second Order
    Optimizer for Machine Learning" (AAAI 2021).
    """

    def __init__(
        self,
        params: Parameters,
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-4,
        weight_decay: float = 0.0,
        power: float = 1.0,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "power": power,
        }

        super().__init__(params, defaults)
        self.trainable = [
            p for group in self.param_groups for p in group["params"] if p.requires_grad
        ]
        self.curvatures: dict[Tensor, Tensor] = {}

    def backward(self, loss: Tensor, seed: int) -> None:
        """Set `grad` to the gradient of *loss*, and `curvatures` to the Hessian-vector product H z.

        z is a vector of random signs that depends on *seed*, so |H z| estimates the diagonal of
        H. With the same seed in all processes of a step, the sum of their products is the
        product of the whole batch. The network must be twice differentiable. H z is the gradient of the
        product of the gradient and z.
        """
        gradients: Sequence[Tensor | None] = torch.autograd.grad(
            loss, self.trainable, create_graph=True, allow_unused=True
        )
        # The gradients that depend on parameters; the others are constant, so their curvature
        # is 0.
        curved: dict[Tensor, Tensor] = {}
        for parameter, gradient in zip(self.trainable, gradients, strict=True):
            if gradient is None:  # the loss does not depend on the parameter
                continue
            parameter.grad = gradient.detach().clone()
            if gradient.requires_grad:
                curved[parameter] = gradient

        # Hutchinson's estimator: H z for random signs z, from the gradient of gradients. The signs
        # are those of the place among all parameters: other processes may use more of them.
        signs = [
            random_signs(seed, number, parameter)
            for number, parameter in enumerate(self.trainable)
            if parameter in curved
        ]
        products = torch.autograd.grad(
            list(curved.values()), list(curved), signs, allow_unused=True
        )

        # `step` takes 0 for parameters without a product: no gradient depends on them.
        pairs = zip(curved, products, strict=True)
        self.curvatures = {
            parameter: product for parameter, product in pairs if product is not None
        }

    def all_reduce(self, add: AddOverProcesses) -> None:
        """Replace gradients and curvatures by their sums over processes; *add* is `sum_by_parameter`."""
        parameters = self.trainable
        gradients = add([parameter.grad for parameter in parameters], parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient

        curvatures = add(
            [self.curvatures.get(parameter) for parameter in parameters], parameters
        )
        pairs = zip(parameters, curvatures, strict=True)
        self.curvatures = {
            parameter: curvature for parameter, curvature in pairs if curvature is not None
        }

    @torch.no_grad()
    def step(self, _closure: Any = None, /) -> None:  # type: ignore[override]
        """Update the parameters w that have a gradient, by Eqs. (11) and (12) of AdaHessian's paper.

        With the unbiased means m of the gradients and v of the squared Hessian diagonals, w is
        multiplied by 1 - lr * weight_decay, and lr * m / (v^(k/2) + eps) is subtracted. The
        Hessian diagonal of 4-D weights is averaged over the kernel.
        """
        updates = [
            (p, group)
            for group in self.param_groups
            for p in group["params"]
            if p.grad is not None
        ]

        for parameter, group in updates:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros(())
                state["mean"] = torch.zeros_like(parameter)
                state["curvature"] = torch.zeros_like(parameter)
            state["step"] += 1

            decay, decay_curvature = group["betas"]
            lr = group["lr"]
            count = int(state["step"])
            diagonal = self.curvatures.get(parameter, torch.zeros_like(parameter)).abs()

            # The diagonal is averaged over each kernel, which has noise in single elements.
            if diagonal.dim() == 4:
                diagonal = diagonal.mean(dim=(2, 3), keepdim=True).expand_as(parameter)
            state["mean"].lerp_(parameter.grad, 1 - decay)
            state["curvature"].mul_(decay_curvature)
            state["curvature"].addcmul_(diagonal, diagonal, value=1 - decay_curvature)

            # Divided by 1 - decay^count, the means are unbiased, as in Adam.
            root = (state["curvature"] / (1 - decay_curvature**count)).sqrt()
            denominator = root.pow(group["power"]) + group["eps"]
            parameter.mul_(1 - lr * group["weight_decay"])
            parameter.addcdiv_(state["mean"], denominator, value=-lr / (1 - decay**count))


def random_signs(seed: int, number: int, like: Tensor) -> Tensor:
    """Draw signs with shape, dtype and device of *like*; they depend on *seed*, *number* and its shape."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "signs", number))
    drawn = torch.randint(0, 2, like.shape, generator=generator, dtype=torch.int8)
    return drawn.to(like.device, like.dtype).mul_(2).sub_(1)
