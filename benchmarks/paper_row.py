"""A row of a paper at its scale: ResNet-20 on CIFAR-10 with and without DSoP branches (DSoP, Table IX).

    python benchmarks/paper_row.py --data FOLDER [--dry-run] [--seeds 3] [--epochs 160] [--precision bf16]
        [--out FOLDER] [--at-once 6] [--minutes 30] [--step-ms 4] [--python-ms PLAIN DSOP] [--json]

--data holds train.tar.xz and test.tar.xz, or the folders train and test with one folder of images per class.
The recipe is `cifar10-dsop-resnet20`. --at-once trainings run side by side, those of a seed next to each
other. Each writes its epochs to --out at once. After --minutes, Ctrl-C, SIGTERM or the end of the terminal,
all are stopped and saved; the same command goes on. At the end come the test errors, their paired difference
over the seeds with its interval, and the first network with branches, which is detached, proved equal and
exported: results.json in --out.

--dry-run prints what a machine with a GPU would get, how long it takes, how busy the GPU and how many cores
are, whether that fits into --minutes or how many runs of that length it takes, with --out kept between them,
and the minutes of 1, 2 and 4 seeds with all trainings side by side. One training needs --step-ms of the GPU
for a step of 256 or --python-ms of a core for any step, whichever is longer; trainings side by side share the
GPU.
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
from contextlib import suppress
from pathlib import Path
from typing import Any

from gain.paired import paired
from measure import existing, make_parser, provenance

from sopdeploy.training.recipe import read_recipe

SOPDEPLOY = [sys.executable, "-m", "sopdeploy"]
RECIPE = "cifar10-dsop-resnet20"
ARMS = {"plain": "resnet20", "dsop": "dsop-resnet20"}
PRINTED = 7.92  # error of the network without branches in Table IX, in percent
PARTS = ("train", "test")
MAX_COPIED = 60 * 2**20  # bytes
IMAGES = {"train": 50_000, "test": 10_000}
SEEDS = (1, 2, 4)  # numbers of seeds whose minutes the plan compares
START_SECONDS, EXPORT_SECONDS = 20, 60  # of a training, and of the export of one network
# CPU ms of a step of 256, AMD EPYC, 2026-11-27: Python for each arm, loader processes.
PYTHON_MS, LOADER_MS = (8.5, 17.7), 5.6
SHARES = "gpu_busy.txt"  # in --out: the share of each second for which the GPU was busy, in percent


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
        train = [*SOPDEPLOY, "train", "--recipe", RECIPE, *words]
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


def elapsed(trainings: Sequence[tuple[float, float]], at_once: int) -> float:
    """Return the time until all *trainings* have ended, of which *at_once* run side by side.

    Each needs a time when alone, and a share of the GPU in it. All slow down when the shares exceed one.
    """
    waiting, time_so_far = list(trainings), 0.0
    active: list[tuple[float, float]] = []
    while waiting or active:
        count = at_once - len(active)
        active, waiting = active + waiting[:count], waiting[count:]
        first = min(alone for alone, _ in active)
        time_so_far += first * max(1.0, sum(share for _, share in active))
        active = [(alone - first, share) for alone, share in active if alone > first]
    return time_so_far


def plan(given: argparse.Namespace) -> dict[str, Any]:
    """Say what is copied and how many minutes all trainings take; starts nothing."""
    batch_size = read_recipe(RECIPE).batch_size
    copied = {str(path): num_bytes(path) for path in sources(given.data)}
    copied["the files of the checkout"] = sum(path.stat().st_size for path in code_files())
    steps = given.epochs * math.ceil(IMAGES["train"] / given.batch_size)
    # An evaluation has a third of the operations of steps.
    with_evaluations = steps + given.epochs * math.ceil(IMAGES["test"] / given.batch_size) / 3
    gpu_ms = given.step_ms * given.batch_size / batch_size
    step_ms = {arm: max(gpu_ms, python) for arm, python in zip(ARMS, given.python_ms, strict=True)}
    alone = {arm: with_evaluations * step / 1e3 for arm, step in step_ms.items()}
    queue = list(ARMS) * given.seeds

    def seconds_of(queue: Sequence[str], at_once: int) -> float:
        return elapsed([(alone[arm], gpu_ms / step_ms[arm]) for arm in queue], at_once)

    def minutes_of(queue: Sequence[str], at_once: int) -> float:
        rounds = math.ceil(len(queue) / at_once)
        return round((seconds_of(queue, at_once) + rounds * START_SECONDS + EXPORT_SECONDS) / 60, 1)

    seconds, minutes = seconds_of(queue, given.at_once), minutes_of(queue, given.at_once)
    loader_ms = LOADER_MS * given.batch_size / batch_size
    planned: dict[str, Any] = {
        "copied": copied,
        "copied_bytes": sum(copied.values()),
        "trainings": len(queue),
        "steps_per_training": steps,
        "ms_per_step_alone": {arm: round(ms, 1) for arm, ms in step_ms.items()},
        "minutes_per_training_alone": {arm: round(value / 60, 1) for arm, value in alone.items()},
        "at_once": given.at_once,
        "gpu_busy_percent": round(100 * len(queue) * with_evaluations * gpu_ms / 1e3 / seconds),
        # The thread that starts operators waits for the GPU without giving up its core.
        "cores": round(sum(1 + loader_ms / step_ms[arm] for arm in queue[: given.at_once]), 1),
        "minutes": minutes,
        "minutes_of_seeds_side_by_side": {
            str(seeds): minutes_of(list(ARMS) * seeds, len(ARMS) * seeds) for seeds in SEEDS
        },
    }
    if math.isfinite(given.minutes):
        # Each run starts the trainings again.
        runs = math.ceil((minutes - START_SECONDS / 60) / max(given.minutes - START_SECONDS / 60, 1e-9))
        planned |= {"minutes_given": given.minutes, "fits": minutes <= given.minutes, "runs": runs}
    return planned


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


def train_all(runs: Sequence[Run], given: argparse.Namespace, data: Path) -> bool:
    """Run the trainings, --at-once side by side; return whether all are finished."""
    deadline = time.monotonic() + 60 * given.minutes
    waiting = [run for run in runs if len(run.history()) < given.epochs]
    active: dict[Run, subprocess.Popen[bytes]] = {}
    seen = {run: len(run.history()) for run in runs}
    failed = False
    with suppress(KeyboardInterrupt), (given.out / SHARES).open("a", encoding="utf-8", buffering=1) as shares:
        while (waiting or active) and time.monotonic() < deadline:
            while waiting and len(active) < given.at_once:
                run = waiting.pop(0)
                run.folder.parent.mkdir(parents=True, exist_ok=True)
                with run.folder.with_suffix(".log").open("ab") as log:
                    # Ctrl-C reaches a process group; with a second signal, a training ends unsaved.
                    command = run.command(given, data)
                    active[run] = subprocess.Popen(command, stdout=log, stderr=log, process_group=0)
            time.sleep(1)
            if (share := gpu_share()) is not None:
                print(share, file=shares)
            for run in list(active):
                code = active[run].poll()
                for row in run.history()[seen[run] :]:
                    seen[run] += 1
                    error = 100 * (1 - row["top1"])
                    line = f"{run.arm} seed {run.seed} epoch {row['epoch']:.0f}: error {error:.2f}"
                    print(line, file=sys.stderr)
                if code is not None:
                    del active[run]
                    if code:
                        failed = True
                        print(f"{run.folder.with_suffix('.log')}: exit code {code}", file=sys.stderr)
    for process in active.values():
        process.send_signal(signal.SIGTERM)  # saves the training
    for process in active.values():
        process.wait()
    return not failed and not active and not waiting


def export(run: Run, out: Path) -> dict[str, Any]:
    """Detach, prove and export the network of *run*; return what the command reports."""
    command = [*SOPDEPLOY, "export", str(run.folder / "last.pt"), "--detach"]
    done = subprocess.run(
        [*command, "--out", str(out / "bundles"), "--json"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        return {"error": done.stderr.strip()}
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def results(runs: Sequence[Run], given: argparse.Namespace) -> dict[str, Any]:
    """Collect the test errors after the last epoch, in percent, and the speed.

    A single seed has no interval: the values of `dsop_minus_plain` that are not finite are None.
    """
    rows = [run.history() for run in runs]
    finished = {
        (run.arm, run.seed): 100 * (1 - row[-1]["top1"])
        for run, row in zip(runs, rows, strict=True)
        if len(row) == given.epochs
    }
    seeds = [seed for seed in range(given.seeds) if all((arm, seed) in finished for arm in ARMS)]
    errors = {arm: [finished[arm, seed] for seed in seeds] for arm in ARMS}
    difference = dataclasses.asdict(paired(errors["dsop"], errors["plain"])) if seeds else {}
    shares = [float(line) for line in (given.out / SHARES).read_text(encoding="utf-8").splitlines()]
    speeds = [row["images_per_second"] for history in rows for row in history if "images_per_second" in row]
    return {
        "printed_error_without_branches": PRINTED,
        "epochs": given.epochs,
        "precision": given.precision,
        "batch_size": given.batch_size,
        "seeds": seeds,
        "errors": errors,
        "dsop_minus_plain": {
            key: value if math.isfinite(value) else None for key, value in difference.items()
        },
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
    is_complete = train_all(runs, given, data)
    found = {**results(runs, given), **provenance()}
    first = next(run for run in runs if run.arm == "dsop")
    if len(first.history()) == given.epochs:
        found["export"] = export(first, given.out)
    text = json.dumps(found, indent=2, allow_nan=False)
    (given.out / "results.json").write_text(f"{text}\n", encoding="utf-8")
    print(text if given.json else "\n".join(describe(found)))
    return 0 if is_complete and "error" not in found.get("export", {"error": ""}) else 1


def positive(text: str) -> int:
    """Convert an argument to a number of at least 1."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text}: not a whole number of at least 1")
    return int(text)


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--data", type=existing, required=True, help="folder of the images")
    parser.add_argument("--out", type=Path, default=Path("runs/paper-row"))
    parser.add_argument("--dry-run", action="store_true", help="print what is copied and the plan of minutes")
    for name, default in (("seeds", 3), ("epochs", 160), ("batch-size", 256)):
        parser.add_argument(f"--{name}", type=positive, default=default)
    parser.add_argument(
        "--at-once",
        type=positive,
        default=6,
        help="trainings side by side (6: by the measured times of Python, with 16 cores, a GPU that needs "
        "4 ms for a step is then busy for at least 80 %% of the time)",
    )
    parser.add_argument("--workers", type=int, default=2, help="loader processes of each training (2)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop and save after this time")
    parser.add_argument("--step-ms", type=float, default=4.0, help="time of a step of 256 on the GPU (4)")
    parser.add_argument(
        "--python-ms",
        type=float,
        nargs=2,
        metavar=("PLAIN", "DSOP"),
        default=PYTHON_MS,
        help="time of Python for a step of each network (as measured on a CPU)",
    )
    return parser.parse_args(words)


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGHUP):  # stop the trainings, as Ctrl-C
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, signal.default_int_handler)
    sys.exit(main(parse_arguments()))
