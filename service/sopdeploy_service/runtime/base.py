"""The interface of a runtime, which runs batches of images, and its errors."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar, Protocol, TypeAlias, get_args, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from sopdeploy.base.plugins import RUNTIMES
from sopdeploy.bundle.folder import Bundle
from sopdeploy.bundle.manifest import Precision
from sopdeploy.errors import ConfigError, RuntimeUnavailableError, SopdeployError
from sopdeploy_service.settings import Settings


def padded_sizes(largest: int) -> tuple[int, ...]:
    """List the batch sizes 1, 2, 4 and so on below *largest*, and *largest*."""
    num_powers = (largest - 1).bit_length()  # of the powers of two below *largest*
    return (*(1 << power for power in range(num_powers)), largest)


class OutOfMemoryError(Exception):
    """The device has no memory for a batch of this size now; a smaller one may fit."""


class DeviceLostError(Exception):
    """The device cannot run anything more in this process."""


class Runtime(Protocol):
    """One loaded network on one device; called by one thread at a time."""

    name: str  # with its version
    device: str  # `cpu`, `cuda:0`
    largest_batch: int

    def run(self, images: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
        """Run *images* (n, H, W, 3) uint8; return every output (n, ...) float32 by name.

        The outputs must not share memory with *images*, which the next batch overwrites. Raises
        `DeviceLostError` if no other batch can run. After any other exception, the caller runs
        each half of the batch, down to single images; if all fail, it runs a blank one to see
        whether the device is lost.
        """
        ...

    def close(self) -> None:
        """Release the memory of the network; no batch may be in flight. Later calls do nothing."""
        ...


# Opens a runtime for a bundle; raises `RuntimeUnavailableError` if it cannot run here. The
# graph is `bundle.onnx`, a file in memory for `open` and `os.fspath`, and `bundle.weights` are its
# weights if they are in a file of their own; the folder of the bundle may have changed meanwhile.
# A class may state `needs_gpu`, as `OwnRuntime` does.
OpenRuntime: TypeAlias = Callable[[Bundle, Settings], Runtime]


class OwnRuntime(Runtime, Protocol):
    """A runtime of this project, with what is known before it is opened."""

    setting: ClassVar[str]  # its value of the setting `runtime`
    title: ClassVar[str]  # its name for users
    extra: ClassVar[str]  # installs it
    needs_gpu: ClassVar[bool]

    def __init__(self, bundle: Bundle, settings: Settings) -> None:
        """Load *bundle*; raises `RuntimeUnavailableError`."""

    @staticmethod
    def is_set_up() -> bool:
        """Tell whether its libraries are installed."""
        ...

    @staticmethod
    def precisions() -> set[str]:
        """Return the precisions of graphs that it computes exactly on this machine."""
        return set(get_args(Precision))

    @classmethod
    def reason_for_auto(cls, bundle: Bundle, settings: Settings) -> str | None:
        """Return why `auto` chooses it for *bundle*, or None.

        Raises `RuntimeUnavailableError` if it is set up and cannot compute *bundle*: `auto`
        then fails.
        """


def register_runtime(name: str, open_runtime: OpenRuntime) -> None:
    """Let the setting `runtime` select *open_runtime* by *name*.

    Args:
        name: The name. A runtime of this project with this name comes first.
        open_runtime: Called with a bundle and the settings of the server; returns a `Runtime`, or raises
            `RuntimeUnavailableError` if it cannot run here.

    Raises:
        ConfigError: *open_runtime* cannot be called, *name* is invalid, or another module has registered it.

    Examples:
        >>> from sopdeploy_service.runtime.onnxruntime import OnnxRuntime
        >>> sopdeploy.register_runtime("mine", OnnxRuntime)
        >>> bundle = "bundles/photos-3f6c01d2a4b7"
        >>> [prediction] = sopdeploy.predict(bundle, "photo.jpg", runtime="mine")
        >>> prediction.error is None
        True
    """
    if not callable(open_runtime):
        raise ConfigError(
            f"register_runtime: {open_runtime!r} cannot be called with a bundle and settings"
        )
    RUNTIMES.register(name, open_runtime, open_runtime.__module__)


@runtime_checkable
class InexactRuntime(Runtime, Protocol):
    """A runtime whose numerical error, by output, may exceed the tolerance of the bundle; the user allowed it."""

    accepted_errors: dict[str, float]


@runtime_checkable
class OverlappingRuntime(Runtime, Protocol):
    """A runtime that accepts a batch while another one runs."""

    def begin(
        self, images: Sequence[NDArray[np.uint8]], names: Sequence[str] | None = None
    ) -> Callable[[], dict[str, NDArray[np.float32]]]:
        """Begin a batch of *images* (H, W, 3); return a function that waits for its outputs *names*, or all.

        At most two batches are in flight. Their functions may be called in either order.
        *images* may be overwritten after this returns. Raises as `run` does, or the returned
        function does.
        """
        ...


# What matters in messages that contain several lines of C++ signatures.
REASON = re.compile(
    r"(CUDA|CUDNN|CUDNN_FE|CUBLAS|CUBLASLT) failure \d+: [^;]+|Failed to allocate memory .*"
)
OTHER_GPU = "ONNX Runtime has kernels for compute capability 7.5, 8.x, 9.0 and 12.x; build an engine for other GPUs"
MEMORY_TEXTS = (
    "cudaerrormemoryallocation",
    "cuda_error_out_of_memory",
    "out of memory",
    "outofmemory",  # TensorRT's own code
    "failed to allocate memory",  # onnxruntime's arena
    "smaller than requested bytes",
    "_alloc_failed",  # CUBLAS_STATUS_, CUDNN_STATUS_
    "bad_alloc",
)


@contextmanager
def translating_errors(runtime: Runtime) -> Iterator[None]:
    """Translate errors of *runtime*, but not ours, to `RuntimeUnavailableError`: it must run this here."""
    try:
        yield
    except SopdeployError:
        raise
    except Exception as error:  # the libraries' errors share no base class
        reason = f"{type(error).__name__}: {readable_reason(error)}"
        raise RuntimeUnavailableError(
            f"{runtime.name} cannot run a batch on {runtime.device}: {reason}"
        ) from error


def readable_reason(error: Exception) -> str:
    """Return the part of a library's *error* that a user understands, in one line."""
    match = REASON.search(str(error))
    reason = " ".join((match[0] if match else str(error)).split())
    return f"{reason}; {OTHER_GPU}" if "no kernel image" in reason else reason


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether *error*, of any library, says that the device or process has no memory for the batch."""
    text = str(error).lower()
    return isinstance(error, OutOfMemoryError | MemoryError) or any(
        words in text for words in MEMORY_TEXTS
    )
