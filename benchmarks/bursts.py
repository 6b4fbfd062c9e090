"""Accuracy of the head of `train` on folders with copies, of which the groups are known.

    python benchmarks/bursts.py --photos DIR --cache DIR --weights FILE [--draws 8]

DIR has <set>/<class>/<photograph>, or <set>/<class>/<object>-track-<frame> of clips. Twelve photographs or objects
of each class may train, the others are the test. Features are computed once and kept in --cache; then only heads are
fitted.

`none`: eight photographs a class; `control`: twelve, seven of one class; `burst19`: the same with 19 more frames of
one of the seven; `even`: eight, three more frames of each; `exports`: three augmented versions of each of eight
instead of it; `some`: four more frames of every other one; `each`: 5 to 19 more frames of one photograph of every
class. Of clips: `singles`: a frame of six objects; `clip`: ten frames of one of them; `clips`: 1, 2, 4 or 10 of each.
"""

import json
import sys
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from measure import make_parser
from photo_vectors import FOLDS, join_vectors, open_network, read_batches
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from scipy.special import log_softmax

from sopdeploy.photos.evaluation_images import open_any_images
from sopdeploy.training.few_shot.classifier import LinearProblem, Space, unit_length
from sopdeploy.training.few_shot.cross_validation import make_folds
from sopdeploy.training.few_shot.scaling import Scaling
from sopdeploy.training.few_shot.score import estimate_score
from sopdeploy.training.few_shot.targets import Targets

OF_PHOTOS = (
    "none",
    "control",
    "burst3",
    "burst8",
    "burst19",
    "even",
    "exports",
    "some",
    "each",
)
OF_CLIPS = ("singles", "clip", "clips")
NUM_POOL = 12
NUM_FRAMES = 5


def change(image: Image.Image, kind: str, source: Random) -> Image.Image:
    """Make a frame of a `burst`, or the version of a tool that augments (`export`)."""
    if kind == "export":
        image = image.resize((416, 416)).rotate(source.uniform(-15, 15))
        image = ImageEnhance.Color(image).enhance(source.uniform(0.75, 1.25))
        return ImageOps.mirror(image) if source.random() < 0.5 else image

    side, rise = round(image.width * 0.95), round(image.height * 0.95)
    x, y = source.randint(0, image.width - side), source.randint(0, image.height - rise)
    image = image.crop((x, y, x + side, y + rise))
    image = ImageEnhance.Brightness(image).enhance(source.uniform(0.85, 1.18))
    blur = source.uniform(0, 0.004) * max(image.size)
    return image.filter(ImageFilter.GaussianBlur(blur))


def write_copies(photos: Path, folder: Path) -> None:
    """Write the photographs of a set and the copies of those that may train, numbered by photograph."""
    for label in sorted(photos.iterdir()):
        (folder / label.name).mkdir(parents=True, exist_ok=True)
        files = sorted(label.iterdir())
        if not any("-track-" in file.name for file in files):
            Random(1).shuffle(files)  # noqa: S311
        for number, file in enumerate(files):
            image = Image.open(file).convert("RGB")
            if "-track-" in file.name:
                image.save(folder / label.name / file.name)
                continue
            image.save(folder / label.name / f"{number:02d}-track-0.jpg", quality=95)
            for kind, count in (
                (("burst", NUM_FRAMES), ("export", 3)) if number < NUM_POOL else ()
            ):
                for copy in range(count):
                    source = Random(f"{label.name}{number}{kind}{copy}")  # noqa: S311
                    name = f"{number:02d}-{kind}-{copy}.jpg"
                    change(image, kind, source).save(folder / label.name / name, quality=90)


def read_set(photos: Path, cache: Path, weights: Path) -> dict[str, Any]:
    """Read or compute the vectors of a set, and what the names of its files tell."""
    stored = cache / f"{photos.name}.npz"
    if not stored.exists():
        folder = cache / "images" / photos.name
        write_copies(photos, folder)
        network, images = open_network(weights), open_any_images(folder)
        batches = read_batches(network, images)
        names = [images.identity(index) for index in range(len(images))]
        columns = [(part.start, part.stop) for part in network.network.pooled_head.columns()]
        vectors = join_vectors(network, batches, batches)
        np.savez(stored, vectors=vectors, names=names, columns=columns)

    content = np.load(stored)
    labels, files = np.char.partition(content["names"], "/")[:, ::2].T
    parts = np.asarray([Path(file).stem.split("-") for file in files.tolist()])
    return {
        "vectors": content["vectors"],
        "columns": [slice(*bounds) for bounds in content["columns"].tolist()],
        "classes": np.unique(labels, return_inverse=True)[1],
        "numbers": parts[:, 0].astype(int),
        "kinds": parts[:, 1],
        "frames": parts[:, 2].astype(int),
    }


def draw(photos: dict[str, Any], design: str, random: np.random.Generator) -> tuple[Any, Any]:
    """Draw the images (n,) of a *design*, and their groups (n,)."""
    rows: list[int] = []
    groups: list[int] = []
    num_classes = int(photos["classes"].max()) + 1
    uneven = int(random.integers(num_classes))

    def add(label: int, number: int, more: int = 0, kind: str = "burst") -> None:
        of_photo = (photos["classes"] == label) & (photos["numbers"] == number)
        found = np.flatnonzero(of_photo & (photos["kinds"] == kind) & (photos["frames"] < 10))
        single = np.flatnonzero(
            of_photo & (photos["kinds"] == "track") & (photos["frames"] == 0)
        )
        if kind == "track":
            single = found[:more]
        elif more:
            single = np.concatenate(
                [single[: kind == "burst"], found[np.arange(more) % len(found)]]
            )
        rows.extend(single.tolist())
        groups.extend([label * 100 + number] * len(single))

    for label in range(num_classes):
        for place, number in enumerate(random.permutation(NUM_POOL).tolist()):
            is_first = place == 0
            if design == "control" or design.startswith("burst"):
                if label != uneven or place < 7:
                    is_burst = design != "control" and label == uneven and is_first
                    add(label, number, int(design[5:]) if is_burst else 0)
            elif design in OF_CLIPS and place < 6:
                frames = {"singles": 1, "clip": 10 if label == uneven and is_first else 1}
                add(
                    label,
                    number,
                    frames.get(design, int(random.choice([1, 2, 4, 10]))),
                    "track",
                )
            elif design not in OF_CLIPS and place < 8:
                more = {"even": 3, "exports": 3, "some": 4 * (place % 2)}.get(design, 0)
                if design == "each" and is_first:
                    more = int(random.integers(5, 20))
                add(label, number, more, "export" if design == "exports" else "burst")
    order = random.permutation(len(rows))
    return np.asarray(rows)[order], np.unique(groups, return_inverse=True)[1][order]


def measure(photos: dict[str, Any], design: str, seed: int) -> dict[str, float]:
    """Fit a head to a draw, and test it."""
    rows, groups = draw(photos, design, np.random.default_rng(seed))
    classes, vectors = photos["classes"], photos["vectors"]
    targets = Targets(np.eye(classes.max() + 1)[classes[rows]], classes[rows], "softmax")
    parts = [vectors[rows][:, part] for part in photos["columns"]]
    space = Space.of(parts)
    own = unit_length(parts[0])
    problem = LinearProblem(space, space.project(vectors[rows]), own, targets, 1.0, groups)

    folds = make_folds(targets, [str(group) for group in groups.tolist()], FOLDS, seed)
    validations = [problem.cross_validate(one) for one in folds]
    scaling = Scaling.fit(validations, targets, has_margins=True)
    judged = np.unique(groups, return_index=True)[1]
    logits = problem.logits(validations[0], scaling)[judged]
    number = int(folds[0].max()) + 1
    score: Any = estimate_score(
        targets.classes[judged], "softmax", logits, seed, groups[judged], number
    )

    test = np.flatnonzero(photos["numbers"] >= NUM_POOL)
    logits = problem.fit_all(scaling).logits(vectors[test])
    accuracy = float((logits.argmax(axis=1) == classes[test]).mean())
    losses = -log_softmax(logits, axis=1)[np.arange(len(test)), classes[test]]
    return {
        "accuracy": 100 * accuracy,
        "printed": 100 * score.share,
        "holds": 100.0 * (score.low <= accuracy <= score.high),
        "log loss": float(losses.mean()),
    }


def main(arguments: list[str]) -> int:
    """Print a line of means for each set and design."""
    parser = make_parser(__doc__)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--draws", type=int, default=8)
    given = parser.parse_args(arguments)
    for folder in sorted(given.photos.iterdir()):
        photos = read_set(folder, given.cache, given.weights)
        is_clips = (photos["frames"][photos["numbers"] >= NUM_POOL] == 0).all() and not (
            photos["kinds"] == "burst"
        ).any()
        for design in OF_CLIPS if is_clips else OF_PHOTOS:
            draws = [measure(photos, design, seed) for seed in range(given.draws)]
            means = {
                key: round(float(np.mean([one[key] for one in draws])), 3) for key in draws[0]
            }
            print(json.dumps({"set": folder.name, "design": design, **means}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
