"""Copies of photographs as people and tools make them: parts, turns, proportions, colours, overlays."""

from collections.abc import Callable
from functools import partial
from random import Random

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageEnhance, ImageOps

Change = Callable[[Image.Image, Random], Image.Image]
GRAY = (114, 114, 114)  # of padding
TOOL_SIDE = 416  # pixels of a side of what annotation tools export


def _crop(share: float, image: Image.Image, source: Random) -> Image.Image:
    """Cut *share* of each side, anywhere."""
    width, height = round(image.width * share), round(image.height * share)
    left, top = source.randint(0, image.width - width), source.randint(0, image.height - height)
    return image.crop((left, top, left + width, top + height))


def _turn(degrees: float, image: Image.Image, source: Random) -> Image.Image:
    """Turn by *degrees* to either side; the corners are black."""
    return image.rotate(source.choice((-degrees, degrees)), resample=Image.Resampling.BILINEAR)


def _turn_reflected(degrees: float, image: Image.Image, source: Random) -> Image.Image:
    """Turn by *degrees* to either side; the corners are reflections."""
    border = max(image.size) // 4
    pixels = np.pad(np.asarray(image), ((border, border), (border, border), (0, 0)), "reflect")
    turned = _turn(degrees, Image.fromarray(pixels), source)
    return turned.crop((border, border, border + image.width, border + image.height))


def _shear(image: Image.Image, source: Random) -> Image.Image:
    slope = source.choice((-1, 1)) * 0.15
    shift = -slope * image.height / 2
    return image.transform(
        image.size,
        Image.Transform.AFFINE,
        (1, slope, shift, 0, 1, 0),
        resample=Image.Resampling.BILINEAR,
    )


def _colour(image: Image.Image, source: Random) -> Image.Image:
    """Shift the hue by up to a tenth, and change saturation and brightness by up to a quarter."""
    hue, saturation, value = image.convert("HSV").split()
    shift = source.choice((-1, 1)) * source.randint(13, 26)
    shifted = hue.point([(level + shift) % 256 for level in range(256)])
    coloured = Image.merge("HSV", (shifted, saturation, value)).convert("RGB")
    coloured = ImageEnhance.Color(coloured).enhance(source.uniform(0.75, 1.25))
    return ImageEnhance.Brightness(coloured).enhance(source.uniform(0.75, 1.25))


def _letterbox(image: Image.Image, _source: Random) -> Image.Image:
    return ImageOps.pad(image, (TOOL_SIDE, TOOL_SIDE), color=GRAY)


def _caption(image: Image.Image, _source: Random) -> Image.Image:
    """Cover the lower sixth by white, with words."""
    captioned = image.copy()
    drawn = ImageDraw.Draw(captioned)
    drawn.rectangle((0, image.height * 5 // 6, image.width, image.height), fill="white")
    drawn.text(
        (image.width // 20, image.height * 7 // 8),
        "new in our shop",
        fill="black",
        font_size=max(8, image.height // 12),
    )
    return captioned


def _watermark(image: Image.Image, _source: Random) -> Image.Image:
    """Add gray words in four lines."""
    words = Image.new("RGB", image.size)
    drawn = ImageDraw.Draw(words)
    for line in range(4):
        drawn.text(
            (image.width // 12, image.height * (2 * line + 1) // 8),
            "sample sample",
            fill=(90, 90, 90),
            font_size=max(8, image.width // 10),
        )
    return ImageChops.add(image, words)


def _screenshot(image: Image.Image, _source: Random) -> Image.Image:
    """Show the photograph between two bars, as a telephone does."""
    bar = image.height // 8
    shown = Image.new("RGB", (image.width, image.height + 2 * bar), "black")
    shown.paste(image, (0, bar))
    return shown


def _augment(image: Image.Image, source: Random) -> Image.Image:
    """Change in all ways at once, as annotation tools do by default settings of their users."""
    image = image.resize((TOOL_SIDE, TOOL_SIDE))
    if source.random() < 0.5:
        image = ImageOps.mirror(image)
    image = _crop(source.uniform(0.8, 1), image, source).resize((TOOL_SIDE, TOOL_SIDE))
    image = image.rotate(source.uniform(-15, 15), resample=Image.Resampling.BILINEAR)
    image = ImageEnhance.Brightness(image).enhance(source.uniform(0.75, 1.25))
    return ImageEnhance.Color(image).enhance(source.uniform(0.75, 1.25))


def _mirror_crop_turn(image: Image.Image, source: Random) -> Image.Image:
    return _turn(8, _crop(0.85, ImageOps.mirror(image), source), source)


CHANGES: dict[str, Change] = {
    "half size": lambda image, _source: image.reduce(2),
    "crop 0.85": partial(_crop, 0.85),
    "crop 0.7": partial(_crop, 0.7),
    "crop 0.6": partial(_crop, 0.6),
    "turned by 3": partial(_turn, 3),
    "turned by 8": partial(_turn, 8),
    "turned by 15": partial(_turn, 15),
    "turned by 15, reflected": partial(_turn_reflected, 15),
    "mirrored": lambda image, _source: ImageOps.mirror(image),
    "mirrored, cropped, turned": _mirror_crop_turn,
    "sheared": _shear,
    "squashed": lambda image, _source: image.resize((TOOL_SIDE, TOOL_SIDE)),
    "letterboxed": _letterbox,
    "coloured": _colour,
    "gray": lambda image, _source: ImageOps.grayscale(image).convert("RGB"),
    "brighter": lambda image, _source: ImageEnhance.Brightness(image).enhance(1.4),
    "darker": lambda image, _source: ImageEnhance.Brightness(image).enhance(0.6),
    "caption": _caption,
    "watermark": _watermark,
    "screenshot": _screenshot,
    "augmented": _augment,
}
