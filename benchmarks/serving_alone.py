"""What there is without a server: the pictures of a load, the engine, decoding, and both in one thread."""

import json
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from serving_ours import pretend

from sopdeploy.images.preprocess import Preprocess
from sopdeploy_service.images.decode import EncodedImage, decode
from sopdeploy_service.runtime.base import Runtime

LIMIT = 10**8  # bytes and pixels, which no picture here has

# The same for the other servers, with the decoder and the engine that their scripts share.
THEIRS = """
import json, sys, time
from pathlib import Path
import numpy as np
from common import decode, infer, session
engine, largest, seconds = session(), int(sys.argv[2]), float(sys.argv[3])
bodies = [path.read_bytes() for path in sorted(Path(sys.argv[1]).iterdir())]
infer(engine, np.stack([decode(body) for body in bodies[:largest]]))
begun, spent, done = time.perf_counter(), time.process_time(), 0
while time.perf_counter() - begun < seconds:
    infer(engine, np.stack([decode(bodies[(done + place) % len(bodies)]) for place in range(largest)]))
    done += largest
print(json.dumps([done / (time.perf_counter() - begun), 1000 * (time.process_time() - spent) / done]))
"""


@dataclass(frozen=True, slots=True)
class SingleProcess:
    """How fast something went, and its CPU milliseconds per image."""

    images_per_s: float
    cpu_ms: float


def pictures(folder: Path, count: int = 32) -> Path:
    """Write *count* JPEGs of 500 x 375 pixels, about 50 kB each, into *folder*."""
    rng = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 255, (24, 32, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC))
        noisy = np.clip(smooth + rng.normal(0, 6, smooth.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{number:03d}.jpg", quality=88)
    return folder


def bare(runtime: Runtime, largest: int, seconds: float) -> SingleProcess:
    """Return what *runtime* does in full batches and nothing else."""
    images = np.zeros((largest, 224, 224, 3), dtype=np.uint8)
    return repeated(lambda _: runtime.run(images), largest, seconds)


def pipeline(
    runtime: Runtime, rules: Preprocess, folder: Path, largest: int, seconds: float
) -> SingleProcess:
    """Return what decoding, as our server does it, and *runtime* take in turn in one thread, batch by batch.

    Between its batches a decoder finds the caches as cold as in a server that waits for the same engine.
    """
    bodies = read(folder)

    def batch(done: int) -> None:
        runtime.run(np.stack([pixels(bodies[(done + n) % len(bodies)], rules) for n in range(largest)]))

    return repeated(batch, largest, seconds)


def their_pipeline(
    python: str, scripts: Path, environment: Mapping[str, str], folder: Path, largest: int, seconds: float
) -> SingleProcess:
    """Return the same of the other servers' decoder and engine, in the folder *scripts*."""
    command = [python, "-c", THEIRS, str(folder), str(largest), str(seconds)]
    done = subprocess.run(
        command, cwd=scripts, env=dict(environment), capture_output=True, text=True, check=True
    )
    return SingleProcess(*json.loads(done.stdout))


def decode_ms(folder: Path) -> float:
    """Return the CPU milliseconds of decoding one picture of *folder* after the other, as our server does."""
    bodies, rules = read(folder), pretend(0, 0, 1).bundle.manifest.preprocess
    begun = time.process_time()
    for body in bodies:
        pixels(body, rules)
    return 1000 * (time.process_time() - begun) / len(bodies)


def read(folder: Path) -> Sequence[bytes]:
    """Return the files of *folder*."""
    return [path.read_bytes() for path in sorted(folder.iterdir())]


def pixels(body: bytes, rules: Preprocess) -> NDArray[np.uint8]:
    """Return what our decoders make of *body*."""
    return decode(EncodedImage(body), rules, max_bytes=LIMIT, max_pixels=LIMIT).pixels


def repeated(batch: Callable[[int], object], images: int, seconds: float) -> SingleProcess:
    """Call *batch*, which does so many *images*, with the number done before, once and then for *seconds*."""
    batch(0)
    begun, cpu, done = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - begun < seconds:
        batch(done)
        done += images
    return SingleProcess(done / (time.perf_counter() - begun), 1000 * (time.process_time() - cpu) / done)
