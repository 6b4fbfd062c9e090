"""The `tensorrt` module of 8.6, 10 and 11 behind one door: everything here exists in all of them.

What differs between the releases stands in this file and in the builder's, each behind a question to the
module itself (`hasattr`) where there is one, behind the major version where there is none.
"""

from typing import Any

from sopdeploy.environment import import_optional
from sopdeploy.errors import EngineError, RuntimeUnavailableError

OLDEST = (8, 6)
Version = tuple[int, int]  # major, minor


def import_tensorrt() -> Any:
    """Return the tensorrt module, or raise `RuntimeUnavailableError` saying how to get it."""
    trt = import_optional("tensorrt", "TensorRT", "sopdeploy[tensorrt]", RuntimeUnavailableError)
    if version_of(trt) < OLDEST:
        raise RuntimeUnavailableError(f"TensorRT {trt.__version__} is too old; 8.6, 10 and 11 can be used")
    return trt


def version_of(trt: Any) -> Version:
    """Return (major, minor) of the module *trt*."""
    return parse_version(str(trt.__version__))


def parse_version(text: str) -> Version:
    """Return (10, 16) of `10.16.1.11`; raises `EngineError` where *text* is no version."""
    parts = text.split(".")
    try:
        return int(parts[0]), int(parts[1])
    except (ValueError, IndexError) as problem:
        raise EngineError(f"{text}: not a version of TensorRT, such as 10.16") from problem


def make_logger(trt: Any) -> Any:
    """Return a logger that keeps TensorRT's errors in `errors` and prints nothing."""

    class Logger(trt.ILogger):  # type: ignore[misc, name-defined, unused-ignore]
        """Errors, for the one line that the user sees."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            """Keep *message* where it is an error."""
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.errors.append(message.strip())

    return Logger()


def last_error(logger: Any) -> str:
    """Return what TensorRT said last, on one line."""
    return " ".join(logger.errors[-1].split()) if logger.errors else "TensorRT gave no reason"


def deserialize(trt: Any, plan: bytes, logger: Any) -> tuple[Any, Any]:
    """Return a TensorRT runtime, which must live as long, and the engine of *plan*.

    The plan must be a checked one; host code in it stays forbidden.
    """
    runtime = trt.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise RuntimeUnavailableError(
            f"TensorRT {trt.__version__} cannot load the plan: {last_error(logger)}; "
            "build it again with `sopdeploy engine`"
        )
    return runtime, engine
