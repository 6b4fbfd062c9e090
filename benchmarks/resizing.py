"""How far the pixels of fast_image_resize (decoding `fast`) are from Pillow's (`scaled`) on folders of photos.

For each rule: the largest difference of a value, of 255 levels; the largest mean difference of a photo; the
photos with a difference above 4; and the share of values that differ by at most 1. The limits of
`sopdeploy/images/fast_resize.py` come from here; measure them again if Pillow or cykooz-resizer change.

    python benchmarks/resizing.py FOLDER ... [--quick] [--json]
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from measure import Result, existing, make_parser, report

from sopdeploy.images.decode import decode
from sopdeploy.images.preprocess import Preprocess

SIZES = (
    (256, 224),
    (224, 224),
    (235, 224),
    (73, 64),
    (146, 128),
    (300, 260),
    (438, 384),
    (36, 32),
)
SQUASHED = ((256, 224), (73, 64))
FORMER_LIMIT = 4
LEVELS = 256


def list_rules() -> Iterable[Preprocess]:
    """Yield the rules that are measured, ten with each filter."""
    for interpolation in ("bilinear", "bicubic"):
        for fit, sizes in (("crop", SIZES), ("squash", SQUASHED)):
            for resize, crop in sizes:
                yield Preprocess.model_validate(
                    {
                        "resize": resize,
                        "crop": crop,
                        "interpolation": interpolation,
                        "fit": fit,
                        "decoding": "fast",
                    }
                )


def measure_rule(photos: Sequence[Path], fast: Preprocess) -> list[Result]:
    """Compare the pixels of all *photos* by the rules *fast* with Pillow's."""
    by_pillow = fast.model_copy(update={"decoding": "scaled"})
    counts = np.zeros(LEVELS, np.int64)  # of values, by their difference
    largest, means = [], []

    for photo in photos:
        content = photo.read_bytes()
        pixels, expected = (decode(content, rules).pixels for rules in (fast, by_pillow))
        difference = np.abs(pixels.astype(np.int16) - expected)
        counts += np.bincount(difference.ravel(), minlength=LEVELS)
        largest.append(int(difference.max()))
        means.append(float(difference.mean()))

    name = f"{fast.interpolation} {fast.resize} to {fast.crop}, {fast.fit}"
    above = sum(value > FORMER_LIMIT for value in largest)
    values = {
        "largest difference": (max(largest), "levels"),
        "largest mean of a photo": (max(means), "levels"),
        f"photos above {FORMER_LIMIT} levels": (above, "photos"),
        "values within 1 level": (100 * counts[:2].sum() / counts.sum(), "%"),
    }
    return [
        Result(case=f"{name}: {what}", ours=float(value), unit=unit, runs=len(photos))
        for what, (value, unit) in values.items()
    ]


def main() -> None:
    """Measure the photos of the folders."""
    parser = make_parser(__doc__)
    parser.add_argument("folders", nargs="+", type=existing, help="folders of JPEG files")
    parser.add_argument("--quick", action="store_true", help="every tenth photo")
    arguments = parser.parse_args()

    photos = sorted(
        path
        for folder in arguments.folders
        for path in folder.rglob("*")
        if path.suffix.lower() in (".jpg", ".jpeg")
    )[:: 10 if arguments.quick else 1]
    results = [result for rules in list_rules() for result in measure_rule(photos, rules)]
    report(results, as_json=arguments.json)


if __name__ == "__main__":
    main()
