"""Which runtime serves a bundle on this machine: one line for each, the first that works."""

from collections.abc import Callable

from sopdeploy.bundle import Bundle
from sopdeploy.errors import RuntimeUnavailableError
from sopdeploy_service.runtime.base import Runtime
from sopdeploy_service.runtime.with_onnxruntime import OnnxRuntime
from sopdeploy_service.settings import Settings

RUNTIMES: tuple[Callable[[Bundle, Settings], Runtime], ...] = (
    lambda bundle, settings: OnnxRuntime(bundle, threads=settings.threads),
)


def choose(bundle: Bundle, settings: Settings) -> Runtime:
    """Return the first runtime that can run *bundle* here.

    Raises `RuntimeUnavailableError` with the reason of each where none can.
    """
    reasons = []
    for build in RUNTIMES:
        try:
            return build(bundle, settings)
        except RuntimeUnavailableError as problem:
            reasons.append(str(problem))
    raise RuntimeUnavailableError("; ".join(reasons))
