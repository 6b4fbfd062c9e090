"""The ways to the pixels of a picture whose header was read; which of them a server takes."""

from functools import cache
from threading import local
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sopdeploy.environment import import_optional
from sopdeploy.errors import RuntimeUnavailableError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy_service.images.decode import Load, exactly
from sopdeploy_service.settings import Settings

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
    return import_optional("nvidia.nvimgcodec", "nvImageCodec", source, RuntimeUnavailableError, needed_by)


SMALLEST_FRACTION = 4  # of a side; 1/8 would need a check on pictures of 16 times the network's input


def loader(settings: Settings) -> Load:
    """Return the way that *settings* name.

    Raises `RuntimeUnavailableError` where nvImageCodec or its GPU is not there.
    """
    if settings.decode == "nvimagecodec":
        return on_this_gpu()
    return {"exact": exactly, "fast": at_a_fraction}[settings.decode]


def at_a_fraction(picture: Image.Image, body: bytes, preprocess: Preprocess) -> Image.Image:  # noqa: ARG001
    """Return a JPEG *picture* decoded at 1/2 or 1/4 of its size, other formats whole.

    At least twice the pixels that resizing needs are left along each side, for its filter to work on. Without
    the frequencies above, the result is close to the exact one, not equal: `fast_decode` measures how close.
    """
    side = max(2 * preprocess.resize, -(-min(picture.size) // SMALLEST_FRACTION))
    picture.draft(picture.mode, (side, side))
    picture.load()
    return picture
