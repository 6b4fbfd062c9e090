"""Load the pixels of an image: exactly, at a reduced scale, or on the GPU."""

from collections.abc import Callable
from functools import cache, partial
from threading import local
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sopdeploy.environment import import_optional
from sopdeploy.errors import RuntimeUnavailableError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy_service.images.decode import Decoded, EncodedImage, Load, decode, load_exact
from sopdeploy_service.settings import Settings

GPU_MODES = {"RGB", "L"}
GPU_BACKENDS = ("HW_GPU_ONLY", "GPU_ONLY", "HYBRID_CPU_GPU")  # never fall back to the CPU silently
OPTIONS = ":fancy_upsampling=1"  # chroma interpolation as in libjpeg
MAX_REDUCTION = 4  # per side; 1/8 would need a check on images of 16 times the network's input


def pixel_loader(settings: Settings) -> Load:
    """Return the loader of the setting `decode`.

    Raises `RuntimeUnavailableError` if nvImageCodec or its GPU is missing.
    """
    if settings.decode == "nvimagecodec":
        return _gpu_loader()
    return {"exact": load_exact, "fast": load_reduced}[settings.decode]


def make_decoder(settings: Settings) -> Callable[[EncodedImage, Preprocess], Decoded]:
    """Create the decoder with the limits of *settings*; raises like `pixel_loader`."""
    return partial(
        decode,
        max_bytes=settings.max_body_bytes,
        max_pixels=settings.max_pixels,
        load=pixel_loader(settings),
    )


def load_reduced(image: Image.Image, body: bytes, preprocess: Preprocess) -> Image.Image:  # noqa: ARG001
    """Load a JPEG at 1/2 or 1/4 of its size, other formats at full size.

    Each side keeps at least twice the pixels of the resized image. `fast_decode` measures the difference.
    """
    side = max(2 * preprocess.resize, -(-min(image.size) // MAX_REDUCTION))
    image.draft(image.mode, (side, side))
    image.load()
    return image


class NvImageCodec:
    """Loads JPEGs with nvImageCodec; each calling thread gets its own decoder.

    *device* is a CUDA device number or a constant of *library*; *backends* are names of its decoder backends.
    Raises `RuntimeUnavailableError` if no decoder can be created.
    """

    def __init__(self, library: Any, device: int, backends: tuple[str, ...]) -> None:
        self._library, self._device = library, device
        self._backends = [library.Backend(getattr(library, name)) for name in backends]
        self._params = library.DecodeParams(
            color_spec=library.ColorSpec.SRGB, apply_exif_orientation=False, allow_any_depth=False
        )
        self._threads = local()
        self._decoder()

    def __call__(self, image: Image.Image, body: bytes, preprocess: Preprocess) -> Image.Image:  # noqa: ARG002
        """Load *image*, whose file is *body*; Pillow loads what is not an RGB or gray JPEG."""
        if image.format == "JPEG" and image.mode in GPU_MODES:
            pixels = self._decode_pixels(body)
            if pixels is not None and pixels.shape == (image.height, image.width, 3):
                loaded = Image.fromarray(pixels)
                loaded.info = image.info  # includes the EXIF orientation, which preprocessing applies
                return loaded
        image.load()
        return image

    def _decode_pixels(self, body: bytes) -> NDArray[np.uint8] | None:
        decoded = self._decoder().decode(body, params=self._params)
        return None if decoded is None else np.asarray(decoded.cpu())

    def _decoder(self) -> Any:
        if not hasattr(self._threads, "decoder"):
            try:
                self._threads.decoder = self._library.Decoder(
                    device_id=self._device, max_num_cpu_threads=1, backends=self._backends, options=OPTIONS
                )
            except RuntimeError as error:
                raise RuntimeUnavailableError(
                    "decode=nvimagecodec: no GPU that can decode "
                    f"({' '.join(str(error).split())}); serve with decode=exact"
                ) from error
        return self._threads.decoder


@cache
def _gpu_loader() -> NvImageCodec:
    """Create the loader of this process's first GPU, once."""
    library = import_optional(
        "nvidia.nvimgcodec",
        "nvImageCodec",
        "sopdeploy[nvimagecodec]",
        RuntimeUnavailableError,
        "decode=nvimagecodec",
    )
    return NvImageCodec(library, library.NVIMGCODEC_DEVICE_CURRENT, GPU_BACKENDS)
