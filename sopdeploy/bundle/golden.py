"""Golden examples: JPEG files with the pixels and logits that they give, for programs in other languages.

`golden.json` lists the examples; `golden-0.jpg` is a file as a client sends it, and
`golden-0.rgb` has its pixels after preprocessing, (crop, crop, 3) uint8 in row-major order. A
program that decodes and resizes as `Preprocess` does gets these pixels within one gray level
(with the decoding "fast" as `fast_resize` says), and from these pixels the logits within
`tolerance`. `versions.pillow` of the manifest is the version of Pillow that computed the pixels.
The folder deploy/samples has such programs.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import PIL
import pydantic
from numpy.typing import NDArray
from PIL import Image

from sopdeploy.base.config import StrictModel, Text, version_advice
from sopdeploy.base.names import MAX_CLASSES
from sopdeploy.bundle.folder import Bundle
from sopdeploy.bundle.logit_ranges import (
    SMALLEST,
    LogitRanges,
    absolute_errors,
    beyond_rounding,
)
from sopdeploy.bundle.manifest import GATES, to_json
from sopdeploy.bundle.probes import read_probes
from sopdeploy.errors import BundleError, ParityError
from sopdeploy.images import fast_resize
from sopdeploy.images.decode import decode
from sopdeploy.images.pixels import ORIENTATION
from sopdeploy.images.preprocess import Preprocess

GOLDEN = "golden.json"
MAX_EXAMPLES = 4
# Limit in tolerances of the probes: an example compares two runtimes, and each may be one off
# the network.
TOLERANCES = 2
MAX_LEVELS = 1  # gray levels between decoders
_SEED = 11
# pixels per random color
CELL = 8
LARGE_CELL = 12
# Shorter side of the large example relative to `resize`, and its orientation
LARGE = 5
TURNED = 6
MAX_LARGE_RESIZE = 640  # of 13 megapixels; rules that resize to more have no large example

RunOne = Callable[[NDArray[np.uint8]], NDArray[np.float32]]  # (H, W, 3) to logits (C,)


class GoldenExample(StrictModel):
    """The names of the files of one example, and its logits (C,), with `SMALLEST` for minus infinity."""

    jpeg: Text
    pixels: Text
    logits: Annotated[tuple[float, ...], pydantic.Field(min_length=1, max_length=MAX_CLASSES)]


class GoldenIndex(StrictModel):
    """Content of `golden.json`; *tolerance* is the largest allowed absolute difference of a logit."""

    tolerance: Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)]
    examples: Annotated[tuple[GoldenExample, ...], pydantic.Field(max_length=MAX_EXAMPLES)]


@dataclass(frozen=True, slots=True)
class Golden:
    """One example: the JPEG file, its pixels (H, W, 3) uint8, logits (C,) and their tolerance."""

    name: str
    jpeg: bytes
    pixels: NDArray[np.uint8]
    logits: NDArray[np.float32]
    tolerance: float


def count_examples(preprocess: Preprocess) -> int:
    """Return the number of examples of an export; a mixture may leave out some of them."""
    return 4 if preprocess.decoding != "full" and preprocess.resize <= MAX_LARGE_RESIZE else 3


def draw_jpegs(preprocess: Preprocess) -> list[bytes]:
    """Draw JPEGs from a fixed seed: a wide one with 4:2:0, a tall one that is enlarged, and a gray one.

    If JPEGs are decoded at a smaller scale, a fourth one is large and turned, so that its pixels
    tell at which scale a program decodes.
    """
    random = np.random.default_rng(_SEED)
    side = preprocess.resize

    # JPEGs in which decoders and resizing differ: width, height, mode, and how much fewer samples
    # the chroma has (2: 4:2:0).
    files = []
    large = LARGE * side
    turned = Image.Exif()
    turned[ORIENTATION] = TURNED
    sizes = [
        # A wide image; with 7 more rows, the last JPEG blocks are incomplete.
        (side * 3 // 2, side + 7, "RGB", 2),
        # A tall image, whose shorter side is enlarged to `resize`.
        (max(1, side * 3 // 4), side, "RGB", 0),
        (side, side * 5 // 4, "L", 0),  # gray
        (large * 5 // 4, large + 7, "RGB", 2),  # the large one; `count_examples` may exclude it
    ]

    # Few random cells of color, enlarged, so that resizing has something to do; then the JPEG.
    for width, height, mode, subsampling in sizes[: count_examples(preprocess)]:
        is_large = height > large  # of the fourth one only
        cell = LARGE_CELL if is_large else CELL
        cells = (height // cell + 2, width // cell + 2)  # rows and columns, at least 2
        coarse = random.integers(
            0, 256, (*cells, 3) if mode == "RGB" else cells, dtype=np.uint8
        )

        image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        file = io.BytesIO()
        options: dict[str, Any] = {"quality": 90}
        if is_large:
            options = {"quality": 60, "exif": turned}
        image.save(file, "JPEG", subsampling=subsampling, **options)
        files.append(file.getvalue())
    return files


def write_golden(
    folder: Path,
    preprocess: Preprocess,
    run: RunOne,
    tolerance: float,
    usable: Callable[[NDArray[np.uint8]], bool] = lambda _: True,
) -> None:
    """Write the examples with *usable* pixels into *folder*.

    *run* computes logits with the exported file; *tolerance* is how far those of another program
    may deviate from them.
    """
    examples = []

    for number, body in enumerate(draw_jpegs(preprocess)):
        pixels = decode(body, preprocess).pixels
        if not usable(pixels):
            continue

        jpeg = f"golden-{number}.jpg"
        raw = f"golden-{number}.rgb"
        (folder / jpeg).write_bytes(body)
        (folder / raw).write_bytes(pixels.tobytes())

        logits = tuple(float(value) for value in run(pixels).clip(min=SMALLEST))
        examples.append(GoldenExample(jpeg=jpeg, pixels=raw, logits=logits))

    index = GoldenIndex(tolerance=tolerance, examples=tuple(examples))
    (folder / GOLDEN).write_bytes(to_json(index.model_dump(mode="json")))


def read_golden(bundle: Bundle) -> tuple[Golden, ...]:
    """Read the examples of *bundle*; raises `BundleError` for files that do not fit it."""
    manifest = bundle.manifest
    examples = list[Golden]()

    # A mixture may have fewer examples.
    is_mixture = any(output.name == GATES for output in manifest.outputs)

    # The files of the examples have the shapes of the manifest.
    try:
        index = GoldenIndex.model_validate_json(bundle.contents[GOLDEN])
        for example in index.examples:
            pixels = np.frombuffer(bundle.contents[example.pixels], np.uint8).reshape(
                manifest.image_shape
            )
            logits = np.array(example.logits, np.float32).reshape(len(bundle.labels))
            golden = Golden(
                name=example.jpeg,
                jpeg=bundle.contents[example.jpeg],
                pixels=pixels,
                logits=logits,
                tolerance=index.tolerance,
            )
            examples.append(golden)

        logit_tolerance = read_probes(bundle).tolerance[manifest.outputs[0].name]
        # With a larger tolerance, a wrong runtime could pass.
        is_strict = index.tolerance <= TOLERANCES * logit_tolerance
        fits = is_strict and (
            is_mixture or len(examples) == count_examples(manifest.preprocess)
        )
    except (KeyError, ValueError):
        fits = False

    if not fits:
        advice = (
            version_advice(manifest.versions.get("sopdeploy")) or "; export the bundle again"
        )
        raise BundleError(f"{bundle.path / GOLDEN}: does not fit the bundle{advice}")
    return tuple(examples)


def check_golden(
    example: Golden,
    pixels: NDArray[np.uint8],
    run: RunOne,
    exporter: str | None,
    preprocess: Preprocess,
) -> tuple[int, bool]:
    """Compare *pixels* that were decoded here with those of *example*, and its logits with those of *run*.

    Returns by how many of 255 levels the pixels differ at most, and whether they change the class.

    *run* gets the pixels of the example. *exporter* is the version of Pillow that the export
    used, if it is known. Raises `ParityError` for logits outside of the tolerance, and for pixels that
    differ by more than `MAX_LEVELS`, as another version may compute them. With the decoding "fast" of
    *preprocess*, they may differ as Pillow and fast_image_resize do on photos, because one of the two
    machines may lack the latter.
    """
    logits = run(example.pixels).clip(min=SMALLEST)
    masked_rounding = LogitRanges.of(example.logits[None]).masked_rounding
    errors = absolute_errors(logits, example.logits)
    deviation = float(beyond_rounding(errors, masked_rounding, example.tolerance).max())
    if not deviation <= example.tolerance:  # larger, or NaN
        raise ParityError(
            f"{example.name}: a logit deviates by {deviation:.3g}, but the bound is "
            f"{example.tolerance:.3g}; this runtime does not compute the exported "
            "network"
        )

    differences = np.abs(pixels.astype(np.int16) - example.pixels)
    levels = int(differences.max())
    limit: float = MAX_LEVELS
    mean_limit: float = MAX_LEVELS
    if preprocess.decoding == "fast":
        limit = fast_resize.MAX_LEVELS[preprocess.interpolation]
        mean_limit = fast_resize.MAX_MEAN_LEVELS
    if levels > limit or differences.mean() > mean_limit:
        raise ParityError(
            f"{example.name}: its pixels differ by {levels} gray levels, because Pillow "
            f"{PIL.__version__} decodes or resizes differently than "
            f"{f'Pillow {exporter}' if exporter else 'the version'}, which the export used; install "
            "the wheel of this version from PyPI, or export the bundle again"
        )
    is_changed = levels > 0 and run(pixels).argmax() != example.logits.argmax()
    return levels, bool(is_changed)
