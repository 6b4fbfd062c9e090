"""Load CUDA and cuDNN for ONNX Runtime, and name the library that is missing.

ONNX Runtime searches NVIDIA's pip packages only beside its own, and its message about a missing
one is long.
"""

import contextlib
import ctypes
import io
import os
import sys
from pathlib import Path
from typing import Any

from sopdeploy.base.environment import install_command
from sopdeploy.errors import RuntimeUnavailableError

DRIVER = "libcuda.so.1"
CUDNN = "libcudnn.so.9"  # opened by the provider at its first convolution
SHARED = "libonnxruntime_providers_shared.so"
CUDA_PROVIDER = "libonnxruntime_providers_cuda.so"
NO_DRIVER = (
    f"no NVIDIA driver is usable here ({DRIVER} cannot be loaded); start a container with `--gpus all`, or "
    "install the driver"
)


def package_folders() -> list[Path]:
    """Return the library folders of NVIDIA's pip packages, in the order of Python's path.

    Several environments on the path can have a folder of one name with different libraries in
    it, such as `cu13`. A folder is left out if earlier ones have all of its libraries.
    """
    folders: list[Path] = []
    earlier_libraries: set[str] = set()

    for packages in sys.path:
        for folder in sorted(Path(packages, "nvidia").glob("*/lib")):
            libraries = {path.name for path in folder.glob("*.so*")}

            if not libraries <= earlier_libraries:
                folders.append(folder)
            earlier_libraries |= libraries
    return folders


def load_cuda_libraries(onnxruntime: Any) -> None:
    """Load what ONNX Runtime's CUDA provider needs; raises `RuntimeUnavailableError` with what is missing."""
    # Load the libraries of pip packages, or those of the system.
    with contextlib.redirect_stdout(io.StringIO()):  # `preload_dlls` prints what it cannot load
        folders = package_folders()
        for folder in folders:
            onnxruntime.preload_dlls(directory=str(folder))

        if not folders:
            onnxruntime.preload_dlls()

    if sys.platform != "linux":
        return

    # Load the driver.
    try:
        ctypes.CDLL(DRIVER)
    except OSError as error:
        raise RuntimeUnavailableError(NO_DRIVER) from error

    # Load the provider itself, which shows what it misses.
    capi = Path(onnxruntime.__file__).parent / "capi"
    try:
        # This library has symbols that the provider needs.
        ctypes.CDLL(str(capi / SHARED), mode=ctypes.RTLD_GLOBAL)
        for library in (str(capi / CUDA_PROVIDER), CUDNN):
            ctypes.CDLL(library, mode=os.RTLD_LAZY)
    except OSError as error:
        # The message of the loader begins with the library
        name, _, reason = str(error).partition(": ")
        raise RuntimeUnavailableError(
            f"onnxruntime {onnxruntime.__version__} needs {Path(name).name} for CUDA ({reason}); "
            f"{install_command('.[gpu]')}"
        ) from error
