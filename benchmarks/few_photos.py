"""Accuracy of `train` with few photographs per class, against logistic regression on the averages.

    python benchmarks/few_photos.py --data DIR --test DIR --model NAME --weights FILE --cache DIR
        [--unknown DIR] [--json]

--data and --test are folders of photographs, <class>/*.jpg. Each draw takes --sizes photographs per class
from --data. Both arms see the same ones and are tested on all photographs in --test:

- ours: `sopdeploy train` with default options;
- probe: scikit-learn's LogisticRegression(C=0.01) on the standardized vectors that the network's own
  classifier reads.

Intervals are Student's 95 % intervals of the paired difference over draws; for the mean over sizes, the draws
of all sizes with the same number are averaged first. "estimate minus test" compares the printed estimate with
the accuracy on the test photographs. With --unknown, photographs of other classes, <folder>/*.jpg, AUROC
compares the scores of --test with theirs ("far"); "near" is the AUROC that `train` records, of heads that
were fitted without one class. Finished draws in --cache are not repeated. Exit status 1: ours is not
better by 1.5 points on average with an interval above 0, or worse than the probe at a size.
"""

import argparse
import copy
import json
import os
import random
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import Result, make_parser, one_line_errors, report
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from sopdeploy.checkpoint import build_classifier, load_plain, read_checkpoint, write_plain
from sopdeploy.data.base import PreprocessedDataset
from sopdeploy.data.batches import load_batches, sequential_batches
from sopdeploy.data.datasets.layouts import open_evaluation_images
from sopdeploy.decision import Score, known_score
from sopdeploy.errors import DataError
from sopdeploy.evaluation.metrics import Rate
from sopdeploy.evaluation.statistics import paired
from sopdeploy.layers.normalize import Normalize
from sopdeploy.models.registry import with_head
from sopdeploy.models.second_order_head import HeadConfig, PooledHead, SecondOrderHead
from sopdeploy.training.loop import train
from sopdeploy.training.recipe import read_recipe

BATCH = 16
GAIN = 1.5  # points that the mean over sizes must exceed the probe by


def draw(data: Path, folder: Path, size: int, seed: int) -> None:
    """Link *size* photographs of each class of *data* into *folder*."""
    source = random.Random(1000 * size + seed)  # noqa: S311  # not a secret
    for label in sorted(path for path in data.iterdir() if path.is_dir()):
        images = sorted(label.iterdir())
        if len(images) < size:
            raise DataError(f"{label}: {len(images)} photographs, {size} are needed; give smaller --sizes")
        (folder / label.name).mkdir(parents=True)
        for image in source.sample(images, size):
            (folder / label.name / image.name).symlink_to(image.resolve())


@torch.no_grad()
def head_inputs(checkpoint: Path, folder: Path, name: str, cache: Path | None) -> dict[str, Any]:
    """Compute the vectors and feature maps of the photographs in *folder*, with their targets."""
    if cache is not None and cache.exists():
        return dict(load_plain(cache))
    content = read_checkpoint(checkpoint)
    model = build_classifier(content, checkpoint)
    taps = tuple(model.tap_channels)[-2:]
    network = with_head(name, model, HeadConfig(kind="gap+mean", taps=taps)).eval()
    assert isinstance(network, SecondOrderHead)  # noqa: S101  # by its name
    images = open_evaluation_images(
        folder, tuple(sorted(path.name for path in folder.iterdir() if path.is_dir()))
    )
    normalize, parts = Normalize(content.preprocess), []
    dataset = PreprocessedDataset(images, content.preprocess)
    for pixels, _ in load_batches(dataset, sequential_batches(len(images), BATCH), 0, torch.device("cpu")):
        parts.append(network.head_inputs(normalize(pixels)))
    inputs = {
        "own": torch.cat([own for own, _ in parts]),
        "maps": {tap: torch.cat([maps[tap] for _, maps in parts]) for tap in taps},
        "targets": torch.from_numpy(images.targets),
    }
    if cache is not None:
        write_plain(cache, inputs)
    return inputs


@torch.no_grad()
def run_draw(given: argparse.Namespace, size: int, seed: int) -> dict[str, float]:
    """Train on one draw and test both arms; results are cached."""
    path: Path = given.cache / f"{size}-{seed}.json"
    if path.exists():
        return dict(json.loads(path.read_text()))
    folder, run = given.cache / f"images-{size}-{seed}", given.cache / f"run-{size}-{seed}"
    for previous in (folder, run):
        shutil.rmtree(previous, ignore_errors=True)
    draw(given.data, folder, size, seed)
    settings = [f"data.path={folder}", f"model.name={given.model}", f"start.weights={given.weights}"]
    since = time.process_time()
    with torch.enable_grad():
        result = train(read_recipe("photos", settings), run)
    seconds = time.process_time() - since
    if result.few_shot is None or result.few_shot.top1 is None:
        raise DataError(f"{given.data}: too many photographs for the few-shot procedure")
    test = head_inputs(result.best, given.test, given.model, given.cache / "test.pt")
    seen = head_inputs(result.best, folder, given.model, None)
    model = build_classifier(read_checkpoint(result.best), result.best)
    if not isinstance(model, SecondOrderHead):
        raise DataError(f"{result.best}: the network has no second-order head")
    logits = model.pooled_head(test["own"], test["maps"])
    scaler = StandardScaler().fit(seen["own"].numpy())
    probe = LogisticRegression(C=0.01, max_iter=2000)
    probe.fit(scaler.transform(seen["own"].numpy()), seen["targets"].numpy())
    targets = test["targets"].numpy()
    score: Rate = result.few_shot.top1
    measured: dict[str, Any] = {
        "ours": 100 * float((logits.argmax(dim=1).numpy() == targets).mean()),
        "probe": 100 * float(np.mean(probe.predict(scaler.transform(test["own"].numpy())) == targets)),
        "estimate": 100 * score.share,
        "low": 100 * score.low,
        "high": 100 * score.high,
        "cpu_seconds": seconds,
        "head": next(candidate.name for candidate in result.few_shot.candidates if candidate.kept),
    }
    if given.unknown is not None:
        inputs = head_inputs(result.best, given.unknown, given.model, given.cache / "unknown.pt")
        for score, area in result.few_shot.auroc.items():
            measured[f"near, {score}"] = 100 * area
        measured |= far_areas(model.pooled_head, test, inputs)
    path.write_text(json.dumps(measured))
    print(f"{size} per class, draw {seed}: {measured}", file=sys.stderr, flush=True)
    shutil.rmtree(run)
    return measured


def far_areas(head: PooledHead, known: dict[str, Any], unknown: dict[str, Any]) -> dict[str, float]:
    """Compute the AUROC of the scores of *known* and *unknown* inputs, in percent.

    "energy, no distance" is the energy of the same head without the distance from the mean.
    """
    plain = copy.deepcopy(head)
    if head.config.distance:
        plain.fc.weight[:, -1] = 0
    areas = {}
    scores: tuple[tuple[str, PooledHead, Score], ...] = (
        ("max_probability", head, "max_probability"),
        ("energy, no distance", plain, "energy"),
        ("energy", head, "energy"),
    )
    for name, scored, score in scores:
        values = [
            known_score(scored(inputs["own"], inputs["maps"]).numpy(), score) for inputs in (known, unknown)
        ]
        is_known = np.repeat([True, False], [len(column) for column in values])
        areas[f"far, {name}"] = 100 * float(roc_auc_score(is_known, np.concatenate(values)))
    return areas


def main(arguments: list[str]) -> int:
    """Run the benchmark and return the exit status."""
    parser = make_parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="photographs to draw from, <class>/*.jpg")
    parser.add_argument("--test", type=Path, required=True, help="photographs of the same classes")
    parser.add_argument("--model", required=True, help="network, such as timm:tf_efficientnet_lite0")
    parser.add_argument("--weights", type=Path, required=True, help="its weights")
    parser.add_argument("--cache", type=Path, required=True, help="folder of runs and results")
    parser.add_argument("--unknown", type=Path, help="photographs of none of the classes, <folder>/*.jpg")
    parser.add_argument(
        "--sizes", type=lambda text: [int(size) for size in text.split(",")], default=[5, 10, 20, 50]
    )
    parser.add_argument("--draws", type=int, default=6)
    given = parser.parse_args(arguments)
    given.cache.mkdir(parents=True, exist_ok=True)
    given.cache = given.cache.resolve()
    results, gains, is_better = [], [], True
    with one_line_errors():
        for size in given.sizes:
            draws = [run_draw(given, size, seed) for seed in range(given.draws)]
            gains.append([measured["ours"] - measured["probe"] for measured in draws])
            gain = paired(gains[-1])
            bias = paired([measured["estimate"] - measured["ours"] for measured in draws])
            is_better &= gain.mean > 0
            means = {
                key: float(np.mean([measured[key] for measured in draws]))
                for key in draws[0]
                if key != "head"
            }
            name = f"{size} per class"
            results.append(
                Result(
                    case=f"{name}, top-1",
                    against="probe",
                    ours=means["ours"],
                    other=means["probe"],
                    unit="%",
                    runs=given.draws,
                )
            )
            inside = sum(measured["low"] <= measured["ours"] <= measured["high"] for measured in draws)
            for case, value, unit in (
                ("ours minus probe, mean", gain.mean, "points"),
                ("ours minus probe, low", gain.interval.low, "points"),
                ("ours minus probe, high", gain.interval.high, "points"),
                ("estimate minus test, mean", bias.mean, "points"),
                ("estimate minus test, low", bias.interval.low, "points"),
                ("estimate minus test, high", bias.interval.high, "points"),
                ("intervals that contain the test accuracy", float(inside), "draws"),
                ("processor time of train", means["cpu_seconds"], "s"),
                *((f"AUROC {key}", means[key], "%") for key in means if key.startswith(("near", "far"))),
            ):
                results.append(Result(case=f"{name}, {case}", ours=value, unit=unit, runs=given.draws))
        total = paired(np.mean(gains, axis=0).tolist())
        is_better &= total.mean >= GAIN and total.interval.low > 0
        for case, value in (("mean", total.mean), ("low", total.interval.low), ("high", total.interval.high)):
            results.append(
                Result(
                    case=f"all sizes, ours minus probe, {case}", ours=value, unit="points", runs=given.draws
                )
            )
    report(results, as_json=given.json, threads=os.environ.get("OMP_NUM_THREADS", "all"))
    return 0 if is_better else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
