"""Find the preprocessing rules that give the pixels of a transform, and say how other rules differ.

The pixels of all rules come from `sopdeploy.images.decode`, as those of the server.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sopdeploy.images.decode import decode
from sopdeploy.images.preprocess import GRAY_WEIGHTS, Preprocess
from sopdeploy_export.pixels.colors import Colors
from sopdeploy_export.pixels.differences import Difference, measure
from sopdeploy_export.pixels.photos import EXIF, LARGE, TALL, UPRIGHT, WIDE, draw_photo

Levels = Mapping[str, NDArray[np.float32]]  # the pixels of a transform, by the kind of photo
# `resize` in relation to `crop`, as libraries and repositories choose it
_RATIOS = (
    256 / 224,
    1.0,
    1 / 0.95,
    1 / 0.9,
    1 / 0.96,
    232 / 224,
    235 / 224,
    1.25,
    1 / 0.85,
    4 / 3,
)
_WIDEST = 1.5
_STEP = 8
_UNDIVIDED = 2 / 255  # a smaller standard deviation is one of values from 0 to 255
_FITS = {
    "crop": "crops the center after the shorter side became {resize} pixels",
    "squash": "squashes images to a square",
    "squash-crop": "squashes images to a square of {resize} pixels and crops the center",
    "pad": "pads images to a square",
}


def pixels_of(content: bytes, rules: Preprocess) -> NDArray[np.float32]:
    """Decode the file *content* as a server with *rules* does; gray values (H, W, 1) if they say so."""
    pixels = decode(content, rules).pixels.astype(np.float32)
    if rules.channels == 1:
        return pixels @ np.array(GRAY_WEIGHTS, np.float32)[:, None]
    return pixels


def find_rules(
    levels: Levels, colors: Colors, start: Preprocess | None, *, takes_files: bool
) -> Preprocess | None:
    """Find the rules that give the pixels *levels* of the photos of `photos.KINDS`; None if no rules do.

    The search begins at *start*, the rules that are expected. *colors* are those of the transform. If it
    *takes_files*, it may turn them by EXIF.
    """
    side = len(levels[WIDE])
    known = {
        **({} if start is None else start.model_dump()),
        "channels": colors.channels,
        "mean": colors.mean,
        "std": colors.std,
        "color_order": colors.order,
        "decoding": "full",
    }
    known.pop("resize", None)
    if start is None or start.crop == side:
        known["resize"] = side * 8 // 7 if start is None else start.resize

    def rules_with(**fields: Any) -> Preprocess:
        return Preprocess(**{**known, "crop": side, **fields})

    def difference(rules: Preprocess, *kinds: str) -> Difference:
        return max(
            measure(levels[kind], pixels_of(draw_photo(kind, side), rules)) for kind in kinds
        )

    def best(candidates: Iterator[dict[str, Any]], *kinds: str) -> dict[str, Any]:
        """Return the candidate whose pixels differ least; the first one that only rounds differently."""
        least: tuple[Difference, dict[str, Any]] | None = None
        for candidate in candidates:
            measured = difference(rules_with(**candidate), *kinds)
            if least is None or measured < least[0]:
                least = measured, candidate
            if measured.is_rounding:
                break
        return {} if least is None else least[1]

    # The square, by a wide and a tall photo; then how it is resized, by a large one.
    found: dict[str, Any] = best(_squares(rules_with(), levels), WIDE, TALL)
    found |= best(
        _filters({**rules_with().model_dump(include={"antialias", "interpolation"}), **found}),
        WIDE,
        LARGE,
    )
    if not difference(rules_with(**found), WIDE).is_rounding and "crop" in found["fit"]:
        found |= best(_sizes(found, side, difference, rules_with), WIDE)

    # Whether it turns a photo by EXIF.
    if takes_files:
        found |= best(({**found, "exif_orientation": turns} for turns in (True, False)), EXIF)
    rules = rules_with(**found)
    return rules if difference(rules, *UPRIGHT).is_rounding else None


def _squares(start: Preprocess, levels: Levels) -> Iterator[dict[str, Any]]:
    """Yield ways to make a square, that of *start* first."""
    yield {"fit": start.fit, "resize": start.resize}
    yield {"fit": "squash"}
    for ratio in _RATIOS:
        for fit in ("crop", "squash-crop"):
            yield {"fit": fit, "resize": max(start.crop, int(ratio * start.crop + 1e-6))}

    # The background is the color of a corner that a photo does not reach.
    corner = levels[WIDE][0, 0].round().clip(0, 255).astype(int).tolist()
    yield {"fit": "pad", "background": tuple(corner * (3 // len(corner)))}


def _filters(found: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the ways to resize, with what was *found* before; the way in *found* comes first."""
    yield {**found}
    for antialias in (True, False):
        for interpolation in ("bilinear", "bicubic"):
            yield {**found, "antialias": antialias, "interpolation": interpolation}


def _sizes(
    found: Mapping[str, Any],
    side: int,
    difference: Callable[..., Difference],
    rules_with: Callable[..., Preprocess],
) -> Iterator[dict[str, Any]]:
    """Yield unusual sizes before the crop, with each way to resize: near the best of every eighth size.

    Sizes a pixel apart differ by less than two ways to resize, so neither can be found without the other.
    """
    sizes = range(side, int(_WIDEST * side) + 1, _STEP)
    nearest = min(
        sizes, key=lambda size: difference(rules_with(**{**found, "resize": size}), WIDE)
    )
    beside = range(max(side, nearest - _STEP), nearest + _STEP + 1)
    for size in sorted(beside, key=lambda size: abs(size - nearest)):
        yield from _filters({**found, "resize": size})


def describe_differences(own: Preprocess, rules: Preprocess) -> tuple[str, ...]:
    """Say how the rules *own* of a transform differ from *rules*, one sentence without a subject each."""
    sentences = []
    if own.channels != rules.channels:
        names = {1: "gray images", 3: "colors"}
        sentences.append(f"gives {names[own.channels]}, these rules {names[rules.channels]}")
    else:
        for name, title in (("mean", "mean"), ("std", "standard deviation")):
            theirs, ours = getattr(own, name), getattr(rules, name)
            if not np.allclose(theirs, ours, rtol=1e-3, atol=1e-3):
                sentences.append(
                    f"has the {title} {_colors(name, theirs)}, these rules {_colors(name, ours)}"
                )
    if own.color_order != rules.color_order:
        sentences.append(f"gives {own.color_order}, these rules {rules.color_order}")

    if own.crop != rules.crop:
        sentences.append(f"gives {own.crop} x {own.crop} pixels, these rules {rules.crop}")
    if own.fit != rules.fit:
        theirs, ours = (_FITS[each.fit].format(resize=each.resize) for each in (own, rules))
        sentences.append(f"{theirs}, these rules say that it {ours}")
    elif "crop" in own.fit and own.resize != rules.resize and own.crop == rules.crop:
        sentences.append(
            f"resizes to {own.resize} before the crop, these rules to {rules.resize}"
        )
    elif own.fit == "pad" and own.background != rules.background:
        sentences.append(
            f"pads with the color {_values(own.background)}, these rules with {_values(rules.background)}"
        )

    if own.antialias != rules.antialias:
        sentences.append(
            "antialiases, these rules do not"
            if own.antialias
            else "does not antialias, these rules do"
        )
    if own.interpolation != rules.interpolation:
        sentences.append(f"is {own.interpolation}, these rules {rules.interpolation}")
    if own.exif_orientation != rules.exif_orientation:
        sentences.append(
            "turns images by EXIF, these rules do not"
            if own.exif_orientation
            else "does not turn images by EXIF, these rules do"
        )
    return tuple(sentences)


def _colors(field: str, values: tuple[float, ...]) -> str:
    """Write *values* of a *field* for pixels from 0 to 1, and whether they are for pixels from 0 to 255 instead."""
    is_divided = field != "std" or max(values) > _UNDIVIDED
    return _values(values) + ("" if is_divided else " (values are not divided by 255)")


def _values(values: tuple[float, ...]) -> str:
    """Write *values*, or one of them if all are equal."""
    shown = values[:1] if len(set(values)) == 1 else values
    return ", ".join(f"{value:.4g}" for value in shown)
