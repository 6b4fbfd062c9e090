"""`sopdeploy train` and its peers on the same photographs, weights and core: accuracy against seconds.

    python benchmarks/own_photos.py --data DIR --weights FILE --cache CACHE [--tools sopdeploy,probe]
        [--per-class 5,10,20,50] [--draws 3] [--fastai-python PYTHON] [--autogluon-python PYTHON]
        [--json]

DIR contains photographs, train/<class>/ and validation/<class>/. A draw takes the same number of photographs
of each class from train/; all of validation/ is for testing. FILE is the state dict of EfficientNet-Lite0
(timm's `tf_efficientnet_lite0`), from which every tool starts. Tools:

- sopdeploy: `sopdeploy train --data DRAW --weights FILE --set model.name=timm:tf_efficientnet_lite0`;
- probe: scikit-learn's logistic regression (C = 0.01) on the standardized averages of the frozen network;
- fastai: `fine_tune`, with --fastai-python, the Python of an environment with fastai and timm;
- autogluon-svm: `MultiModalPredictor` with its problem type for few photographs, a support vector machine on
  frozen features; with --autogluon-python, the Python of an environment with autogluon.multimodal.

`benchmarks/peers/` contains the programs of the peers, `SETTINGS` their options. Every training is a
process of one thread. Seconds are processor seconds from its start to the end of the training, imports
included. Results in CACHE are not repeated, and the report covers all of them, so tools can be run one after
the other. Intervals are Student's 95 % intervals over draws, of the paired difference for comparisons.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from gain.paired import paired
from measure import Result, existing, keep_draw, make_parser, markdown, one_line_errors, report
from scipy.stats import t

from sopdeploy.errors import DataError, SopdeployError
from sopdeploy.evaluation.checkpoint_scores import score_checkpoint

NETWORK = "tf_efficientnet_lite0"
OURS = "sopdeploy"
NAMES = {
    OURS: "sopdeploy train",
    "probe": "logistic regression",
    "fastai": "fastai fine_tune",
    "autogluon-svm": "AutoGluon, few-shot",
}
PROGRAMS = {
    "probe": "probe.py",
    "fastai": "fastai_fine_tune.py",
    "autogluon-svm": "autogluon_fit.py",
}
# Options of the peers. Choose them on draw `TUNING_DRAW`, which the report leaves out.
SETTINGS: dict[str, dict[str, Any]] = {
    "probe": {"C": 0.01},
    "fastai": {
        "epochs": 5,
        "freeze_epochs": 5,
        "batch": 16,
        "rate": 0.01,
        "crop": 0.35,
        "freeze_norms": True,
        "learner": {},
    },
    "autogluon-svm": {"problem_type": "few_shot_classification"},
}
TUNING_DRAW = 100


@dataclass(frozen=True, slots=True)
class Point:
    """Results of *tool* with *per_class* photographs of each class.

    `accuracy` is the mean in percent, `half` half the width of its interval over `draws` (0 for a single
    one), `seconds` the median of the processor seconds. `difference` is the text of the paired difference
    ours minus this tool, or empty.
    """

    tool: str
    per_class: int
    draws: int
    accuracy: float
    half: float
    seconds: float
    difference: str = ""


def class_folders(data: Path, part: str) -> list[Path]:
    """List the class folders of a part of the photographs."""
    folders = sorted(path for path in (data / part).glob("*") if path.is_dir())
    if not folders:
        raise DataError(f"--data {data}: no classes in {part}; give photographs as {part}/<class>/*.jpg")
    return folders


def draw(data: Path, per_class: int, seed: int) -> list[tuple[str, str]]:
    """Draw training photographs: pairs of file and class. A larger draw contains a smaller one."""
    chosen = []
    for folder in class_folders(data, "train"):
        files = sorted(folder.iterdir())
        if len(files) < per_class:
            raise DataError(f"{folder}: {len(files)} photographs, {per_class} are drawn; use fewer")
        shuffled = Random(f"{seed} {folder.name}").sample(files, len(files))  # noqa: S311  # not a secret
        chosen += [(str(file.resolve()), folder.name) for file in shuffled[:per_class]]
    return chosen


def test_files(data: Path) -> list[tuple[str, str]]:
    """List the test photographs: pairs of file and class."""
    return [
        (str(file.resolve()), folder.name)
        for folder in class_folders(data, "validation")
        for file in sorted(folder.iterdir())
    ]


def link(pairs: Sequence[tuple[str, str]], folder: Path) -> Path:
    """Link the files of *pairs* into class folders of *folder*, which is replaced."""
    shutil.rmtree(folder, ignore_errors=True)
    for file, label in pairs:
        (folder / label).mkdir(parents=True, exist_ok=True)
        (folder / label / Path(file).name).symlink_to(file)
    return folder


def run(command: Sequence[str], log: Path) -> float:
    """Run *command* with one thread; return its processor seconds. Raises `SopdeployError` if it fails."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with log.open("w", encoding="utf-8") as output:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, stdout=output, stderr=output, env=environment, check=False)
    if done.returncode:
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        raise SopdeployError(f"{' '.join(command[:3])} failed with {done.returncode}: {last}; see {log}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def run_ours(given: argparse.Namespace, per_class: int, seed: int) -> dict[str, float]:
    """Train with the command line and test the checkpoint."""
    name = f"{OURS}-{per_class}-{seed}"
    out = given.cache / f"run-{name}"
    shutil.rmtree(out, ignore_errors=True)
    photos = link(draw(given.data, per_class, seed), given.cache / f"photos-{name}")
    command = [sys.executable, "-m", "sopdeploy", "train", "--data", str(photos), "--out", str(out)]
    command += ["--weights", str(given.weights), "--set", f"model.name=timm:{NETWORK}"]
    command += ["--set", f"seed={seed}", "--json"]
    log = given.cache / f"{name}.log"
    seconds = run(command, log)
    test = link(test_files(given.data), given.cache / "test")
    scores = score_checkpoint(out / "best.pt", test).predictions
    if not isinstance(scores, list):
        raise DataError(f"{photos}: has several classes per photograph; give one folder per class")
    return {"accuracy": 100 * statistics.fmean(score.correct for score in scores), "seconds": seconds}


def run_peer(tool: str, given: argparse.Namespace, per_class: int, seed: int) -> dict[str, float]:
    """Train and test a peer with the Python of its environment."""
    name = f"{tool}-{per_class}-{seed}"
    test = test_files(given.data)
    options = SETTINGS[tool] | {"cache": str(given.cache / "test-features.npy")}
    request_file = given.cache / f"{name}.request.json"
    answer_file = given.cache / f"{name}.answer.json"
    request = {
        "train": draw(given.data, per_class, seed),
        "test": [file for file, _ in test],
        "network": NETWORK,
        "weights": str(given.weights),
        "seed": seed,
        "options": options,
    }
    request_file.write_text(json.dumps(request), encoding="utf-8")
    program = Path(__file__).parent / "peers" / PROGRAMS[tool]
    command = [str(python_of(tool, given)), str(program), str(request_file), str(answer_file)]
    run(command, given.cache / f"{name}.log")
    answer = json.loads(answer_file.read_text(encoding="utf-8"))
    correct = [label == best for (_, label), best in zip(test, answer["predicted"], strict=True)]
    return {"accuracy": 100 * statistics.fmean(correct), "seconds": answer["seconds"]}


def python_of(tool: str, given: argparse.Namespace) -> Path:
    """Return the Python that runs *tool*."""
    python = {"probe": Path(sys.executable), "fastai": given.fastai_python}.get(tool, given.autogluon_python)
    if python is None:
        option = f"--{tool.partition('-')[0]}-python"
        raise SopdeployError(f"{tool}: give {option} PYTHON, of an environment that contains this package")
    return Path(python)


def measure(given: argparse.Namespace) -> None:
    """Run what is not in the cache, draw by draw."""
    for seed in range(given.first_draw, given.first_draw + given.draws):
        for per_class in given.per_class:
            for tool in given.tools:
                stored = given.cache / f"{tool}-{per_class}-{seed}.json"
                if stored.exists():
                    continue
                if tool == OURS:
                    result = run_ours(given, per_class, seed)
                else:
                    result = run_peer(tool, given, per_class, seed)
                keep_draw(stored, result)


def read_results(cache: Path) -> dict[tuple[str, int], dict[int, tuple[float, float]]]:
    """Read all results in *cache*: accuracy and seconds by tool and size, then by draw."""
    results: dict[tuple[str, int], dict[int, tuple[float, float]]] = {}
    for tool in NAMES:
        for file in sorted(cache.glob(f"{tool}-[0-9]*.json")):
            per_class, _, seed = file.stem.removeprefix(f"{tool}-").partition("-")
            if seed.isdecimal() and int(seed) < TUNING_DRAW:
                stored = json.loads(file.read_text(encoding="utf-8"))
                results.setdefault((tool, int(per_class)), {})[int(seed)] = (
                    stored["accuracy"],
                    stored["seconds"],
                )
    return dict(sorted(results.items(), key=lambda item: (list(NAMES).index(item[0][0]), item[0][1])))


def summarize(results: dict[tuple[str, int], dict[int, tuple[float, float]]]) -> list[Point]:
    """Compute means, intervals and paired differences to ours."""
    points = []
    for (tool, per_class), draws in results.items():
        accuracies = [accuracy for accuracy, _ in draws.values()]
        half, n = 0.0, len(accuracies)
        if n > 1:
            half = float(t.ppf(0.975, n - 1)) * statistics.stdev(accuracies) / n**0.5
        ours = results.get((OURS, per_class), {})
        common = [seed for seed in draws if seed in ours and tool != OURS]
        difference = ""
        if common:
            gain = paired([ours[seed][0] for seed in common], [draws[seed][0] for seed in common])
            difference = f"{gain.mean:+.1f}" + (f" ± {gain.half:.1f}" if gain.n > 1 else " (one draw)")
        seconds = statistics.median(seconds for _, seconds in draws.values())
        points.append(Point(tool, per_class, n, statistics.fmean(accuracies), half, seconds, difference))
    return points


def table(points: Sequence[Point]) -> str:
    """Format *points* as a table in Markdown."""
    head = ("tool", "photographs per class", "draws", "accuracy, %", "ours minus this, points", "CPU s")
    rows = []
    for point in points:
        interval = f" ± {point.half:.1f}" if point.draws > 1 else ""
        accuracy, seconds = f"{point.accuracy:.1f}{interval}", f"{point.seconds:.0f}"
        rows.append((NAMES[point.tool], point.per_class, point.draws, accuracy, point.difference, seconds))
    return markdown(head, rows)


def numbers(text: str) -> list[int]:
    """Convert an argument such as "5,10" to numbers."""
    return [int(part) for part in text.split(",")]


def tools(text: str) -> list[str]:
    """Convert an argument to the names of tools."""
    chosen = text.split(",")
    if unknown := set(chosen) - NAMES.keys():
        raise argparse.ArgumentTypeError(f"{sorted(unknown)[0]}: choose from {', '.join(NAMES)}")
    return chosen


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--data", type=existing, required=True, help="photographs, train/ and validation/")
    parser.add_argument("--weights", type=existing, required=True, help="state dict of EfficientNet-Lite0")
    parser.add_argument("--cache", type=Path, required=True, help="folder of runs and results")
    parser.add_argument(
        "--tools", type=tools, default=[OURS, "probe"], help="comma-separated (sopdeploy,probe)"
    )
    parser.add_argument("--per-class", type=numbers, default=[5, 10, 20, 50], help="comma-separated sizes")
    parser.add_argument("--draws", type=int, default=3, help="number of draws (3)")
    parser.add_argument(
        "--first-draw", type=int, default=0, help=f"the first draw; {TUNING_DRAW}: for tuning"
    )
    parser.add_argument("--fastai-python", type=existing, help="Python of an environment with fastai, timm")
    parser.add_argument("--autogluon-python", type=existing, help="Python with autogluon.multimodal")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Run the benchmark, print all results in the cache, and draw them."""
    given = parse_arguments(arguments)
    given.cache.mkdir(parents=True, exist_ok=True)
    given.cache, given.weights = given.cache.resolve(), given.weights.resolve()
    with one_line_errors():
        measure(given)
    points = summarize(read_results(given.cache))
    if given.json:
        report(
            [
                Result(
                    case=f"{point.tool}, {point.per_class} per class", ours=value, unit=unit, runs=point.draws
                )
                for point in points
                for value, unit in ((point.accuracy, "%"), (point.seconds, "cpu-s"))
            ],
            as_json=True,
        )
    else:
        print(table(points))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
