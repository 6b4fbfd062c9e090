"""Draw a class activation map over the image that it explains. Does not import torch."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sopdeploy.images.preprocess import Box

MAX_SIDE = 2048  # pixels of the drawing; larger images are reduced
STRENGTH = 0.65  # opacity of the largest value
DIMMED = 0.5  # brightness of pixels outside of the network's input


def draw_overlay(image: Image.Image, values: NDArray[Any], box: Box) -> Image.Image:
    """Draw the positive *values* (h, w) of a map over *box* of the upright RGB *image*.

    The largest value is yellow, smaller ones are red and more transparent; pixels outside of the box are
    darker. Returns an RGB image of at most `MAX_SIDE` pixels per side.
    """
    scale = min(1.0, MAX_SIDE / max(image.size))
    width, height = (max(1, round(side * scale)) for side in image.size)
    pixels = np.asarray(image.resize((width, height)), dtype=np.float32)
    left, top, right, bottom = (
        edge * side / old for edge, side, old in zip(box, (width, height) * 2, image.size * 2, strict=True)
    )
    x, y = max(0, round(left)), max(0, round(top))
    end_x, end_y = max(x + 1, min(width, round(right))), max(y + 1, min(height, round(bottom)))
    positive = np.maximum(values, 0).astype(np.float32)
    heat = Image.fromarray(positive / max(float(positive.max()), np.finfo(np.float32).tiny))
    cells_x, cells_y = values.shape[1] / (right - left), values.shape[0] / (bottom - top)
    source = (
        (x - left) * cells_x,
        (y - top) * cells_y,
        min(values.shape[1], (end_x - left) * cells_x),
        min(values.shape[0], (end_y - top) * cells_y),
    )
    source = (max(0.0, source[0]), max(0.0, source[1]), source[2], source[3])
    resized = heat.resize((end_x - x, end_y - y), Image.Resampling.BICUBIC, box=source)
    strength = np.clip(np.asarray(resized), 0, 1)[..., None]
    color = np.concatenate([np.full_like(strength, 255), 230 * strength, np.zeros_like(strength)], axis=2)
    drawn = DIMMED * pixels
    inside = pixels[y:end_y, x:end_x]
    drawn[y:end_y, x:end_x] = inside + STRENGTH * strength * (color - inside)
    return Image.fromarray(np.clip(np.rint(drawn), 0, 255).astype(np.uint8))
