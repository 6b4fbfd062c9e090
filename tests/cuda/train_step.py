"""Training steps of networks on a GPU in torch's fake tensors: shapes, types and devices, no numbers.

python -m tests.cuda.train_step NAME..., of `tests.sweep.smallest`, with `device.c` preloaded.
Prints name, precision and the devices of loss and gradients as JSON, a line for each step.
"""

import json
import sys
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from sopdeploy.models.base import Classifier
from sopdeploy.training.loop.losses import training_loss
from tests.sweep.smallest import ALL
from tests.sweep.steps import TRAINED_ON, Small

GPU = torch.device("cuda:0")


def fake(mode: FakeTensorMode, value: Tensor) -> FakeTensor:
    """Return a fake tensor on the GPU for *value*, which is on the device `meta`."""
    return FakeTensor(mode, value.detach(), GPU)


def on_gpu(mode: FakeTensorMode, network: Classifier) -> Classifier:
    """Replace the tensors of *network*; `Module.to` would allocate memory of the GPU."""
    for module in network.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                module._parameters[name] = nn.Parameter(
                    fake(mode, weight), weight.requires_grad
                )
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fake(mode, buffer)
    return network


# Some versions of torch allocate memory of the GPU before its first fake tensor.
@patch.object(fake_tensor, "init_gpu_context", lambda _device: None, create=True)
def devices_of_a_step(small: Small, precision: str) -> list[str]:
    """Return the devices of the loss and of all gradients."""
    mode = FakeTensorMode()
    with torch.device("meta"):
        images = fake(mode, torch.empty(TRAINED_ON, 3, small.side, small.side))
        labels = fake(mode, torch.empty(TRAINED_ON, dtype=torch.long))
        network = on_gpu(mode, small.build().train())
    with mode, patch.object(torch, "tensor", copied_tensor):
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
            loss = training_loss(network(images), labels, network.loss_weights()).total
        torch.autograd.backward(loss)
    gradients = [weight.grad for weight in network.parameters()]
    return sorted({str(value.device) for value in (loss, *gradients) if value is not None})


def every_row(weights: Tensor) -> Tensor:
    """Replace `nonzero`: how many images a component gets depends on the gate, here it gets all."""
    return torch.arange(len(weights), device=weights.device)[:, None]


def copied_tensor(data: object, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Replace `torch.tensor`, which would copy to the GPU although tensors are fake."""
    return _tensor(data, dtype=dtype).to(device)


_tensor = torch.tensor


def main(names: list[str]) -> None:
    torch.autograd.set_multithreading_enabled(False)  # the threads of a device initialize it
    torch.cuda.is_bf16_supported = lambda *_, **__: True
    torch.cuda._lazy_init = lambda: None
    Tensor.nonzero = every_row  # type: ignore[assignment, method-assign]
    for small in ALL:
        for precision in ("fp32", "bf16") if small.name in names else ():
            sys.stdout.write(
                json.dumps([small.name, precision, devices_of_a_step(small, precision)]) + "\n"
            )


main(sys.argv[1:])
