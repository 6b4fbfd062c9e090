"""Accuracy with ten photos per class: the recipe photos against training from scratch and a linear probe.

    python benchmarks/few_photos.py --data CIFAR --cache DIR [--seeds 10 | --quick] [--json]
    python benchmarks/few_photos.py --photos DIR --cache DIR [--model dsop-resnet18] [--json]

CIFAR is a folder of CIFAR-10 as image files, train/<class>/ and test/<class>/. The backbone, ResNet-20,
learns every other class in alphabetical order. Each seed draws ten training images of each of the other
five classes; all arms see the same ones, at 32 pixels, and are tested on the same 1,000 test images:

- new: the recipe photos with the backbone as start weights; "new gap" and "new isqrt" have this head only,
  "new branches" is DSoP on the same backbone, whose branches are one more candidate;
- old: the recipe photos-dsop, from scratch; it holds out ten of the 50 images, as it did for users;
- probe: scikit-learn's logistic regression (C = 1) on the standardized features of the backbone.

Intervals are Student's 95 % intervals of the paired difference over seeds. Finished runs in --cache are not
repeated. Exit status 1: the new recipe is not 10 points better than the old one, or worse than the probe.

--quick repeats the whole procedure in a few minutes, with two seeds and a backbone that learned less: its
figures show that it works, not how well, so the exit status is 0.

--photos measures time instead: the first 60 images of DIR as six classes of ten, ResNet-18 with random
weights at 224 pixels, and all candidates of fine-tuning without early stopping.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random

import numpy as np
import torch
from measure import Result, make_parser, one_line_errors, report
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from sopdeploy.checkpoint import Checkpoint, build_classifier, read_checkpoint, write_checkpoint
from sopdeploy.data.datasets.folder import open_classes
from sopdeploy.errors import ConfigError, DataError
from sopdeploy.evaluation.prediction import score_checkpoint
from sopdeploy.evaluation.statistics import paired
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.models.registry import create_model
from sopdeploy.training.few_shot.features import compute_features
from sopdeploy.training.loop import train
from sopdeploy.training.recipe import read_recipe

NETWORK, SIDE = "resnet20", 32
PER_CLASS, TEST_PER_CLASS = 10, 200
PRETRAINING = {"images": 2000, "epochs": 4}  # images of each class
QUICK = {"images": 800, "epochs": 2}
QUICK_SEEDS = 2
PHOTOS = 60  # for the time
ONE_HEAD = ("new gap", "new isqrt")
PIXELS = [f"preprocess.resize={SIDE}", f"preprocess.crop={SIDE}"]


def link(folder: Path, images: Sequence[Path], name: str) -> None:
    """Link *images* into the class folder *name* of *folder*."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    for image in images:
        (folder / name / image.name).symlink_to(image.resolve())


def class_folders(data: Path | None, part: str) -> list[Path]:
    """List the ten class folders of a part of CIFAR-10."""
    if data is None or not (data / part).is_dir():
        raise ConfigError(f"--data {data}: no folder {part}; give CIFAR-10 as {part}/<class>/*.jpg")
    return sorted(folder for folder in (data / part).iterdir() if folder.is_dir())


def pretrain(data: Path, cache: Path, extent: dict[str, int]) -> Path:
    """Train the backbone on every other class to the *extent* and return its checkpoint."""
    folder, run = cache / "pretraining-images", cache / "pretraining"
    if not folder.exists():
        for part, count in (("train", extent["images"]), ("test", TEST_PER_CLASS)):
            for one in class_folders(data, part)[::2]:
                images = sorted(one.iterdir())[:count]
                link(folder / {"train": "train", "test": "val"}[part], images, one.name)
    settings = [
        f"data={{kind='folder', path='{folder}'}}",
        f"model={{name='{NETWORK}'}}",
        f"epochs={extent['epochs']}",
        "batch_size=64",
        "channels_last=true",
        "threads=1",
        f"preprocess={{resize={SIDE}, crop={SIDE}}}",
        "augment={kind='pad-crop', pad=4, flip=0.5}",
        "optimizer={lr=0.1, momentum=0.9, nesterov=true, weight_decay=5e-4}",
        "schedule={kind='one-cycle', rise=0.3}",
    ]
    return train(read_recipe("cifar10-dsop-resnet20", settings), run, resume="auto").best


def draw_task(data: Path, cache: Path, seed: int) -> tuple[Path, Path]:
    """Link the training images of *seed* and the test images; return both folders."""
    training, test = cache / f"task-{seed}", cache / "test"
    for folder, part, count, source in (
        (training, "train", PER_CLASS, Random(seed)),  # noqa: S311  # not a secret
        (test, "test", TEST_PER_CLASS, Random(1)),  # noqa: S311
    ):
        if not folder.exists():
            for one in class_folders(data, part)[1::2]:
                link(folder, source.sample(sorted(one.iterdir()), count), one.name)
    return training, test


def top1(checkpoint: Path, test: Path) -> float:
    """Compute the accuracy of *checkpoint* on the images in *test*, in percent."""
    _, scores = score_checkpoint(checkpoint, test, on_image=lambda _done, _total: None)
    if not isinstance(scores, list):
        raise DataError(f"{checkpoint}: has several classes per image; give a network with one")
    return 100 * sum(score.correct for score in scores) / len(scores)


def probe(backbone: Path, training: Path, test: Path, cache: Path) -> float:
    """Compute the accuracy of a linear probe on the features of *backbone*, in percent."""
    checkpoint = read_checkpoint(backbone)
    model = build_classifier(checkpoint, backbone)
    features, targets = [], []
    for folder in (training, test):
        images = open_classes(folder, tuple(sorted(path.name for path in folder.iterdir())))
        found = compute_features(
            [model],
            images,
            checkpoint.preprocess,
            workers=0,
            max_gib=0,
            cache=cache / f"features-{folder.name}.pt",
            on_image=lambda _done, _total: None,
        )
        features.append(found.vectors[0][:, 0].numpy())
        targets.append(images.targets)
    scaler = StandardScaler().fit(features[0])
    classifier = LogisticRegression(C=1.0, max_iter=2000).fit(scaler.transform(features[0]), targets[0])
    return 100 * float(np.mean(classifier.predict(scaler.transform(features[1])) == targets[1]))


def run_arm(arm: str, backbone: Path | None, seed: int, cache: Path, data: Path) -> float:
    """Train one arm on the images of *seed* and return its accuracy in percent; results are cached."""
    path = cache / f"{arm}-{seed}.json"
    if path.exists():
        return float(json.loads(path.read_text())["top1"])
    training, test = draw_task(data, cache, seed)
    if arm == "probe":
        accuracy, record = probe(Path(backbone or ""), training, test, cache), None
    else:
        run = cache / f"run-{arm}-{seed}"
        shutil.rmtree(run, ignore_errors=True)
        settings = [f"data.path={training}", f"seed={seed}", "threads=1", *PIXELS]
        if arm != "old":
            network = f"dsop-{NETWORK}" if arm == "new branches" else NETWORK
            settings += [f"model.name={network}", f"start.weights={backbone}"]
            settings += [f"few_shot.heads=['{arm.partition(' ')[2]}']"] if arm in ONE_HEAD else []
        result = train(read_recipe("photos-dsop" if arm == "old" else "photos", settings), run)
        accuracy = top1(result.best, test)
        record = None if result.few_shot is None else result.few_shot.model_dump(mode="json")
    path.write_text(json.dumps({"top1": accuracy, "few_shot": record}))
    print(f"{arm} {seed}: {accuracy:.1f} %", file=sys.stderr)
    return accuracy


def accuracy_results(given: argparse.Namespace) -> tuple[list[Result], bool]:
    """Run all arms; return the results and whether the requirements hold."""
    cache: Path = given.cache
    only_old = given.arms == ["old"]
    extent = QUICK if given.quick else PRETRAINING
    backbone = None if only_old else given.backbone or pretrain(given.data, cache, extent)
    found = {
        arm: [run_arm(arm, backbone, seed, cache, given.data) for seed in range(given.seeds)]
        for arm in given.arms
    }
    results, hold = [], True
    for arm in given.arms:
        if arm == "new" or "new" not in found:
            mean = float(np.mean(found[arm]))
            results.append(Result(case=f"top-1, {arm}", ours=mean, unit="%", runs=given.seeds))
            continue
        difference = paired([a - b for a, b in zip(found["new"], found[arm], strict=True)])
        means = (float(np.mean(found["new"])), float(np.mean(found[arm])))
        results.append(
            Result(case="top-1, new", against=arm, ours=means[0], other=means[1], unit="%", runs=given.seeds)
        )
        for name, value in (("mean", difference.mean), *difference.interval._asdict().items()):
            results.append(
                Result(case=f"new minus {arm}, {name}", ours=value, unit="points", runs=given.seeds)
            )
        hold &= arm != "old" or (difference.mean >= 10 and difference.interval.low > 0)
        hold &= arm != "probe" or difference.interval.high >= 0
    return results, hold or given.quick


def timing_results(photos: Path, cache: Path, network: str) -> list[Result]:
    """Measure the steps of the procedure on 60 photos at 224 pixels, with catalog *network* on ResNet-18."""
    folder, weights, run = cache / "sixty", cache / "random.pt", cache / "run-sixty"
    found = photos.iterdir() if photos.is_dir() else ()
    images = sorted(path for path in found if path.suffix.lower() in {".jpg", ".jpeg", ".png"})
    if len(images) < PHOTOS:
        raise DataError(
            f"--photos {photos}: {len(images)} images directly in this folder, {PHOTOS} are needed; give a "
            "folder of images without subfolders"
        )
    if not folder.exists():
        for number in range(6):
            link(folder, images[number:PHOTOS:6], f"class {number}")
    torch.manual_seed(0)
    model = create_model("resnet18", num_classes=6)
    labels = tuple(f"class {number}" for number in range(6))
    write_checkpoint(
        weights,
        Checkpoint(
            model="resnet18",
            config=model.config.model_dump(mode="json"),
            weights=model.state_dict(),
            labels=labels,
            preprocess=Preprocess(),
            training={},
        ),
    )
    shutil.rmtree(run, ignore_errors=True)
    settings = [f"data.path={folder}", f"start.weights={weights}", f"model.name={network}"]
    settings.append("few_shot.fine_tuning.patience=15")
    result = train(read_recipe("photos", settings), run).few_shot
    if result is None:
        raise RuntimeError("the recipe photos has no few-shot procedure")
    first = result.seconds["features"] + result.seconds["head"]
    return [
        Result(case="60 photos, features, head and cross-validation", ours=first, unit="s", runs=1),
        Result(
            case="60 photos, with fine-tuning", ours=first + result.seconds["fine-tuning"], unit="s", runs=1
        ),
    ]


def main(arguments: list[str]) -> int:
    """Run the benchmark and return the exit status."""
    parser = make_parser(__doc__)
    parser.add_argument("--data", type=Path, help="CIFAR-10 as image files, train/ and test/")
    parser.add_argument("--photos", type=Path, help="folder of at least 60 images, for the time")
    parser.add_argument("--model", default="dsop-resnet18", help="network on ResNet-18, for the time")
    parser.add_argument("--cache", type=Path, required=True, help="folder of images, runs and results")
    parser.add_argument("--backbone", type=Path, help="checkpoint to start from instead of pretraining")
    parser.add_argument("--arms", type=lambda text: text.split(","), default=["new", "old", "probe"])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="two seeds, and less pretraining")
    given = parser.parse_args(arguments)
    if given.quick:
        given.cache, given.seeds = given.cache / "quick", QUICK_SEEDS
    given.cache.mkdir(parents=True, exist_ok=True)
    given.cache = given.cache.resolve()
    with one_line_errors():
        if given.photos is not None:
            results, hold = timing_results(given.photos, given.cache, given.model), True
        else:
            results, hold = accuracy_results(given)
    report(results, as_json=given.json, threads=os.environ.get("OMP_NUM_THREADS", "all"))
    return 0 if hold else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
