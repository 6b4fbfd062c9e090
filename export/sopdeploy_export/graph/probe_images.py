"""Probe and calibration images for the checks of an export.

The generated probes (noise, smooth fields at several scales, ramps, checkerboards, constants) exercise many
parts of a network and are the same on every machine. Photographs from the deployment domain are more
representative.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from sopdeploy.errors import DataError
from sopdeploy.images.preprocess import Preprocess, match_transparency

SEED = 20_240_117
GENERATED = 12
MAX_PHOTOGRAPHS = 64
MAX_CALIBRATION = 256
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})


def probe_images(preprocess: Preprocess, folder: Path | None = None) -> NDArray[np.uint8]:
    """Build uint8 probes (P, crop, crop, 3): generated ones, then 64 of *folder*.

    Raises `DataError` if *folder* holds no readable image.
    """
    images = generated_images(preprocess.crop)
    if folder is None:
        return images
    paths = _image_paths(folder, "--probes")[:MAX_PHOTOGRAPHS]
    return np.concatenate([images, np.stack([_load(path, preprocess) for path in paths])])


def generated_images(side: int) -> NDArray[np.uint8]:
    """Generate twelve (side, side, 3) uint8 images from a fixed seed."""
    random = np.random.default_rng(SEED)
    ramp = np.linspace(0, 255, side)
    checkerboard = 255 * ((np.arange(side)[:, None] // 4 + np.arange(side)[None] // 4) % 2)
    images = [
        np.zeros((side, side, 3)),
        np.full((side, side, 3), 255.0),
        np.stack([np.tile(ramp, (side, 1)), np.tile(ramp[:, None], (1, side)), checkerboard], axis=2),
        random.integers(0, 256, (side, side, 3)),
    ]
    for scale in range(GENERATED - len(images)):
        cells = min(side, 2 + 3 * scale)
        coarse = random.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
        images.append(np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)))
    return np.stack([np.clip(np.rint(image), 0, 255).astype(np.uint8) for image in images])


def calibration_images(folder: Path, preprocess: Preprocess) -> NDArray[np.uint8]:
    """Load up to 256 images spread evenly over *folder*, to cover every class.

    Raises `DataError` if *folder* holds no readable image.
    """
    paths = _image_paths(folder, "--calibrate")
    positions = np.linspace(0, len(paths) - 1, min(len(paths), MAX_CALIBRATION)).round().astype(int)
    return np.stack([_load(paths[position], preprocess) for position in np.unique(positions)])


def _image_paths(folder: Path, option: str) -> list[Path]:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; {option} needs a folder of images")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise DataError(f"{folder}: contains no images; {option} needs a folder of JPEG or PNG files")
    return paths


def _load(path: Path, preprocess: Preprocess) -> NDArray[np.uint8]:
    try:
        with Image.open(path) as image:
            match_transparency(image)
            return preprocess(image)
    except (OSError, UnidentifiedImageError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: not a readable image; remove it from the folder") from error
