"""What the doctor sends: the user's own pictures, or made ones of a common size."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from sopdeploy.client.images import read
from sopdeploy.errors import DataError

KINDS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif"}
MOST_FILES = 32
MADE = 4
SIDES = (640, 480)


def pictures(folder: Path | None) -> list[bytes]:
    """Return the bytes of the first pictures below *folder*, or of made JPEGs; raises `DataError`."""
    if folder is None:
        return [made(seed) for seed in range(MADE)]
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in KINDS)[:MOST_FILES]
    if not found:
        raise DataError(f"{folder}: no picture here ({', '.join(sorted(KINDS))})")
    return [read(path) for path in found]


def made(seed: int) -> bytes:
    """Return a JPEG with the detail of a photograph, as its size in bytes depends on that."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (SIDES[1] // 16, SIDES[0] // 16, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize(SIDES, Image.Resampling.BICUBIC)).astype(np.int16)
    grain = rng.integers(-8, 9, smooth.shape, dtype=np.int16)
    file = io.BytesIO()
    Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=88)
    return file.getvalue()
