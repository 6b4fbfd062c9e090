"""Draw a class activation map over the image that it explains. Does not import torch."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sopdeploy.images.preprocess import Box

_MAX_SIDE = 2048  # pixels of the drawing; larger images are reduced
STRENGTH = 0.65  # opacity of the largest value
DIMMED = 0.5  # brightness of pixels outside of the network's input


def draw_overlay(image: Image.Image, values: NDArray[Any], box: Box) -> Image.Image:
    """Draw the positive *values* (h, w) of a map over *box* of the upright RGB *image*.

    The largest value is yellow, smaller ones are red and more transparent; pixels outside of the box are
    darker. Returns an RGB image of at most `_MAX_SIDE` pixels per side.
    """
    scale = min(1.0, _MAX_SIDE / max(image.size))
    width, height = (max(1, round(side * scale)) for side in image.size)
    pixels = np.asarray(image.resize((width, height)), dtype=np.float32)
    left, top, right, bottom = (round(edge * scale) for edge in box)
    positive = np.maximum(values, 0).astype(np.float32)
    positive /= max(float(positive.max()), np.finfo(np.float32).tiny)
    box_size = max(1, right - left), max(1, bottom - top)
    heat = Image.new("F", (width, height))
    heat.paste(Image.fromarray(positive).resize(box_size, Image.Resampling.BICUBIC), (left, top))
    strength = np.clip(np.asarray(heat), 0, 1)[..., None]
    color = np.concatenate([np.full_like(strength, 255), 230 * strength, np.zeros_like(strength)], axis=2)
    drawn = pixels + STRENGTH * strength * (color - pixels)
    outside = np.ones((height, width), dtype=np.bool_)
    outside[max(0, top) : bottom, max(0, left) : right] = False
    drawn[outside] = DIMMED * pixels[outside]
    return Image.fromarray(np.clip(np.rint(drawn), 0, 255).astype(np.uint8))
