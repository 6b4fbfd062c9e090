"""Create the optimizer that a recipe selects: one of torch, timm or a plug-in."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sopdeploy.base.environment import import_optional
from sopdeploy.errors import MissingPackageError
from sopdeploy.training.settings.loop import (
    OptimizerSettings,
    RAdam,
    RegisteredOptimizer,
    RMSProp,
)

Parameters = Iterable[Tensor] | Iterable[dict[str, Any]]  # parameters or parameter groups
AddOverProcesses = Callable[[list[Tensor | None], list[Tensor]], list[Tensor | None]]


class CurvatureOptimizer(Optimizer, ABC):
    """An optimizer that differentiates the loss of a step itself, more than once.

    A step calls `backward`, `all_reduce` and `step`, in this order.
    """

    @abstractmethod
    def backward(self, loss: Tensor, seed: int) -> None:
        """Set `grad` of the parameters by *loss*, a scalar; random numbers depend on *seed* alone."""

    @abstractmethod
    def all_reduce(self, add: AddOverProcesses) -> None:
        """Replace what `backward` found by its sums over processes; *add* is `sum_by_parameter`."""


def create_optimizer(config: OptimizerSettings, parameters: Parameters) -> Optimizer:
    """Create the optimizer of *config* for *parameters* or their groups.

    `foreach` updates all parameters in a few calls. The results are bitwise equal to a loop over
    the parameters, except for RAdam, which keeps torch's default.
    """
    if isinstance(config, RegisteredOptimizer):
        registered: Optimizer = config.create(parameters)
        return registered

    options: dict[str, Any] = config.model_dump(exclude={"kind", "clip_norm", "tensorflow"})
    if isinstance(config, RAdam):
        return torch.optim.RAdam(parameters, decoupled_weight_decay=True, **options)

    optimizers: Any = {
        "sgd": torch.optim.SGD,
        "adamw": torch.optim.AdamW,
        "rmsprop": torch.optim.RMSprop,
    }
    chosen = optimizers[config.kind]

    if isinstance(config, RMSProp) and config.tensorflow:
        timm_optim = import_optional("timm.optim", "timm", ".[train]", MissingPackageError)
        chosen = timm_optim.RMSpropTF

    created: Optimizer = chosen(parameters, foreach=True, **options)
    return created
