"""Painted images of three colors, and a small network for them."""

from pathlib import Path

import numpy as np
from PIL import Image

COLORS = {"blue": (40, 60, 200), "green": (50, 190, 60), "red": (200, 50, 40)}
SMALL = [
    "model.name=dsop-resnet8",
    "model.config={aux_widths=[8,8,8], iterations=2}",
    "start.weights=none",
    "preprocess.resize=16",
    "preprocess.crop=16",
]


def paint(root: Path, each: int, seed: int = 0) -> Path:
    """Write *each* noisy images of three colors below *root*, one folder per color."""
    random = np.random.default_rng(seed)
    for name, color in COLORS.items():
        (root / name).mkdir(parents=True)
        for number in range(each):
            pixels = np.clip(random.normal(color, 40.0, (20, 24, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root
