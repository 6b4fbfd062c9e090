"""Resize images on a device with ONNX Runtime: Pillow's filters, at most one gray level off.

`bilinear.onnx` and `bicubic.onnx` beside this file consist of the operator `Resize` with antialiasing, which
computes with the same integers as Pillow. tests/service/images/test_device_resize.py builds them.
"""

import math
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sopdeploy.errors import RuntimeUnavailableError
from sopdeploy_service.runtime.cuda_libraries import ON_DEVICE, device_copy, load_cuda_libraries
from sopdeploy_service.runtime.onnxruntime import (
    CPU,
    CUDA,
    import_onnxruntime,
    pinned_memory,
    session_options,
)

FILTERS = ("bilinear", "bicubic")
# CUDA's legacy default stream, by its number in the CUDA array interface. nvImageCodec makes it wait for its
# images, so an image that is copied or resized on it is decoded already.
STREAM = 1
_OPTIONS = {CPU: {}, CUDA: {"user_compute_stream": str(STREAM)}}
INTERFACES = {CPU: ("cpu", "__array_interface__"), CUDA: ("cuda", "__cuda_array_interface__")}


class DeviceResize:
    """Resizes images in the memory of *provider*; one thread at a time.

    Raises `RuntimeUnavailableError` if onnxruntime does not have *provider* here.
    """

    def __init__(self, provider: str = CUDA) -> None:
        onnxruntime = import_onnxruntime()
        if provider not in onnxruntime.get_available_providers():
            raise RuntimeUnavailableError(
                f"decode=nvimagecodec: onnxruntime {onnxruntime.__version__} has no {provider} here; "
                'run: pip install "sopdeploy[gpu]" without [cpu], or serve with decode=exact'
            )
        if provider == CUDA:
            load_cuda_libraries(onnxruntime)
        self._kind, self._interface = INTERFACES[provider]
        self._allocate = onnxruntime.OrtValue.ortvalue_from_shape_and_type
        self._memory = pinned_memory(onnxruntime) if provider == CUDA else None
        self._blocks: list[NDArray[np.uint8]] = []
        self._copy = device_copy(onnxruntime, self._kind)
        options = session_options(onnxruntime, 1, provider)
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        self._sessions = {
            name: onnxruntime.InferenceSession(
                Path(__file__).with_name(f"{name}.onnx").read_bytes(),
                options,
                providers=[(provider, _OPTIONS[provider])],
                enable_fallback=0,
            )
            for name in FILTERS
        }

    def __call__(self, images: Sequence[Any], size: tuple[int, int], interpolation: str) -> NDArray[np.uint8]:
        """Resize *images* (H, W, 3) uint8 of one shape to *size* (width, height), in one run.

        Returns their pixels (n, h, w, 3) on the host. The images have NumPy's array interface or, on a GPU,
        that of CUDA. Raises `ValueError` if rows are not contiguous or pixels are complete on another stream
        than `STREAM`.
        """
        sources = [getattr(image, self._interface) for image in images]
        for source in sources:
            if source["strides"] is not None:
                raise ValueError("the rows of a decoded image are not contiguous")
            if source.get("stream") not in {None, STREAM}:  # None: complete on every stream
                raise ValueError(f"a decoded image is complete on stream {source['stream']}, not on {STREAM}")
        count, shape, address = len(images), sources[0]["shape"], sources[0]["data"][0]
        if count > 1:
            collected = self._allocate((count, *shape), np.uint8, self._kind, 0)
            address, bytes_of_one = collected.data_ptr(), math.prod(shape)
            for number, source in enumerate(sources):
                self._copy(address + number * bytes_of_one, source["data"][0], bytes_of_one, ON_DEVICE)
        pixels = self._host_array((count, size[1], size[0], 3))
        session = self._sessions[interpolation]
        binding = session.io_binding()
        binding.bind_input("images", self._kind, 0, np.uint8, (count, *shape), address)
        binding.bind_cpu_input("size", np.array([count, 3, size[1], size[0]]))
        binding.bind_output("pixels", "cpu", 0, np.uint8, pixels.shape, pixels.ctypes.data)
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()  # a GPU writes to page-locked memory asynchronously
        return pixels

    def _host_array(self, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        """Return an array in a block of memory that is reused once no view of the array exists any more.

        On a GPU, the block is page-locked. Clearing the pages of new memory takes longer than all the rest.
        """
        size = math.prod(shape)
        block = self._blocks.pop() if self._blocks else None
        if block is None or block.size < size:
            block = self._allocate((size,), np.uint8, memory_info=self._memory).numpy()
        owner = np.frombuffer(block.data, np.uint8, size)  # the base of every view
        weakref.finalize(owner, self._blocks.append, block).atexit = False
        return owner.reshape(shape)
