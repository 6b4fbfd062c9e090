"""A row of a paper at its scale: ResNet-20 on CIFAR-10 with and without DSoP branches (DSoP, Table IX).

    python benchmarks/paper_row.py --data FOLDER [--dry-run] [--seeds 3] [--epochs 160] [--precision bf16]
        [--out FOLDER] [--at-once 4] [--minutes 30] [--step-ms 4] [--json]

--data holds train.tar.xz and test.tar.xz, or the folders train and test with one folder of images per class.
The recipe is `cifar10-dsop-resnet20`. --at-once trainings run side by side, those of a seed next to each
other. Each writes its epochs to --out at once. After --minutes, all are stopped and saved; the same command
goes on. At the end come the test errors, their paired difference over the seeds with its interval, and the
first network with branches, which is detached, proved equal and exported.

--dry-run prints what a machine with a GPU would get, and how long it takes if a step of 256 takes --step-ms.
Exit status 1: more than 60 MiB to copy, a failed training or export, or an unfinished one.
"""

import argparse
import csv
import dataclasses
import json
import math
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gain.paired import paired
from measure import commit, existing, machine, make_parser, versions

from sopdeploy.training.recipe import read_recipe

RECIPE = "cifar10-dsop-resnet20"
ARMS = {"plain": "resnet20", "dsop": "dsop-resnet20"}
PRINTED = 7.92  # error of the network without branches in Table IX, in percent
PARTS = ("train", "test")
MAX_COPIED = 60 * 2**20  # bytes
IMAGES = {"train": 50_000, "test": 10_000}
START_SECONDS, EXPORT_SECONDS = 20, 60  # of a training, and of the export of one network


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """One training: its arm, its seed and its folder."""

    arm: str
    seed: int
    folder: Path

    def command(self, given: argparse.Namespace, data: Path) -> list[str]:
        """Return the command that starts or continues the training."""
        # 80 and 120 of 160 epochs
        milestones = sorted({max(1, given.epochs // 2), max(1, given.epochs * 3 // 4)})
        settings = {
            "data.kind": "folder",
            "data.path": data,
            "model.name": ARMS[self.arm],
            "epochs": given.epochs,
            "schedule.milestones": milestones,
            "batch_size": given.batch_size,
            "precision": given.precision,
            "workers": given.workers,
            "device": given.device,
            "seed": self.seed,
            "save.every_minutes": 2,
        }
        words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
        train = [sys.executable, "-m", "sopdeploy", "train", "--recipe", RECIPE, *words]
        return [*train, "--out", str(self.folder), "--resume", "auto"]

    def history(self) -> list[dict[str, float]]:
        """Read the epochs so far."""
        path = self.folder / "history.csv"
        if not path.is_file():
            return []
        with path.open(encoding="utf-8", newline="") as file:
            return [
                {key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)
            ]


def sources(data: Path) -> list[Path]:
    """Find the archive or the folder of each part of *data*; exit if one is missing."""
    found = []
    for part in PARTS:
        choices = [data / f"{part}.tar.xz", data / part]
        path = next((choice for choice in choices if choice.exists()), None)
        if path is None:
            sys.exit(f"{data}: holds neither {choices[0].name} nor {choices[1].name}")
        found.append(path)
    return found


def num_bytes(path: Path) -> int:
    """Count the bytes of a file, or of all files in a folder."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def code_files() -> list[Path]:
    """List the files of the checkout that git tracks."""
    root = Path(__file__).parent.parent
    command = ["git", "ls-files", "-z"]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    return [root / name for name in listed.stdout.split("\0") if name and (root / name).is_file()]


def plan(given: argparse.Namespace) -> dict[str, Any]:
    """Say what is copied and how many minutes all trainings take; starts nothing."""
    recipe = read_recipe(RECIPE)
    copied = {str(path): num_bytes(path) for path in sources(given.data)}
    copied["the files of the checkout"] = sum(path.stat().st_size for path in code_files())
    steps = given.epochs * math.ceil(IMAGES["train"] / given.batch_size)
    scale = given.batch_size / recipe.batch_size  # --step-ms is the time of a step of the recipe's size
    forward = given.epochs * IMAGES["test"] / recipe.batch_size / 3  # a third of the operations of a step
    training = START_SECONDS + (steps * scale + forward) * given.step_ms / 1e3
    rounds = math.ceil(len(ARMS) * given.seeds / given.at_once)
    # Trainings side by side share the GPU, which is taken to be busy with each.
    seconds = len(ARMS) * given.seeds * (training - START_SECONDS) + rounds * START_SECONDS + EXPORT_SECONDS
    return {
        "copied": copied,
        "copied_bytes": sum(copied.values()),
        "trainings": len(ARMS) * given.seeds,
        "steps_per_training": steps,
        "minutes_per_training": round(training / 60, 1),
        "minutes": round(seconds / 60, 1),
    }


def unpack(data: Path, out: Path) -> Path:
    """Unpack the archives of *data* into *out*, once; return the folder with train and test."""
    if all((data / part).is_dir() for part in PARTS):
        return data
    for source, part in zip(sources(data), PARTS, strict=True):
        if (out / part).exists():
            continue
        partial = out / f".{part}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        if source.is_dir():
            shutil.copytree(source, partial / part)
        else:
            with tarfile.open(source) as archive:
                archive.extractall(partial, filter="data")
        (partial / part).rename(out / part)
        partial.rmdir()
    return out


def gpu_share() -> float | None:
    """Ask the driver which share of the last second the GPU was busy, in percent; None without one."""
    query = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=False, timeout=10)
        return float(answer.stdout.splitlines()[0])
    except (OSError, ValueError, IndexError, subprocess.TimeoutExpired):
        return None


def train_all(runs: Sequence[Run], given: argparse.Namespace, data: Path) -> tuple[bool, list[float]]:
    """Run the trainings, --at-once side by side; return whether all are finished, and shares of the GPU."""
    deadline = time.monotonic() + 60 * given.minutes
    waiting = [run for run in runs if len(run.history()) < given.epochs]
    active: dict[Run, subprocess.Popen[bytes]] = {}
    shares: list[float] = []
    seen = {run: len(run.history()) for run in runs}
    failed = False
    while (waiting or active) and time.monotonic() < deadline:
        while waiting and len(active) < given.at_once:
            run = waiting.pop(0)
            run.folder.parent.mkdir(parents=True, exist_ok=True)
            log = run.folder.with_suffix(".log").open("ab")
            active[run] = subprocess.Popen(run.command(given, data), stdout=log, stderr=log)
        time.sleep(1)
        shares += [share for share in (gpu_share(),) if share is not None]
        for run in list(active):
            for row in run.history()[seen[run] :]:
                seen[run] += 1
                error = 100 * (1 - row["top1"])
                print(
                    f"{run.arm} seed {run.seed} epoch {row['epoch']:.0f}: error {error:.2f}", file=sys.stderr
                )
            if (code := active[run].poll()) is not None:
                del active[run]
                if code:
                    failed = True
                    print(f"{run.folder.with_suffix('.log')}: exit code {code}", file=sys.stderr)
    for process in active.values():
        process.send_signal(signal.SIGTERM)  # saves the training
    for process in active.values():
        process.wait()
    return not failed and not active and not waiting, shares


def export(run: Run, out: Path) -> dict[str, Any]:
    """Detach, prove and export the network of *run*; return what the command reports."""
    command = [sys.executable, "-m", "sopdeploy", "export", str(run.folder / "last.pt"), "--detach"]
    done = subprocess.run(
        [*command, "--out", str(out / "bundles"), "--json"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        return {"error": done.stderr.strip()}
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def results(runs: Sequence[Run], given: argparse.Namespace, shares: Sequence[float]) -> dict[str, Any]:
    """Collect the test errors after the last epoch, in percent, and the speed."""
    rows = [run.history() for run in runs]
    finished = {
        (run.arm, run.seed): 100 * (1 - row[-1]["top1"])
        for run, row in zip(runs, rows, strict=True)
        if len(row) == given.epochs
    }
    seeds = [seed for seed in range(given.seeds) if all((arm, seed) in finished for arm in ARMS)]
    errors = {arm: [finished[arm, seed] for seed in seeds] for arm in ARMS}
    difference = dataclasses.asdict(paired(errors["dsop"], errors["plain"])) if seeds else None
    speeds = [row["images_per_second"] for history in rows for row in history if "images_per_second" in row]
    return {
        "printed_error_without_branches": PRINTED,
        "epochs": given.epochs,
        "precision": given.precision,
        "batch_size": given.batch_size,
        "seeds": seeds,
        "errors": errors,
        "dsop_minus_plain": difference,
        "images_per_second_of_one": statistics.median(speeds) if speeds else None,
        "at_once": given.at_once,
        "gpu_busy_percent": statistics.fmean(shares) if shares else None,
    }


def describe(found: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield a line for each value of *found*."""
    for key, value in found.items():
        if isinstance(value, dict):
            yield from describe(value, f"{prefix}{key}: ")
        else:
            yield f"{prefix}{key}: {value}"


def main(given: argparse.Namespace) -> int:
    """Plan, or train and report."""
    planned = plan(given)
    is_small = planned["copied_bytes"] <= MAX_COPIED
    if given.dry_run:
        print(json.dumps(planned, indent=2) if given.json else "\n".join(describe(planned)))
        return 0 if is_small else 1
    given.out.mkdir(parents=True, exist_ok=True)
    data = unpack(given.data, given.out / "data")
    folders = [(arm, seed, given.out / arm / f"seed-{seed}") for seed in range(given.seeds) for arm in ARMS]
    runs = [Run(*values) for values in folders]
    is_complete, shares = train_all(runs, given, data)
    found = {**results(runs, given, shares), "machine": machine(), "versions": versions(), "commit": commit()}
    first = next(run for run in runs if run.arm == "dsop")
    if len(first.history()) == given.epochs:
        found["export"] = export(first, given.out)
    (given.out / "results.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=2) if given.json else "\n".join(describe(found)))
    return 0 if is_complete and "error" not in found.get("export", {"error": ""}) else 1


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--data", type=existing, required=True, help="folder of the images")
    parser.add_argument("--out", type=Path, default=Path("runs/paper-row"))
    parser.add_argument("--dry-run", action="store_true", help="print what is copied and the plan of minutes")
    for name, default in (("seeds", 3), ("epochs", 160), ("at-once", 2), ("workers", 8), ("batch-size", 256)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop and save after this time")
    parser.add_argument("--step-ms", type=float, default=4.0, help="time of a step of 256 on the GPU")
    return parser.parse_args(words)


if __name__ == "__main__":
    sys.exit(main(parse_arguments()))
