"""Which runtime serves a bundle on this machine: one line for each.

`auto` takes the first that was set up here, and only that one: where the GPU was meant and does not work, the
server says so and ends, instead of answering from the CPU without a word.
"""

from collections.abc import Callable
from dataclasses import dataclass

from sopdeploy.bundle.folder import Bundle
from sopdeploy.errors import RuntimeUnavailableError
from sopdeploy_service.runtime.base import Runtime
from sopdeploy_service.runtime.onnxruntime import (
    CPU,
    CUDA,
    CUDA_OPTIONS,
    TENSORRT,
    OnnxRuntime,
    has_cuda,
    provider_options,
)
from sopdeploy_service.runtime.tensorrt import TensorRTRuntime, is_set_up
from sopdeploy_service.settings import Settings


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """A runtime: how it is opened, and whether somebody set it up on this machine."""

    open: Callable[[Bundle, Settings], Runtime]
    set_up: Callable[[Bundle, Settings], bool]


RUNTIMES = {
    "tensorrt": Choice(open=TensorRTRuntime, set_up=is_set_up),
    "onnxruntime-cuda": Choice(
        open=lambda bundle, settings: OnnxRuntime(
            bundle, threads=settings.threads, provider=CUDA, options=CUDA_OPTIONS
        ),
        set_up=lambda _bundle, _settings: has_cuda(),
    ),
    "onnxruntime-tensorrt": Choice(
        open=lambda bundle, settings: OnnxRuntime(
            bundle,
            threads=settings.threads,
            provider=TENSORRT,
            options=provider_options(bundle, settings),
        ),
        set_up=lambda _bundle, _settings: (
            False
        ),  # it builds for minutes at the first start: only if asked for
    ),
    "onnxruntime-cpu": Choice(
        open=lambda bundle, settings: OnnxRuntime(bundle, threads=settings.threads, provider=CPU),
        set_up=lambda _bundle, _settings: True,
    ),
}


def choose(bundle: Bundle, settings: Settings) -> Runtime:
    """Return the runtime that *settings* name, or for `auto` the first that was set up here.

    Raises `RuntimeUnavailableError` where it cannot run *bundle*.
    """
    if settings.runtime != "auto":
        return RUNTIMES[settings.runtime].open(bundle, settings)
    name = next(name for name, choice in RUNTIMES.items() if choice.set_up(bundle, settings))
    try:
        return RUNTIMES[name].open(bundle, settings)
    except RuntimeUnavailableError as problem:
        if name == "onnxruntime-cpu":
            raise
        raise RuntimeUnavailableError(
            f"{name} is set up here and does not work: {problem} (SOPDEPLOY_RUNTIME=onnxruntime-cpu "
            "would answer from the CPU)"
        ) from problem
