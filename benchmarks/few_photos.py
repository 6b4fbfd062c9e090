"""Accuracy and processor time of `train` with few photographs per class, against simple heads on averages.

    python benchmarks/few_photos.py --photos NAME=TRAIN,TEST --model NAME=WEIGHTS --cache DIR
        [--sizes 5,10,20,50] [--draws 6] [--unknown DIR] [--set KEY=VALUE] [--json]

--photos and --model may be repeated: every network is measured on every kind of photographs. TRAIN and TEST
are folders <class>/*.jpg. Each draw, whose seed is its number, takes --sizes photographs per class from
TRAIN. All arms see the same ones and are tested on all photographs in TEST:

- train: the command `sopdeploy train --data DRAW --set model.name=NAME --weights WEIGHTS`; its processor time
  is that of the whole command, with imports;
- probe: scikit-learn's LogisticRegression(C=0.01) on the standardized vectors that the network's own
  classifier reads;
- best: of nine heads on these vectors, whose options are tuned by cross-validation on the photographs of the
  draw, the one with the highest mean accuracy on TEST over the draws. This choice favors the simple heads.

Intervals are Student's 95 % intervals of the paired difference over draws. "estimate minus test" compares the
printed estimate with the accuracy on the test photographs. With --unknown, photographs of other classes,
<folder>/*.jpg, the shares of TEST that the threshold accepts and of these photographs that it rejects are
printed, of the draws with a threshold. --set is passed to `train`; give each value its own --cache. Finished
draws in --cache are not repeated. Exit status 1: train is not better than the best simple head with an
interval above 0, on average over --sizes, in a case.
"""

import argparse
import itertools
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from measure import Result, keep_draw, make_parser, one_line_errors, report
from sklearn import kernel_ridge
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer, StandardScaler
from sklearn.svm import SVC

from sopdeploy.checkpoint import build_classifier, load_plain, read_checkpoint, write_plain
from sopdeploy.data.batches import load_batches, sequential_batches
from sopdeploy.decision import log_sum_exp
from sopdeploy.errors import DataError
from sopdeploy.evaluation.statistics import student
from sopdeploy.layers.normalize import Normalize
from sopdeploy.models.second_order_head import HeadConfig, SecondOrderHead, with_head
from sopdeploy.photos.folder import open_evaluation_images
from sopdeploy.photos.photo import PreprocessedDataset


class Case(NamedTuple):
    """A network on one kind of photographs."""

    name: str
    train: Path
    test: Path
    model: str
    weights: str
    cache: Path
    unknown: Path | None
    settings: list[str]


class Vectors(NamedTuple):
    """Vectors (N, D) of photographs, and their classes (N,)."""

    own: Any
    targets: Any


BATCH = 4
POWERS = 10.0 ** np.arange(-3, 5)


class KernelRidge(ClassifierMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """Kernel ridge regression of one-hot classes with Gaussian kernels."""

    def __init__(self, alpha: float = 1.0) -> None:
        self.alpha = alpha

    def fit(self, inputs: Any, targets: Any) -> "KernelRidge":
        """Fit the regression."""
        self.classes_ = np.unique(targets)
        kernel = kernel_ridge.KernelRidge(alpha=self.alpha, kernel="rbf", gamma=1.0)
        self.regression_ = kernel.fit(inputs, targets[:, None] == self.classes_)
        return self

    def predict(self, inputs: Any) -> Any:
        """Predict the class of the largest output."""
        return self.classes_[self.regression_.predict(inputs).argmax(axis=1)]


# Name, whether vectors are standardized or scaled to length 1, the head, and the values to choose from.
SIMPLE_HEADS: tuple[tuple[str, Any, Any, dict[str, Any]], ...] = (
    ("logistic regression", StandardScaler, LogisticRegression(max_iter=300), {"C": POWERS[:4]}),
    ("logistic regression, unit length", Normalizer, LogisticRegression(max_iter=300), {"C": POWERS[3:]}),
    ("linear SVM", StandardScaler, SVC(kernel="linear"), {"C": POWERS[:4]}),
    ("linear SVM, unit length", Normalizer, SVC(kernel="linear"), {"C": POWERS[2:7]}),
    ("SVM, Gaussian kernel", StandardScaler, SVC(), {"C": POWERS[2:6]}),
    ("kernel ridge, unit length", Normalizer, KernelRidge(), {"alpha": POWERS[:5]}),
    (
        "discriminant analysis",
        Normalizer,
        make_pipeline(PCA(), LinearDiscriminantAnalysis(solver="lsqr")),
        {"lineardiscriminantanalysis__shrinkage": [0.1, 0.3, 0.5, 0.7, 0.9]},
    ),
    (
        "nearest neighbors",
        Normalizer,
        KNeighborsClassifier(weights="distance"),
        {"n_neighbors": [1, 3, 5, 9]},
    ),
    ("nearest mean", Normalizer, NearestCentroid(), {"shrink_threshold": [None, 0.1, 0.3]}),
)


def draw(data: Path, folder: Path, size: int, seed: int) -> list[str]:
    """Link *size* photographs of each class of *data* into *folder*; return their paths below it."""
    source, chosen = random.Random(1000 * size + seed), []  # noqa: S311  # not a secret
    for label in sorted(path for path in data.iterdir() if path.is_dir()):
        images = sorted(label.iterdir())
        if len(images) < size:
            raise DataError(f"{label}: {len(images)} photographs, {size} are needed; give smaller --sizes")
        (folder / label.name).mkdir(parents=True)
        for image in source.sample(images, size):
            (folder / label.name / image.name).symlink_to(image.resolve())
            chosen.append(f"{label.name}/{image.name}")
    return chosen


def simple_accuracies(seen: Vectors, test: Vectors) -> dict[str, float]:
    """Tune each simple head on *seen* photographs; compute its accuracy on *test*, in percent."""
    accuracies = {}
    scaler = StandardScaler().fit(seen.own)
    probe = LogisticRegression(C=0.01, max_iter=2000).fit(scaler.transform(seen.own), seen.targets)
    accuracies["probe"] = 100 * float(probe.score(scaler.transform(test.own), test.targets))
    folds = StratifiedKFold(min(5, int(np.bincount(seen.targets).min())), shuffle=True, random_state=0)
    for name, scaling, head, grid in SIMPLE_HEADS:
        scaled = scaling().fit(seen.own)
        inputs, unseen = scaled.transform(seen.own), scaled.transform(test.own)
        basis = np.linalg.qr(inputs.T)[0]  # of the span, which has fewer dimensions than the vectors
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of heads that do not converge, or of channels that are 0
            search = GridSearchCV(head, grid, cv=folds).fit(inputs @ basis, seen.targets)
        accuracies[name] = 100 * float(search.score(unseen @ basis, test.targets))
    return accuracies


@torch.no_grad()
def head_inputs(checkpoint: Path, folder: Path, name: str, cache: Path, *, with_maps: bool) -> dict[str, Any]:
    """Compute the vectors, the feature maps if needed, and the targets of the photographs in *folder*."""
    if cache.exists():
        return dict(load_plain(cache, cache.read_bytes()))
    content = read_checkpoint(checkpoint)
    model = build_classifier(content, checkpoint)
    taps = tuple(model.tap_channels)[-2:]
    network = with_head(name, model, HeadConfig(kind="gap+mean", taps=taps)).eval()
    assert isinstance(network, SecondOrderHead)  # noqa: S101  # by its name
    network.to(memory_format=torch.channels_last)
    images = open_evaluation_images(
        folder, tuple(sorted(path.name for path in folder.iterdir() if path.is_dir()))
    )
    normalize, parts = Normalize(content.preprocess, torch.channels_last), []
    dataset = PreprocessedDataset(images, content.preprocess)
    for pixels, _ in load_batches(dataset, sequential_batches(len(images), BATCH), 0, torch.device("cpu")):
        own, maps = network.head_inputs(normalize(pixels))
        parts.append((own, maps if with_maps else {}))
    inputs = {
        "own": torch.cat([own for own, _ in parts]),
        "maps": {tap: torch.cat([maps[tap] for _, maps in parts]) for tap in parts[0][1]},
        "targets": torch.from_numpy(images.targets),
        "paths": ["/".join(images.path(index).parts[-2:]) for index in range(len(images))],
    }
    write_plain(cache, inputs)
    return inputs


@torch.no_grad()
def run_draw(case: Case, size: int, seed: int) -> dict[str, Any]:
    """Train on one draw and test all arms; results are cached."""
    path = case.cache / f"{size}-{seed}.json"
    if path.exists():
        return dict(json.loads(path.read_text()))
    folder, out = case.cache / f"images-{size}-{seed}", case.cache / f"run-{size}-{seed}"
    for previous in (folder, out):
        shutil.rmtree(previous, ignore_errors=True)
    chosen = draw(case.train, folder, size, seed)
    command: list[Any] = [
        Path(sys.executable).with_name("sopdeploy"),
        "train",
        "--data",
        folder,
        "--out",
        out,
        "--json",
    ]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [*command, "--set", f"model.name={case.model}", "--weights", case.weights, *case.settings],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise DataError(f"{case.name}: train failed: {done.stderr.strip().splitlines()[-1]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = json.loads(done.stdout)
    best, found = Path(result["best"]), result["procedure"]
    test = head_inputs(best, case.test, case.model, case.cache / "test.pt", with_maps=True)
    pool = head_inputs(best, case.train, case.model, case.cache / "train.pt", with_maps=False)
    rows = [pool["paths"].index(name) for name in chosen]
    model = build_classifier(read_checkpoint(best), best)
    if not isinstance(model, SecondOrderHead):
        raise DataError(f"{best}: the network has no second-order head")
    logits = model.pooled_head(test["own"], test["maps"])
    vectors = [Vectors(pool["own"][rows].numpy(), pool["targets"][rows].numpy())]
    vectors.append(Vectors(test["own"].numpy(), test["targets"].numpy()))
    measured: dict[str, Any] = {
        "train": 100 * float((logits.argmax(dim=1) == test["targets"]).double().mean()),
        "simple": simple_accuracies(*vectors),
        "estimate": 100 * found["top1"]["share"],
        "low": 100 * found["top1"]["low"],
        "high": 100 * found["top1"]["high"],
        "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "head": found["head"],
    }
    rule = (result["decision"] or {}).get("rejection")
    if case.unknown is not None and rule is not None:
        inputs = head_inputs(best, case.unknown, case.model, case.cache / "unknown.pt", with_maps=True)
        others = model.pooled_head(inputs["own"], inputs["maps"])
        shares = [(log_sum_exp(rows.numpy()) >= rule["threshold"]).mean() for rows in (logits, others)]
        measured |= {"accepted": 100 * float(shares[0]), "rejected": 100 * float(1 - shares[1])}
    keep_draw(path, measured)
    shutil.rmtree(out)
    return measured


def results_of(name: str, draws: list[dict[str, Any]]) -> tuple[list[Result], list[float]]:
    """Summarize the *draws* of one size; also return what train gains over the best simple head in each."""
    simple = {head: [one["simple"][head] for one in draws] for head in draws[0]["simple"]}
    best = max(simple, key=lambda head: float(np.mean(simple[head])))
    ours, runs = [one["train"] for one in draws], len(draws)
    results, gains = [], []
    for against, head in (("probe", "probe"), (f"best simple head, {best}", best)):
        gains = [one - other for one, other in zip(ours, simple[head], strict=True)]
        means = {"ours": float(np.mean(ours)), "other": float(np.mean(simple[head]))}
        results.append(Result(case=f"{name}, top-1", against=against, **means, unit="%", runs=runs))
        results += interval(f"{name}, train minus {against}", gains)
    results += interval(f"{name}, estimate minus test", [one["estimate"] - one["train"] for one in draws])
    inside = sum(one["low"] <= one["train"] <= one["high"] for one in draws)
    seconds = float(np.mean([one["cpu_seconds"] for one in draws]))
    values = {"intervals that contain the test accuracy": (float(inside), "draws")}
    values["processor time of the command"] = (seconds, "s")
    for share, text in (
        ("accepted", "accepted test photographs"),
        ("rejected", "rejected unknown photographs"),
    ):
        shares = [one[share] for one in draws if share in one]  # with a threshold
        if shares:
            values[text] = (float(np.mean(shares)), "%")
    for case, (value, unit) in values.items():
        results.append(Result(case=f"{name}, {case}", ours=value, unit=unit, runs=runs))
    return results, gains


def interval(case: str, differences: list[float]) -> list[Result]:
    """Report the mean of *differences* and its 95 % interval, in points."""
    values = {"mean": float(np.mean(differences)), **student(differences)._asdict()}
    return [
        Result(case=f"{case}, {name}", ours=value, unit="points", runs=len(differences))
        for name, value in values.items()
    ]


def parse_cases(given: argparse.Namespace) -> list[Case]:
    """Pair every network with every kind of photographs."""
    cases = []
    for photos, model in itertools.product(given.photos, given.model):
        (kind, _, folders), (network, _, weights) = photos.partition("="), model.partition("=")
        train, _, test = folders.partition(",")
        cache = (given.cache / f"{kind}-{network.replace(':', '-')}").resolve()
        cache.mkdir(parents=True, exist_ok=True)
        name = f"{kind}, {network}"
        settings = [text for value in given.set for text in ("--set", value)]
        cases.append(Case(name, Path(train), Path(test), network, weights, cache, given.unknown, settings))
    return cases


def main(arguments: list[str]) -> int:
    """Run the benchmark and return the exit status."""
    parser = make_parser(__doc__)
    parser.add_argument("--photos", action="append", required=True, help="NAME=TRAIN,TEST: two folders")
    parser.add_argument("--model", action="append", required=True, help="NAME=FILE: a network, its weights")
    parser.add_argument("--cache", type=Path, required=True, help="folder of runs and results")
    parser.add_argument("--unknown", type=Path, help="photographs of none of the classes, <folder>/*.jpg")
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE, an option of train")
    parser.add_argument(
        "--sizes", type=lambda text: [int(size) for size in text.split(",")], default=[5, 10, 20, 50]
    )
    parser.add_argument("--draws", type=int, default=6)
    given = parser.parse_args(arguments)
    results, is_better = [], True
    with one_line_errors():
        for case in parse_cases(given):
            gains = []
            for size in given.sizes:
                draws = [run_draw(case, size, seed) for seed in range(given.draws)]
                of_size, gain = results_of(f"{case.name}, {size} per class", draws)
                results += of_size
                gains.append(gain)
            per_draw = np.mean(gains, axis=0).tolist()
            results += interval(f"{case.name}, all sizes, train minus best simple head", per_draw)
            is_better &= student(per_draw).low > 0
    report(results, as_json=given.json, threads=os.environ.get("OMP_NUM_THREADS", "all"))
    return 0 if is_better else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
