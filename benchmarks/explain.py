"""Deletion test of explanations: is the class lost without the parts of a photograph that they mark?

    python benchmarks/explain.py BUNDLE --photos DIR [--json]

The cells with the largest losses, 20 % of the image, become gray, and as many random ones, ten times. The
test counts the photographs whose class then has a lower probability than with random cells. The class is the
predicted one; no label is needed. docs/benchmarks/explain.md contains the results.
"""

import random
import time
from pathlib import Path

import numpy as np
from measure import Result, existing, make_parser, one_line_errors, report
from numpy.typing import NDArray
from PIL import Image

from sopdeploy.decision import softmax
from sopdeploy.images.occlusion import GRID, IMAGES_PER_MAP, cell_slices, occlude
from sopdeploy.images.pixels import preprocess_image
from sopdeploy.images.signatures import has_image_suffix
from sopdeploy_service.inference.loader import LoadedModel, load_model
from sopdeploy_service.settings import Settings

REMOVED = round(0.2 * GRID**2)  # cells
COUNT, DRAWS = 100, 10  # photographs, choices of random cells


def probabilities(loaded: LoadedModel, images: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Compute the probabilities (n, C) of *images*, one by one."""
    logits = loaded.bundle.manifest.outputs[0].name
    return softmax(np.concatenate([loaded.runtime.run(image[None])[logits] for image in images]))


def delete(loaded: LoadedModel, photo: Path, rng: np.random.Generator) -> NDArray[np.float64]:
    """Explain *photo*, then remove the marked cells and `DRAWS` times random ones.

    Returns the probability of its class: whole, without the marked cells, without each of the random ones.
    """
    rules = loaded.bundle.manifest.preprocess
    with Image.open(photo) as image:
        pixels = preprocess_image(image, rules)
    copies = occlude(pixels, rules)
    whole, *occluded = probabilities(loaded, np.stack([pixels, *copies]))
    best = int(whole.argmax())
    marked = np.argsort([row[best] for row in occluded])[:REMOVED]
    chosen = [marked, *(rng.choice(GRID**2, REMOVED, replace=False) for _ in range(DRAWS))]
    removed = np.repeat(pixels[None], len(chosen), axis=0)
    for target, cells in zip(removed, chosen, strict=True):
        for cell in cells:
            part = cell_slices(len(pixels), int(cell))
            target[part] = copies[cell][part]
    return np.array([whole[best], *probabilities(loaded, removed)[:, best]])


def main() -> None:
    """Run from the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("bundle", type=existing)
    parser.add_argument("--photos", type=existing, required=True, help="folder of photographs")
    given = parser.parse_args()
    photos = sorted(path for path in given.photos.rglob("*") if has_image_suffix(path.name))
    photos = random.Random(0).sample(photos, min(COUNT, len(photos)))  # noqa: S311 - not for security
    rng = np.random.default_rng(0)
    with one_line_errors():
        loaded = load_model(given.bundle, Settings(threads=1))
        started = time.process_time()
        found = np.stack([delete(loaded, photo, rng) for photo in photos])
    milliseconds = 1000 * (time.process_time() - started) / len(found) / (IMAGES_PER_MAP + 1 + DRAWS)
    whole, marked, at_random = found[:, 0], found[:, 1], found[:, 2:]
    figures = {
        "share of photographs: marked below the mean of random": marked < at_random.mean(axis=1),
        "share of photographs: marked below one random choice": marked < at_random[:, 0],
        "probability of the whole photograph": whole,
        "probability without the marked 20 %": marked,
        "probability without a random 20 %": at_random,
        "processor milliseconds per image": milliseconds,
    }
    results = [
        Result(case=case, ours=float(np.mean(value)), unit="", runs=len(found))
        for case, value in figures.items()
    ]
    report(results, as_json=given.json)


if __name__ == "__main__":
    main()
