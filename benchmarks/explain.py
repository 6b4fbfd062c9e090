"""Deletion test of explanations: is the class lost without the parts of a photograph that they mark?

    python benchmarks/explain.py BUNDLE --photos DIR [--count 100] [--draws 10] [--json]

The cells with the largest losses, 20 % of the image, become gray, and as many random ones, --draws times. The
test counts the photographs whose class then has a lower probability than with random cells. The class is the
predicted one; no label is needed. docs/benchmarks/explain.md contains the results.
"""

import random
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from measure import Result, existing, make_parser, one_line_errors, report
from numpy.typing import NDArray
from PIL import Image

from sopdeploy.data.folders import is_image
from sopdeploy.decision import softmax
from sopdeploy.evaluation.metrics import Rate
from sopdeploy.images.occlusion import GRID, cell_slices, occlude
from sopdeploy.images.pixels import preprocess_image
from sopdeploy_service.inference.loader import LoadedModel, load_model
from sopdeploy_service.settings import Settings

REMOVED = round(0.2 * GRID**2)  # cells


class Deletion(NamedTuple):
    """Probability of the class of one photograph: whole, without the marked cells, without random ones."""

    whole: float
    marked: float
    at_random: NDArray[np.float64]


def probabilities(loaded: LoadedModel, images: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Compute the probabilities (n, C) of *images*, one by one."""
    logits = loaded.bundle.manifest.outputs[0].name
    return softmax(np.concatenate([loaded.runtime.run(image[None])[logits] for image in images]))


def delete(loaded: LoadedModel, photo: Path, draws: int, rng: np.random.Generator) -> Deletion:
    """Explain *photo*, then remove the marked cells and *draws* times random ones."""
    rules = loaded.bundle.manifest.preprocess
    with Image.open(photo) as image:
        pixels = preprocess_image(image, rules)
    copies = occlude(pixels, rules)
    whole, *occluded = probabilities(loaded, np.stack([pixels, *copies]))
    best = int(whole.argmax())
    marked = np.argsort([row[best] for row in occluded])[:REMOVED]
    chosen = [marked, *(rng.choice(GRID**2, REMOVED, replace=False) for _ in range(draws))]
    removed = np.repeat(pixels[None], len(chosen), axis=0)
    for target, cells in zip(removed, chosen, strict=True):
        for cell in cells:
            part = cell_slices(len(pixels), int(cell))
            target[part] = copies[cell][part]
    left = probabilities(loaded, removed)[:, best]
    return Deletion(float(whole[best]), float(left[0]), left[1:])


def main() -> None:
    """Run from the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("bundle", type=existing)
    parser.add_argument("--photos", type=existing, required=True, help="folder of photographs")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--draws", type=int, default=10)
    given = parser.parse_args()
    photos = sorted(path for path in given.photos.rglob("*") if is_image(path.name))
    photos = random.Random(0).sample(photos, min(given.count, len(photos)))  # noqa: S311 - not for security
    rng = np.random.default_rng(0)
    with one_line_errors():
        loaded = load_model(given.bundle, Settings(threads=1))
        started = time.process_time()
        found = [delete(loaded, photo, given.draws, rng) for photo in photos]
    milliseconds = 1000 * (time.process_time() - started) / len(found) / (1 + GRID**2 + 1 + given.draws)
    lower = Rate.of(sum(one.marked < one.at_random.mean() for one in found), len(found))
    single = Rate.of(sum(one.marked < one.at_random[0] for one in found), len(found))
    values = {
        "marked below the mean of random": (100 * lower.share, "%"),
        "marked below the mean of random, interval from": (100 * lower.low, "%"),
        "marked below one random choice": (100 * single.share, "%"),
        "probability of the whole photograph": (np.mean([one.whole for one in found]), ""),
        "probability without the marked 20 %": (np.mean([one.marked for one in found]), ""),
        "probability without a random 20 %": (np.mean([one.at_random for one in found]), ""),
        "time per image": (milliseconds, "cpu-ms"),
    }
    results = [
        Result(case=case, ours=float(value), unit=unit, runs=len(found))
        for case, (value, unit) in values.items()
    ]
    report(results, as_json=given.json)


if __name__ == "__main__":
    main()
