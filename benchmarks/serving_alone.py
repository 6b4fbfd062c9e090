"""Reference measurements without a server: runtime, decoding, and both in one thread; test images."""

import json
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageDraw

from sopdeploy.images.decode import decode
from sopdeploy.images.preprocess import Preprocess
from sopdeploy_service.runtime.base import Runtime

LIMIT = 10**8  # bytes and pixels; larger than all images here

# `pipeline` for the other servers, with the decoder and the runtime that their scripts share.
PEER_PIPELINE = """
import json, sys, time
from pathlib import Path
import numpy as np
from common import decode, infer, session
engine, largest, seconds = session(), int(sys.argv[2]), float(sys.argv[3])
bodies = [path.read_bytes() for path in sorted(Path(sys.argv[1]).iterdir())]
infer(engine, np.stack([decode(body) for body in bodies[:largest]]))
started, cpu, done = time.perf_counter(), time.process_time(), 0
while time.perf_counter() - started < seconds:
    infer(engine, np.stack([decode(bodies[(done + n) % len(bodies)]) for n in range(largest)]))
    done += largest
print(json.dumps([done / (time.perf_counter() - started), 1000 * (time.process_time() - cpu) / done]))
"""


@dataclass(frozen=True, slots=True)
class SingleProcess:
    """Throughput and CPU milliseconds per image of work in one process."""

    images_per_s: float
    cpu_ms: float


PHOTO, SMALL = (500, 375), (160, 120)  # pixels: about 50 and 6 kB


class Photographs(NamedTuple):
    """How images of one kind are made: their size in pixels, Pillow's format and its options.

    `turned` images are stored on their side, with EXIF that turns them; a `screenshot` is lines
    of text.
    """

    size: tuple[int, int]
    format: str = "JPEG"
    quality: int = 88
    noise: float = 6
    progressive: bool = False
    turned: bool = False
    screenshot: bool = False


PHONE = Photographs((4032, 3024), quality=90, noise=3)
KINDS = {
    "500 x 375": Photographs(PHOTO),
    "1920 x 1080": Photographs((1920, 1080)),
    "12 MP": PHONE,
    "12 MP, turned by EXIF": PHONE._replace(turned=True),
    "12 MP, progressive": PHONE._replace(progressive=True),
    "PNG, screenshot of 1920 x 1080": Photographs((1920, 1080), "PNG", screenshot=True),
    "WebP, 1920 x 1080": Photographs((1920, 1080), "WEBP", quality=80),
}


def write_images(folder: Path, count: int = 32, kind: Photographs = KINDS["500 x 375"]) -> Path:
    """Write *count* images of *kind* into *folder*."""
    folder.mkdir(exist_ok=True)
    rng, exif = np.random.default_rng(0), Image.Exif()
    if kind.turned:
        exif[ExifTags.Base.Orientation] = 6  # to be turned by 90 degrees
    for number in range(count):
        image = draw_screenshot(kind, rng) if kind.screenshot else draw_photograph(kind, rng)
        if kind.turned:
            image = image.transpose(Image.Transpose.ROTATE_90)
        options = {"quality": kind.quality, "progressive": kind.progressive, "exif": exif}
        image.save(folder / f"{number:03d}.{kind.format.lower()}", kind.format, **options)
    return folder


def draw_photograph(kind: Photographs, rng: np.random.Generator) -> Image.Image:
    """Draw soft colors with the noise of a camera, the same in all channels of a large photograph."""
    coarse = Image.fromarray(rng.integers(0, 255, (24, 32, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize(kind.size, Image.Resampling.BICUBIC))
    shape = (*smooth.shape[:2], 1) if kind.size == PHONE.size else smooth.shape
    noisy = smooth + kind.noise * rng.standard_normal(shape, dtype=np.float32)
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


def draw_screenshot(kind: Photographs, rng: np.random.Generator) -> Image.Image:
    """Draw a window with lines of text beside a picture."""
    width, height = kind.size
    image = Image.new("RGB", kind.size, "white")
    drawing = ImageDraw.Draw(image)
    for top in range(40, height, 24):
        drawing.text(
            (40, top), "".join(map(chr, rng.integers(97, 123, 120))), "black", font_size=16
        )
    picture = draw_photograph(kind._replace(size=(width // 4, height // 4), noise=0), rng)
    image.paste(picture, (2 * width // 3, height // 3))
    return image


def bare_runtime(runtime: Runtime, largest: int, seconds: float) -> SingleProcess:
    """Measure *runtime* with full batches and without decoding."""
    images = np.zeros((largest, 224, 224, 3), dtype=np.uint8)
    return repeat(lambda _: runtime.run(images), largest, seconds)


def pipeline(
    runtime: Runtime, rules: Preprocess, folder: Path, largest: int, seconds: float
) -> SingleProcess:
    """Measure decoding and *runtime*, alternating by batch in one thread.

    The runtime evicts the decoder from the CPU caches between batches, as in a server.
    """
    bodies = read_files(folder)

    def batch(done: int) -> None:
        runtime.run(
            np.stack(
                [decode_image(bodies[(done + n) % len(bodies)], rules) for n in range(largest)]
            )
        )

    return repeat(batch, largest, seconds)


def peer_pipeline(
    python: str,
    scripts: Path,
    environment: Mapping[str, str],
    folder: Path,
    largest: int,
    seconds: float,
) -> SingleProcess:
    """Measure as `pipeline` does, with the other servers' decoder and runtime in the folder *scripts*."""
    command = [python, "-c", PEER_PIPELINE, str(folder), str(largest), str(seconds)]
    done = subprocess.run(
        command, cwd=scripts, env=dict(environment), capture_output=True, text=True, check=True
    )
    return SingleProcess(*json.loads(done.stdout))


def read_files(folder: Path) -> Sequence[bytes]:
    """Read the files of *folder*."""
    return [path.read_bytes() for path in sorted(folder.iterdir())]


def decode_image(body: bytes, rules: Preprocess) -> NDArray[np.uint8]:
    """Decode *body* with the server's decoder."""
    return decode(body, rules, max_bytes=LIMIT, max_pixels=LIMIT).pixels


def repeat(batch: Callable[[int], object], images: int, seconds: float) -> SingleProcess:
    """Call *batch*, which processes *images* images, once as warm-up and then for *seconds*.

    Its argument is the number of images processed so far.
    """
    batch(0)
    started, cpu, done = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - started < seconds:
        batch(done)
        done += images
    return SingleProcess(
        done / (time.perf_counter() - started), 1000 * (time.process_time() - cpu) / done
    )
