"""Access to the `tensorrt` module in versions 10.13 to 11."""

import functools
from collections import deque
from typing import Any, ClassVar, Literal

from sopdeploy.environment import import_optional
from sopdeploy.errors import RuntimeUnavailableError

OLDEST = (10, 13)
Version = tuple[int, int]  # major, minor


def import_tensorrt() -> Any:
    """Import tensorrt; raise `RuntimeUnavailableError` if it is missing or too old."""
    trt = import_optional("tensorrt", "TensorRT", "sopdeploy[tensorrt]", RuntimeUnavailableError)
    if parse_version(trt.__version__) < OLDEST:
        raise RuntimeUnavailableError(f"TensorRT {trt.__version__} is too old; install 10.13 or later")
    return trt


def parse_version(text: str) -> Version:
    """Parse `10.16.1.11` as (10, 16)."""
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


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
