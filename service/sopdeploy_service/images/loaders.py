"""Load the pixels of an image exactly or at a reduced scale.

`decode=fast` lets libjpeg skip the highest frequencies of a large image, so the network gets slightly
different pixels than in training. The effect depends on the network; a server does not start if the effect
exceeds the limits below. The probes of the bundle are decoded pixels and cannot show it, so the check uses
synthetic JPEGs, the same ones at every start.
"""

import io
from collections.abc import Iterator
from functools import partial
from itertools import product

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sopdeploy.bundle.folder import Bundle
from sopdeploy.errors import ParityError
from sopdeploy.http_api import FastDecode
from sopdeploy_service.images.decode import Decoded, EncodedImage, decode
from sopdeploy_service.runtime.base import Runtime
from sopdeploy_service.settings import Settings

MAX_DRIFT = 0.1  # root mean square difference of the logits, relative to their spread
MIN_AGREEMENT = 0.9  # fraction of images whose best class stays the same
_SCALES = (4, 6, 8)  # shorter side / resized shorter side; libjpeg decodes at 1/2 from 4 on, at 1/4 from 8 on
SEEDS = 3
OCTAVES = (4, 16, 64, 256)  # noise cells along the longer side; one more octave has cells of 2 pixels


def make_decoder(settings: Settings) -> partial[Decoded]:
    """Create the decoder that loads pixels as `decode` says, with the limits of *settings*."""
    return partial(
        decode,
        max_bytes=settings.max_body_bytes,
        max_pixels=settings.max_pixels,
        fast=settings.decode == "fast",
    )


def check_fast_decode(bundle: Bundle, runtime: Runtime, settings: Settings) -> FastDecode:
    """Measure how `decode=fast` changes the outputs; raise `ParityError` if a change exceeds its limit."""
    output, rules = bundle.manifest.outputs[0].name, bundle.manifest.preprocess
    logits: tuple[list[NDArray[np.float32]], list[NDArray[np.float32]]] = ([], [])
    for jpeg in _test_jpegs(rules.resize if rules.fit == "crop" else rules.crop, settings.max_pixels):
        for fast in (False, True):
            decoded = decode(
                EncodedImage(jpeg), rules, max_bytes=len(jpeg), max_pixels=settings.max_pixels, fast=fast
            )
            logits[fast].append(runtime.run(decoded.pixels[None])[output][0])
    result = _compare(*(np.stack(rows).astype(np.float64) for rows in logits))
    if result.drift <= MAX_DRIFT and result.agreement >= MIN_AGREEMENT:
        return result
    raise ParityError(
        f"{bundle.path}: decode=fast changes the logits by {result.drift:.3f} of their spread "
        f"(at most {MAX_DRIFT:g}) and keeps {result.agreement:.1%} of the best classes "
        f"(at least {MIN_AGREEMENT:.0%}) on {result.num_pictures} JPEGs; serve it with decode=exact"
    )


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
