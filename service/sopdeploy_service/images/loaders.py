"""Load the pixels of an image exactly, at a reduced scale, or on the GPU.

`decode=fast` lets libjpeg skip the highest frequencies of a large image, and `decode=nvimagecodec` rounds as
NVIDIA's decoders do, so the network gets slightly different pixels than in training. The effect depends on
the network; a server does not start if the effect exceeds the limits below. The probes of the bundle are
decoded pixels and cannot show it, so the check uses synthetic JPEGs, the same ones at every start, and for
the GPU the golden examples of the bundle. With `decode=auto`, bundles that pass are decoded on the GPU, the
others exactly.
"""

import io
import logging
import os
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import product

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sopdeploy.bundle.folder import Bundle
from sopdeploy.bundle.golden import read_golden
from sopdeploy.environment import import_optional
from sopdeploy.errors import ParityError, RuntimeUnavailableError, SopdeployError
from sopdeploy.http_api import FastDecode
from sopdeploy.images.pixels import load_reduced
from sopdeploy_service.images.decode import Decode, Decoded, EncodedImage, LoadPixels, decode, load_exact
from sopdeploy_service.images.device_resize import DeviceResize
from sopdeploy_service.images.nvimagecodec import NvImageCodec
from sopdeploy_service.runtime.base import Runtime, reason_of
from sopdeploy_service.settings import Settings

GPU_BACKENDS = ("HW_GPU_ONLY", "GPU_ONLY", "HYBRID_CPU_GPU")  # never fall back to the CPU silently
CHECKED_SIZE = (96, 64)  # width and height of the JPEG that the GPU must decode at the start

MAX_DRIFT = 0.1  # root mean square difference of the logits, relative to their spread
MIN_AGREEMENT = 0.9  # fraction of images whose best class stays the same
MAX_GRAY_LEVELS = 1.0  # mean difference of the GPU's pixels; a wrong filter, color or offset has several
_SCALES = (4, 6, 8)  # shorter side / resized shorter side; libjpeg decodes at 1/2 from 4 on, at 1/4 from 8 on
SEEDS = 3
OCTAVES = (4, 16, 64, 256)  # noise cells along the longer side; one more octave has cells of 2 pixels

log = logging.getLogger("sopdeploy.service")


def make_decoder(
    settings: Settings, way: str, on_failure: Callable[[], None] = lambda: None
) -> partial[Decoded]:
    """Create the decoder that loads pixels in this *way*, with the limits of *settings*.

    Calls *on_failure* for each JPEG that Pillow decodes because the GPU could not. Raises
    `RuntimeUnavailableError` if nvImageCodec or its GPU is missing.
    """
    load: LoadPixels = load_reduced if way == "fast" else load_exact
    if way == "nvimagecodec":
        load = partial(gpu_loader(), on_failure=on_failure)
    return partial(decode, max_bytes=settings.max_body_bytes, max_pixels=settings.max_pixels, load=load)


@cache
def gpu_loader() -> NvImageCodec:
    """Create the loader of this process's first GPU, once."""
    os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")  # it would write lines for every damaged JPEG
    library = import_optional(
        "nvidia.nvimgcodec",
        "nvImageCodec",
        "sopdeploy[nvimagecodec]",
        RuntimeUnavailableError,
        "decode=nvimagecodec",
    )
    try:
        loader = NvImageCodec(library, library.NVIMGCODEC_DEVICE_CURRENT, GPU_BACKENDS, DeviceResize())
        loader.check_device(synthetic_jpeg(CHECKED_SIZE, 0), CHECKED_SIZE)
    except SopdeployError:
        raise
    except Exception as error:  # the libraries' errors share no base class
        raise RuntimeUnavailableError(
            f"decode=nvimagecodec: no GPU that can decode ({reason_of(error)}); serve with decode=exact"
        ) from error
    return loader


def choose_decoding(bundle: Bundle, runtime: Runtime, settings: Settings) -> tuple[str, FastDecode | None]:
    """Choose how images for *bundle* are decoded; return also how this changes the outputs, None if exact.

    `decode=auto` is nvImageCodec if it passes `check_fast_decode` and the golden examples of the bundle;
    otherwise it is exact, and the log says why. Other values raise the errors of `check_fast_decode`.
    """
    if settings.decode == "exact":
        return "exact", None
    if settings.decode != "auto":
        return settings.decode, check_fast_decode(bundle, runtime, settings, settings.decode)
    try:
        found = check_fast_decode(bundle, runtime, settings, "nvimagecodec")
        if found.gray_levels is None:
            raise ParityError("the bundle has no golden examples to check the pixels; export it again")
    except (ParityError, RuntimeUnavailableError) as error:
        log.info("%s: decode=auto is exact: %s", bundle.name, error)
        return "exact", None
    log.info("%s: decode=auto is nvimagecodec, %.2g gray levels off", bundle.name, found.gray_levels)
    return "nvimagecodec", found


def check_fast_decode(bundle: Bundle, runtime: Runtime, settings: Settings, way: str) -> FastDecode:
    """Measure how decoding in this *way* changes the outputs.

    Raises `ParityError` if a change exceeds its limit, `RuntimeUnavailableError` if the GPU cannot decode one
    of the JPEGs, and the errors of `make_decoder`.
    """
    output = bundle.manifest.outputs[0].name
    failed: list[None] = []
    decoder = make_decoder(settings, way, lambda: failed.append(None))
    exact: list[NDArray[np.float32]] = []
    fast: list[NDArray[np.float32]] = []
    rules = bundle.manifest.preprocess
    for jpeg in _test_jpegs(rules.resize if rules.fit == "crop" else rules.crop, settings.max_pixels):
        for logits, load in ((exact, load_exact), (fast, decoder.keywords["load"])):
            image = EncodedImage(jpeg)
            decoded = decoder(image, rules, max_bytes=len(jpeg), load=load)
            logits.append(runtime.run(decoded.pixels[None])[output][0])
    result = _compare(np.stack(exact).astype(np.float64), np.stack(fast).astype(np.float64))
    if way == "nvimagecodec":
        levels = {"gray_levels": _check_gray_levels(bundle, decoder), "max_gray_levels": MAX_GRAY_LEVELS}
        result = result.model_copy(update=levels)
    if failed:  # Pillow has decoded them
        raise RuntimeUnavailableError(
            f"decode={way}: the GPU could not decode {len(failed)} of the JPEGs of the check; "
            "serve with decode=exact"
        )
    if result.drift <= MAX_DRIFT and result.agreement >= MIN_AGREEMENT:
        return result
    raise ParityError(
        f"{bundle.path}: decode={way} changes the logits by {result.drift:.3f} of their spread "
        f"(at most {MAX_DRIFT:g}) and keeps {result.agreement:.1%} of the best classes "
        f"(at least {MIN_AGREEMENT:.0%}) on {result.num_pictures} JPEGs; serve it with decode=exact"
    )


def _check_gray_levels(bundle: Bundle, decode_one: Decode) -> float | None:
    """Compare pixels with the golden examples of *bundle*; raise `ParityError` if they differ too much."""
    differences = []
    for golden in read_golden(bundle):
        pixels = decode_one(EncodedImage(golden.jpeg), bundle.manifest.preprocess).pixels
        differences.append(float(np.abs(pixels.astype(np.int16) - golden.pixels).mean()))
    largest = max(differences, default=None)
    if largest is not None and largest > MAX_GRAY_LEVELS:
        raise ParityError(
            f"{bundle.path}: on the GPU, the pixels of a golden example differ by {largest:.1f} gray levels "
            f"on average (at most {MAX_GRAY_LEVELS:g}); serve it with decode=exact"
        )
    return largest


def _compare(exact: NDArray[np.float64], fast: NDArray[np.float64]) -> FastDecode:
    """Compare the logits *fast* (P, C) with *exact* (P, C)."""
    spread = float(np.sqrt(np.square(exact - exact.mean(axis=1, keepdims=True)).mean()))
    difference = float(np.sqrt(np.square(fast - exact).mean()))
    return FastDecode(
        num_pictures=len(exact),
        largest=float(np.abs(fast - exact).max()),
        drift=difference / spread if spread else float(difference > 0),
        agreement=float((exact.argmax(axis=1) == fast.argmax(axis=1)).mean()),
    )


def _test_jpegs(side: int, max_pixels: int) -> Iterator[bytes]:
    """Yield synthetic JPEGs large enough for fast decoding."""
    for scale, seed in product(_SCALES, range(SEEDS)):
        short = scale * side
        size = (short, short * 4 // 3) if seed % 2 else (short * 4 // 3, short)
        if size[0] * size[1] <= max_pixels:
            yield synthetic_jpeg(size, seed)


def synthetic_jpeg(size: tuple[int, int], seed: int) -> bytes:
    """Generate a JPEG of *size* with noise of every spatial frequency, as photographs have."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", size, (128, 128, 128))
    for cells in (*OCTAVES, max(size) // 2):
        shape = (max(2, cells * size[1] // max(size)), max(2, cells * size[0] // max(size)), 3)
        layer = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
        image = Image.blend(image, layer.resize(size, Image.Resampling.BICUBIC), 0.35)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=88)
    return file.getvalue()
