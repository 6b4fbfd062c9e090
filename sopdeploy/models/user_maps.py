"""Feature maps in a network of the user: where they are, their channels, and what runs after them."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sopdeploy.errors import ConfigError, first_line
from sopdeploy.models.base import is_in


@contextmanager
def hooked(network: nn.Module, hooks: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Add forward hooks to modules of *network*, by name, and remove them afterwards."""
    handles = [network.get_submodule(name).register_forward_hook(hook) for name, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def run_tapped(
    network: nn.Module, run: Callable[[Tensor], Any], images: Tensor, taps: Collection[str]
) -> tuple[Any, dict[str, Any]]:
    """Return `run(images)` and the outputs of the modules *taps* of *network*, in order of computation."""
    outputs: dict[str, Any] = {}

    def store(tap: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
        outputs[tap] = output

    with hooked(network, {tap: partial(store, tap) for tap in taps}):
        return run(images), outputs


def find_taps(network: nn.Module, taps: Sequence[str], image_size: int) -> tuple[dict[str, int], int]:
    """Run *network* on one black image to find the channels at *taps* and the number of classes.

    The taps are returned in the order of computation. Train and eval modes are restored afterwards. Raises
    `ConfigError` as `dsop` does.
    """
    names = dict(network.named_modules())
    parts = ", ".join(name for name, _ in network.named_children())
    for tap in taps:
        if tap not in names:
            raise ConfigError(f"taps: the network has no module {tap!r}; it has {parts}")
    with evaluated(network, image_size) as images:
        logits, outputs = run_tapped(network, network, images, taps)
    for tap in taps:
        shape = _shape(outputs.get(tap))
        if len(shape) != 4 or shape[2] != shape[3]:
            raise ConfigError(
                f"taps: {tap} gives {shape or 'no tensor'}, not a feature map (batch, channels, side, side)"
                "; choose another module"
            )
    if len(_shape(logits)) != 2:
        raise ConfigError(f"taps: the network returns {_shape(logits)} for one image, not (1, classes)")
    return {tap: outputs[tap].shape[1] for tap in outputs}, logits.shape[1]


def _shape(output: Any) -> tuple[int, ...]:
    return tuple(output.shape) if isinstance(output, Tensor) else ()


@contextmanager
def evaluated(network: nn.Module, image_size: int) -> Iterator[Tensor]:
    """Put *network* into eval mode and yield one black image (1, 3, side, side) on its device.

    Train and eval modes are restored afterwards. Raises `ConfigError` if the network cannot run.
    """
    modes = {part: part.training for part in network.modules()}
    device = next((parameter.device for parameter in network.parameters()), None)
    network.eval()
    try:
        with torch.no_grad():
            yield torch.zeros(1, 3, image_size, image_size, device=device)
    except Exception as error:  # the user's code
        raise ConfigError(
            f"taps: the network fails for an image of 3 x {image_size} x {image_size} "
            f"({first_line(error)}); give the image_size that it accepts"
        ) from error
    finally:
        for part, mode in modes.items():
            part.training = mode


def last_map(network: nn.Module, image_size: int) -> str:
    """Find the module of *network* that computes the last feature map (1, C, side, side), side > 1.

    Of modules that return the same tensor, it is the outermost one. Raises `ConfigError` if there is none, or
    if tokens (1, N, C) follow: the map may then be the weights of an attention.
    """
    names = [name for name, _ in network.named_modules() if name]
    with evaluated(network, image_size) as images:
        _, outputs = run_tapped(network, network, images, names)
    for name, output in reversed(outputs.items()):
        shape = _shape(output)
        if len(shape) == 4 and shape[2] == shape[3] > 1:
            return name
        if len(shape) == 3:
            break
    raise ConfigError(
        "taps: the network does not end in a feature map; name modules that return one, or, for a head, set "
        "head.kind=gap"
    )


def remove_after(network: nn.Module, tap: str, image_size: int) -> None:
    """Replace modules with parameters that run only after the module *tap* by the identity.

    Raises `ConfigError` if the network cannot run without them.
    """
    started: list[str] = []  # names of modules in the order in which they start, and "" where *tap* ends
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: started.append(name))
        for name, module in network.named_modules()
        if name
    ]
    try:
        with evaluated(network, image_size) as images, hooked(network, {tap: lambda *_: started.append("")}):
            network(images)
    finally:
        for handle in handles:
            handle.remove()
    end = started.index("")
    before, after = set(started[:end]), dict.fromkeys(started[end + 1 :])
    removed = [
        name for name in after if name not in before and list(network.get_submodule(name).parameters())
    ]
    for name in removed:
        parent = name.rpartition(".")[0]
        if not is_in(parent, *removed):
            network.set_submodule(name, nn.Identity())
    with evaluated(network, image_size) as images:
        network(images)
