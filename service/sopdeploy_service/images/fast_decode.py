"""May this bundle's JPEGs be decoded in another way than in training? Measured through the network itself.

`fast` lets libjpeg leave out the finest frequencies of a large picture, and `nvimagecodec` rounds as NVIDIA's
decoders do, so the network sees slightly other pixels than in training. By how much its numbers move depends
on the network; beyond the bounds here a server that is to decode so does not start. The bundle's probes are
pixels and prove nothing about this, so JPEGs are made, always the same ones, and those of
`fast_decode_samples` are taken too.
"""

import io
from collections.abc import Iterator
from itertools import islice, product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sopdeploy.bundle.folder import Bundle
from sopdeploy.config import StrictModel
from sopdeploy.errors import ConfigError, ParityError
from sopdeploy_service.images.decode import EncodedImage, decode, exactly
from sopdeploy_service.images.loaders import loader
from sopdeploy_service.runtime.base import Runtime
from sopdeploy_service.settings import Settings

MOST_DRIFT = 0.1  # root mean square of the logits' differences, of the spread of the logits
LEAST_AGREEMENT = 0.9  # share of pictures whose best class stays
TIMES = (4, 6, 8)  # the shorter side over the network's `resize`: from 4 on a half, from 8 on a quarter
SEEDS = 3
OCTAVES = (4, 16, 64, 256)  # cells along a made picture's longer side; beside them one of 2 pixels each
MOST_SAMPLES = 500
JPEG = b"\xff\xd8\xff"


class FastDecode(StrictModel):
    """What decoding large JPEGs fast changed on so many pictures at the start.

    *largest* is the largest difference of a logit, *drift* the differences' root mean square over the spread
    of the logits, *agreement* the share of pictures whose best class stayed.
    """

    pictures: int
    largest: float
    drift: float
    agreement: float


def checked(bundle: Bundle, runtime: Runtime, settings: Settings) -> FastDecode | None:
    """Return how far the way of *settings* moves the numbers of *bundle*; None where they decode exactly.

    Raises `ParityError` beyond the bounds, `ConfigError` where there are samples, but no JPEG among them, and
    `ImageError` for a damaged one, and what `loader` does.
    """
    if settings.decode == "exact":
        return None
    found = measure(bundle, runtime, settings)
    if found.drift <= MOST_DRIFT and found.agreement >= LEAST_AGREEMENT:
        return found
    raise ParityError(
        f"{bundle.path}: decode={settings.decode} moves the logits by {found.drift:.3f} of their spread "
        f"(at most {MOST_DRIFT:g}) and keeps {found.agreement:.1%} of the best classes "
        f"(at least {LEAST_AGREEMENT:.0%}) on {found.pictures} JPEGs; serve it with decode=exact"
    )


def measure(bundle: Bundle, runtime: Runtime, settings: Settings) -> FastDecode:
    """Return how the logits of *bundle* on *runtime* differ between the way of *settings* and the exact."""
    output = bundle.manifest.outputs[0].name
    ways = (exactly, loader(settings))
    exact: list[NDArray[np.float32]] = []
    fast: list[NDArray[np.float32]] = []
    for picture in pictures(bundle.manifest.preprocess.resize, settings):
        for rows, load in zip((exact, fast), ways, strict=True):
            decoded = decode(
                EncodedImage(picture),
                bundle.manifest.preprocess,
                max_bytes=len(picture),
                max_pixels=settings.max_pixels,
                load=load,
            )
            rows.append(runtime.run(decoded.pixels[None])[output][0])
    return compare(np.stack(exact).astype(np.float64), np.stack(fast).astype(np.float64))


def compare(exact: NDArray[np.float64], fast: NDArray[np.float64]) -> FastDecode:
    """Return how the logits *fast* (P, C) differ from *exact* (P, C)."""
    spread = float(np.sqrt(np.square(exact - exact.mean(axis=1, keepdims=True)).mean()))
    moved = float(np.sqrt(np.square(fast - exact).mean()))
    return FastDecode(
        pictures=len(exact),
        largest=float(np.abs(fast - exact).max()),
        drift=moved / spread if spread else float(moved > 0),
        agreement=float((exact.argmax(axis=1) == fast.argmax(axis=1)).mean()),
    )


def pictures(resize: int, settings: Settings) -> Iterator[bytes]:
    """Yield the JPEGs to compare: made ones that the fast way applies to, then the samples of *settings*."""
    for times, seed in product(TIMES, range(SEEDS)):
        short = times * resize
        size = (short, short * 4 // 3) if seed % 2 else (short * 4 // 3, short)
        if size[0] * size[1] <= settings.max_pixels:
            yield made(size, seed)
    if settings.fast_decode_samples is not None:
        yield from samples(settings.fast_decode_samples, settings)


def made(size: tuple[int, int], seed: int) -> bytes:
    """Return a JPEG of *size* with structure of every fineness, as photographs have it; *seed* says which."""
    rng = np.random.default_rng(seed)
    picture = Image.new("RGB", size, (128, 128, 128))
    for cells in (*OCTAVES, max(size) // 2):
        shape = (max(2, cells * size[1] // max(size)), max(2, cells * size[0] // max(size)), 3)
        layer = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
        picture = Image.blend(picture, layer.resize(size, Image.Resampling.BICUBIC), 0.35)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=88)
    return file.getvalue()


def samples(folder: Path, settings: Settings) -> Iterator[bytes]:
    """Yield the JPEGs in *folder* by name, at most `MOST_SAMPLES`; what is no JPEG is passed over."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    bodies = (path.read_bytes() for path in files if path.stat().st_size <= settings.max_body_bytes)
    count = 0
    for body in islice((body for body in bodies if body.startswith(JPEG)), MOST_SAMPLES):
        count += 1
        yield body
    if not count:
        raise ConfigError(f"fast_decode_samples: no JPEG in {folder}; name a folder of photographs")
