"""Probe images: a few pictures that reach many parts of a network, the same on every machine.

Noise, smooth fields at several scales, ramps, checkers and constants. A folder of one's own photographs
can join them; numbers measured on the pictures one will serve say more.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from sopdeploy.errors import DataError
from sopdeploy.images.color import match_transparency
from sopdeploy.images.preprocess import Preprocess

SEED = 20_240_117
GENERATED = 12
LARGEST_FOLDER = 64
LARGEST_CALIBRATION = 256
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})


def probe_images(preprocess: Preprocess, folder: Path | None = None) -> NDArray[np.uint8]:
    """Return (P, crop, crop, 3) uint8 images: generated ones, then the pictures of *folder*."""
    images = generated_images(preprocess.crop)
    if folder is None:
        return images
    return np.concatenate([images, photographs(folder, preprocess)])


def generated_images(side: int) -> NDArray[np.uint8]:
    """Return the generated images for a network of *side* pixels."""
    random = np.random.default_rng(SEED)
    ramp = np.linspace(0, 255, side)
    checks = 255 * ((np.arange(side)[:, None] // 4 + np.arange(side)[None] // 4) % 2)
    images = [
        np.zeros((side, side, 3)),
        np.full((side, side, 3), 255.0),
        np.stack([np.tile(ramp, (side, 1)), np.tile(ramp[:, None], (1, side)), checks], axis=2),
        random.integers(0, 256, (side, side, 3)),
    ]
    for position in range(GENERATED - len(images)):
        cells = min(side, 2 + 3 * position)
        coarse = random.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
        field = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
        images.append(np.asarray(field))
    return np.stack([np.clip(np.rint(image), 0, 255).astype(np.uint8) for image in images])


def photographs(folder: Path, preprocess: Preprocess) -> NDArray[np.uint8]:
    """Return the first pictures below *folder* as the network sees them; raises `DataError`."""
    return np.stack(
        [photograph(path, preprocess) for path in picture_paths(folder, "--probes")[:LARGEST_FOLDER]]
    )


def calibration_images(folder: Path, preprocess: Preprocess) -> NDArray[np.uint8]:
    """Return pictures from all over *folder*, so that every class has its share; raises `DataError`."""
    paths = picture_paths(folder, "--calibrate")
    taken = np.unique(
        np.linspace(0, len(paths) - 1, min(len(paths), LARGEST_CALIBRATION)).round().astype(int)
    )
    return np.stack([photograph(paths[position], preprocess) for position in taken])


def picture_paths(folder: Path, option: str) -> list[Path]:
    """Return the pictures below *folder*, sorted; raises `DataError` where there are none."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give {option} a folder of pictures")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise DataError(f"{folder}: no pictures in it; give {option} a folder of JPEG or PNG files")
    return paths


def photograph(path: Path, preprocess: Preprocess) -> NDArray[np.uint8]:
    """Return the picture at *path* as the network sees it."""
    try:
        with Image.open(path) as picture:
            match_transparency(picture)
            return preprocess(picture)
    except (OSError, UnidentifiedImageError, ValueError, Image.DecompressionBombError) as problem:
        raise DataError(f"{path}: cannot be read as a picture; remove it from the folder") from problem
