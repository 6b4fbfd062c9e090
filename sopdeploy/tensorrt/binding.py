"""Access to the `tensorrt` module."""

import functools
from collections import deque
from typing import Any, ClassVar, Literal

from sopdeploy.environment import import_optional
from sopdeploy.errors import RuntimeUnavailableError

OLDEST = 11  # major version; earlier ones parse, type and build graphs otherwise


def import_tensorrt() -> Any:
    """Import tensorrt; raise `RuntimeUnavailableError` if it is missing or too old."""
    trt = import_optional("tensorrt", "TensorRT", "sopdeploy[tensorrt]", RuntimeUnavailableError)
    if int(trt.__version__.split(".")[0]) < OLDEST:
        raise RuntimeUnavailableError(f"TensorRT {trt.__version__} is too old; install {OLDEST} or later")
    return trt


def make_logger(trt: Any) -> Any:
    """Return the logger of this process, with empty `errors`; it collects TensorRT's errors there.

    TensorRT registers the logger of the first builder or runtime and ignores others while that one exists.
    """
    logger = _process_logger(trt)
    logger.errors.clear()
    return logger


@functools.cache
def _process_logger(trt: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc, name-defined, unused-ignore]
        """Collects the last error messages of this module *trt*."""

        errors: ClassVar[deque[str]] = deque(maxlen=20)

        def log(self, severity: Any, message: str) -> None:
            """Store *message* if it is an error."""
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.errors.append(message.strip())

    return Logger()


def last_error(logger: Any) -> str:
    """Return the last TensorRT error of *logger* on one line."""
    return " ".join(logger.errors[-1].split()) if logger.errors else "TensorRT gave no reason"


def create(trt: Any, kind: Literal["Builder", "Runtime"], logger: Any) -> Any:
    """Create a TensorRT builder or runtime.

    Raises `RuntimeUnavailableError` with TensorRT's message if there is no GPU or the driver is unsuitable;
    TensorRT itself raises `TypeError`.
    """
    try:
        return getattr(trt, kind)(logger)
    except TypeError as error:
        raise RuntimeUnavailableError(
            f"TensorRT {trt.__version__} cannot start here: {last_error(logger)}; "
            "`sopdeploy env` shows the driver and the GPU"
        ) from error


def deserialize(trt: Any, plan: bytes, logger: Any) -> tuple[Any, Any]:
    """Deserialize *plan*; return the TensorRT runtime and the engine. The runtime must outlive the engine.

    The caller must have verified *plan*. Host code in plans stays disabled.
    """
    runtime = create(trt, "Runtime", logger)
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise RuntimeUnavailableError(
            f"TensorRT {trt.__version__} cannot load the plan: {last_error(logger)}; "
            "build it again with `sopdeploy engine`"
        )
    return runtime, engine
