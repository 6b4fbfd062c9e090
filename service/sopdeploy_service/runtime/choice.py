"""Which kind of runtime the settings choose; this imports neither NumPy nor a runtime by itself."""

from typing import TYPE_CHECKING, Any

from sopdeploy.base.plugins import RUNTIMES
from sopdeploy_service.settings import Settings

if TYPE_CHECKING:
    from sopdeploy_service.runtime.base import OwnRuntime


def may_use_gpu(settings: Settings) -> bool:
    """Tell whether the runtime of *settings* uses a GPU, or may use one that is set up."""
    needed = settings.runtime_needs_gpu()
    own: dict[str, type[OwnRuntime]] = RUNTIMES.own()

    return (
        any(one.needs_gpu and one.is_set_up() for one in own.values())
        if needed is None
        else needed
    )


def cpu_runtime() -> str:
    """Return the runtime that `auto` chooses on machines without a GPU."""
    own: dict[str, Any] = RUNTIMES.own()
    return next(name for name, runtime in own.items() if not runtime.needs_gpu)
