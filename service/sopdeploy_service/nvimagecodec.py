"""JPEGs decoded on the GPU by NVIDIA's nvImageCodec, an extra. The only module that imports it.

Pillow has read the header before, so every limit has held and every odd file is refused. Pillow also takes
over whatever is not a plain 8-bit JPEG or fails here; its error is the one that the client gets. nvJPEG does
not round as libjpeg does, so `fast_decode` measures what that changes before a server answers.
"""

from functools import cache
from threading import local
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sopdeploy.errors import RuntimeUnavailableError
from sopdeploy.extras import imported
from sopdeploy.preprocess import Preprocess

PLAIN = {"RGB", "L"}
GPU_BACKENDS = ("HW_GPU_ONLY", "GPU_ONLY", "HYBRID_CPU_GPU")  # never the CPU alone, silently
OPTIONS = ":fancy_upsampling=1"  # colour between its samples as libjpeg makes it


class NvImageCodec:
    """A way to the pixels of a picture; each thread that decodes has its own decoder.

    *device* is CUDA's number or a constant of the library, *backends* are names of its kinds of decoders.
    Raises `RuntimeUnavailableError` where the library is not installed or does not work on that device.
    """

    def __init__(self, library: Any, device: int, backends: tuple[str, ...]) -> None:
        self._library, self._device = library, device
        self._backends = [library.Backend(getattr(library, name)) for name in backends]
        self._wanted = library.DecodeParams(
            color_spec=library.ColorSpec.SRGB, apply_exif_orientation=False, allow_any_depth=False
        )
        self._threads = local()
        self._decoder()

    def __call__(self, picture: Image.Image, body: bytes, preprocess: Preprocess) -> Image.Image:  # noqa: ARG002
        """Return *picture*, whose file is *body*, with its pixels."""
        pixels = self._pixels(body) if picture.format == "JPEG" and picture.mode in PLAIN else None
        if pixels is None or pixels.shape != (picture.height, picture.width, 3):
            picture.load()
            return picture
        whole = Image.fromarray(pixels)
        whole.info = picture.info  # with the EXIF orientation, which preprocessing obeys
        return whole

    def _pixels(self, body: bytes) -> NDArray[np.uint8] | None:
        decoded = self._decoder().decode(body, params=self._wanted)
        return None if decoded is None else np.asarray(decoded.cpu())

    def _decoder(self) -> Any:
        if not hasattr(self._threads, "decoder"):
            try:
                self._threads.decoder = self._library.Decoder(
                    device_id=self._device, max_num_cpu_threads=1, backends=self._backends, options=OPTIONS
                )
            except RuntimeError as problem:
                raise RuntimeUnavailableError(
                    "decode=nvimagecodec finds no GPU that decodes here "
                    f"({' '.join(str(problem).split())}); serve with decode=exact"
                ) from problem
        return self._threads.decoder


@cache
def on_this_gpu() -> NvImageCodec:
    """Return the way that decodes on this process's first GPU, made once."""
    library = import_library()
    return NvImageCodec(library, library.NVIMGCODEC_DEVICE_CURRENT, GPU_BACKENDS)


def import_library() -> Any:
    """Return the library, or raise `RuntimeUnavailableError` saying how to get it."""
    source, needed_by = "sopdeploy[nvimagecodec]", "decode=nvimagecodec"
    return imported("nvidia.nvimgcodec", "nvImageCodec", source, RuntimeUnavailableError, needed_by)
