"""Estimates of `train` on folders with clips, against photographs of other objects.

    python benchmarks/clips.py --photos NAME=TRAIN,TEST --model NAME --weights FILE --cache DIR
        [--draws 3] [--first 0] [--json]

--photos may be repeated; TRAIN and TEST are folders <class>/*.jpg. A draw takes three classes of TRAIN with
at least 20 photographs. Some photographs of each become clips, others stay single (`CELLS`). Three draws have
the three cameras, and clips of 4, 12 and 30 frames, each photographs in another order:

- panning: a window of 70 % of each side moves from one side of the photograph to the other;
- zooming: a window in the middle shrinks from all to 60 % of each side;
- static: windows of 95 % of each side, shifted at random; brightness 0.95 to 1.05.

Each run is `sopdeploy train` with default options; the cache of features is in --cache. "single" are the same
photographs with one frame of each clip: what remains there of the difference between the printed accuracy and
that on the photographs of these classes in TEST is no effect of clips. "grouped wrongly" counts frames and
photographs in a group with another photograph, "pairs" the pairs of different photographs in one group,
"divided" clips in several groups. "named" are the classes of fewer than three objects for which `train` says
so. Finished runs in --cache are not repeated. Exit status 1: for a camera, a number of frames or a cell, more
than 1 % grouped wrongly, or a difference of more than 3 points; or a class that is not named.
"""

import argparse
import io
import json
import os
import random
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from copied_photos import count_errors, draws_parser, parse_draws, test_logits, train_on
from measure import Result, keep_draw, one_line_errors, report
from PIL import Image, ImageEnhance, ImageOps

from sopdeploy.errors import DataError
from sopdeploy.evaluation.statistics import student
from sopdeploy.training.few_shot.state import FewShotFit
from sopdeploy.training.results import FewShotResult

CAMERAS, FRAMES = ("panning", "zooming", "static"), (4, 12, 30)
CLASSES, POOL, CLIPS = 3, 20, 10  # photographs of a class, and how many of them can become clips
SIDE = 400  # pixels of the shorter side of a frame, at most


class Cell(NamedTuple):
    """Clips and single photographs of each class; *single*: one frame of each clip."""

    clips: int
    photographs: int
    single: bool = False

    def __str__(self) -> str:
        """Name the cell as the report does."""
        of_clips = "single" if self.single else "clips"
        return f"{self.clips} {of_clips} and {self.photographs} photographs"


CELLS = [Cell(*one) for one in ((1, 0), (2, 0), (3, 0), (10, 0), (1, 10), (3, 10), (10, 10))]
CELLS += [Cell(*one, single=True) for one in ((3, 0), (10, 0), (10, 10))]


def write_frame(image: Image.Image, camera: str, time: float, source: random.Random) -> bytes:
    """Encode the frame of a clip of *image* at *time*, 0 to 1, as JPEG."""
    share = {"panning": 0.7, "zooming": 1 - 0.4 * time, "static": 0.95}[camera]
    x, y = {"panning": (time, 0.5), "zooming": (0.5, 0.5)}.get(camera, (source.random(), source.random()))
    width, height = image.size
    left, top = x * (1 - share) * width, y * (1 - share) * height
    scale = min(1, SIDE / (share * min(width, height)))
    size = [max(8, round(scale * share * side)) for side in image.size]
    frame = image.resize(size, box=(left, top, left + share * width, top + share * height))
    if camera == "static":
        frame = ImageEnhance.Brightness(frame).enhance(source.uniform(0.95, 1.05))
    file = io.BytesIO()
    frame.save(file, "JPEG", quality=88)
    return file.getvalue()


def draw(train: Path, folder: Path, cell: Cell, camera: str, frames: int, seed: int) -> list[str]:
    """Write the photographs of a draw into *folder*; return its classes. Draws of all cells are nested."""
    source = random.Random(seed)  # noqa: S311  # not a secret
    large = [path.name for path in sorted(train.iterdir()) if len(list(path.iterdir())) >= POOL]
    if len(large) < CLASSES:
        raise DataError(f"{train}: {len(large)} classes of {POOL} photographs; give {CLASSES}")
    labels = source.sample(large, CLASSES)
    for label in labels:
        (folder / label).mkdir(parents=True)
        chosen = source.sample(sorted((train / label).iterdir()), POOL)
        for path in chosen[: cell.clips]:
            image, own = ImageOps.exif_transpose(Image.open(path)).convert("RGB"), random.Random(path.name)  # noqa: S311
            for number in range(1 if cell.single else frames):
                content = write_frame(image, camera, number / (frames - 1), own)
                (folder / label / f"{path.stem}~{number}.jpg").write_bytes(content)
        for path in chosen[CLIPS : CLIPS + cell.photographs]:
            (folder / label / path.name).symlink_to(path.resolve())
    return sorted(labels)


@torch.no_grad()
def run_draw(given: argparse.Namespace, name: str, cell: Cell, seed: int) -> "Run":
    """Train on one draw and test; results are cached."""
    place = list(given.photos).index(name)
    camera, frames = CAMERAS[seed % 3], FRAMES[(seed + seed // 3 + place) % 3]
    path: Path = given.cache / f"{name}, {cell}, {camera}, {frames} frames, {seed}.json"
    if path.exists():
        return Run(name, cell, camera, frames, json.loads(path.read_text()))
    train, test = given.photos[name]
    folder, run = given.cache / "images", given.cache / "run"
    for previous in (folder, run):
        shutil.rmtree(previous, ignore_errors=True)
    labels = draw(train, folder, cell, camera, frames, seed)
    with torch.enable_grad():
        fit = train_on(given, folder, run).fit
    if not isinstance(fit, FewShotFit) or not isinstance(fit.result, FewShotResult):
        raise DataError(f"{train}: not trained by the few-shot procedure; give fewer photographs")
    result, score = fit.result, fit.result.top1
    logits, targets = test_logits(run / "best.pt", test, given.model, given.cache / f"{name}.pt")
    classes = sorted(one.name for one in test.iterdir())
    numbers = torch.tensor([labels.index(one) if one in labels else -1 for one in classes])[targets]
    right = (logits.argmax(dim=1) == numbers)[numbers >= 0]
    wrong, divided = count_errors(folder, fit.groups)
    files = sorted(folder.glob("*/*"))
    photographs = [f"{file.parent.name}/{file.stem.split('~')[0]}" for file in files]
    members = [Counter(np.asarray(photographs)[fit.groups == group]) for group in np.unique(fit.groups)]
    mixed = [group for group in members if len(group) > 1]
    pairs = sum(sum(group.values()) ** 2 - sum(n**2 for n in group.values()) for group in mixed)
    all_pairs = len(files) ** 2 - sum(n**2 for n in Counter(photographs).values())
    measured = {
        "accuracy": 100 * float(right.double().mean()),
        "estimate": None if score is None else 100 * score.share,
        "inside": None if score is None else score.low <= float(right.double().mean()) <= score.high,
        "images": len(files),
        "images grouped wrongly": sum(sum(group.values()) for group in mixed),
        "photographs grouped wrongly": 100 * wrong,
        "pairs": 100 * pairs / all_pairs,
        "divided": 100 * divided,
        "named": len({*result.one_group, *result.two_groups, *result.alike}.intersection(labels)),
    }
    keep_draw(path, measured)
    return Run(name, cell, camera, frames, measured)


class Run(NamedTuple):
    """A finished draw: its photographs, cell, camera, frames, and what was measured."""

    name: str
    cell: Cell
    camera: str
    frames: int
    measured: dict[str, Any]


def summarize(case: str, runs: list[Run]) -> tuple[list[Result], bool]:
    """Compute the rows of *runs*, and whether they keep the limits."""
    measured = [run.measured for run in runs]
    printed = [one for one in measured if one["estimate"] is not None]
    grouped = 100 * sum(one["images grouped wrongly"] for one in measured)
    values = {
        "grouped wrongly": (grouped / sum(one["images"] for one in measured), "% of images"),
        "pairs": (float(np.mean([one["pairs"] for one in measured])), "%"),
        "divided": (float(np.mean([one["divided"] for one in measured])), "% of photographs"),
    }
    error = 0.0
    if printed:
        errors = np.asarray([one["estimate"] - one["accuracy"] for one in printed])
        error = float(errors.mean())
        values |= {
            "accuracy": (float(np.mean([one["accuracy"] for one in printed])), "%"),
            "printed": (float(np.mean([one["estimate"] for one in printed])), "%"),
            "printed minus accuracy": (error, "points"),
            **(
                {"half of its 95 % interval": (error - student(errors.tolist()).low, "points")}
                if len(errors) > 1
                else {}
            ),
            "intervals that contain the accuracy": (100 * np.mean([one["inside"] for one in printed]), "%"),
        }
    few = [run for run in runs if run.cell.clips + run.cell.photographs < 3]
    if few:
        values["named"] = (
            100 * sum(run.measured["named"] for run in few) / CLASSES / len(few),
            "% of classes",
        )
    results = [
        Result(case=f"{case}, {name}", ours=value, unit=unit, runs=len(printed if "p" in unit else runs))
        for name, (value, unit) in values.items()
    ]
    passed = abs(error) <= 3 and values["grouped wrongly"][0] <= 1
    return results, passed and values.get("named", (100.0, ""))[0] == 100


def main(arguments: list[str]) -> int:
    """Run the benchmark and return the exit status."""
    parser = draws_parser(__doc__)
    parser.add_argument("--photos", action="append", required=True, help="NAME=TRAIN,TEST: two folders")
    given = parse_draws(parser, arguments)
    parts = [one.partition("=") for one in given.photos]
    given.photos = {name: [Path(path) for path in folders.split(",")] for name, _, folders in parts}
    runs, results, passed = [], [], True
    with one_line_errors():
        for seed in given.seeds:  # a stopped benchmark has measured all photographs and cells
            for name in given.photos:
                runs += [run_draw(given, name, cell, seed) for cell in CELLS]
    keys: list[Callable[[Run], Any]] = [
        lambda run: str(run.cell),
        lambda run: run.camera,
        lambda run: f"{run.frames} frames",
        lambda run: run.name,
    ]
    for number, key in enumerate(keys):
        chosen = [run for run in runs if not number or not run.cell.single]
        for case in dict.fromkeys(map(key, chosen)):
            rows, kept = summarize(case, [run for run in chosen if key(run) == case])
            results += rows
            passed &= kept
    report(results, as_json=given.json, threads=os.environ.get("OMP_NUM_THREADS", "all"))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
