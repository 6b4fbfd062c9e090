"""A row of a paper at its scale: ResNet-20 on CIFAR-10 with and without DSoP branches (DSoP, Table IX).

    python benchmarks/paper_row.py --data FOLDER [--seeds 3] [--epochs 160] [--precision bf16]
        [--out FOLDER] [--at-once 4] [--minutes 30]

--data has the folders train and test with one folder of images per class. The recipe is
`cifar10-dsop-resnet20`. --at-once trainings run side by side, those of a seed next to each
other. Each writes its epochs to --out at once. After --minutes, Ctrl-C, SIGTERM or the end of
the terminal, all are stopped and saved; the same command goes on. At the end come the test
errors, their paired difference over the seeds with its interval, and the first network with
branches, which is detached, proved equal and exported: results.json in --out. Exit status 1: a
failed training or export, or an unfinished one.
"""

import argparse
import csv
import dataclasses
import json
import math
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from gain.paired import paired
from measure import existing, make_parser, provenance

SOPDEPLOY = [sys.executable, "-m", "sopdeploy"]
RECIPE = "cifar10-dsop-resnet20"
ARMS = {"plain": "resnet20", "dsop": "dsop-resnet20"}
PRINTED = 7.92  # error of the network without branches in Table IX, in percent


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """One training: its arm, its seed and its folder."""

    arm: str
    seed: int
    folder: Path

    def command(self, given: argparse.Namespace) -> list[str]:
        """Return the command that starts or continues the training."""
        # 80 and 120 of 160 epochs
        milestones = sorted({max(1, given.epochs // 2), max(1, given.epochs * 3 // 4)})
        settings = {
            "data.kind": "folder",
            "data.path": given.data,
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
        words = [
            word for key, value in settings.items() for word in ("--set", f"{key}={value}")
        ]
        train = [*SOPDEPLOY, "train", "--recipe", RECIPE, *words]
        return [*train, "--out", str(self.folder), "--resume", "auto"]

    def history(self) -> list[dict[str, float]]:
        """Read the epochs so far."""
        path = self.folder / "history.csv"
        if not path.is_file():
            return []
        with path.open(encoding="utf-8", newline="") as file:
            return [
                {key: float(value) for key, value in row.items() if value}
                for row in csv.DictReader(file)
            ]


def train_all(runs: Sequence[Run], given: argparse.Namespace) -> bool:
    """Run the trainings, --at-once side by side; return whether all are finished."""
    deadline = time.monotonic() + 60 * given.minutes
    waiting = [run for run in runs if len(run.history()) < given.epochs]
    active: dict[Run, subprocess.Popen[bytes]] = {}
    seen = {run: len(run.history()) for run in runs}
    failed = False
    with suppress(KeyboardInterrupt):
        while (waiting or active) and time.monotonic() < deadline:
            while waiting and len(active) < given.at_once:
                run = waiting.pop(0)
                run.folder.parent.mkdir(parents=True, exist_ok=True)
                with run.folder.with_suffix(".log").open("ab") as log:
                    # Ctrl-C reaches a process group; with a second signal, a training ends
                    # unsaved.
                    command = run.command(given)
                    active[run] = subprocess.Popen(
                        command, stdout=log, stderr=log, process_group=0
                    )
            time.sleep(1)
            for run in list(active):
                code = active[run].poll()
                for row in run.history()[seen[run] :]:
                    seen[run] += 1
                    error = 100 * (1 - row["top1"])
                    line = (
                        f"{run.arm} seed {run.seed} epoch {row['epoch']:.0f}: error {error:.2f}"
                    )
                    print(line, file=sys.stderr)
                if code is not None:
                    del active[run]
                    if code:
                        failed = True
                        print(
                            f"{run.folder.with_suffix('.log')}: exit code {code}",
                            file=sys.stderr,
                        )
    for process in active.values():
        process.send_signal(signal.SIGTERM)  # saves the training
    for process in active.values():
        process.wait()
    return not failed and not active and not waiting


def export(run: Run, out: Path) -> dict[str, Any]:
    """Detach, prove and export the network of *run*; return what the command reports."""
    command = [*SOPDEPLOY, "export", str(run.folder / "last.pt"), "--detach"]
    done = subprocess.run(
        [*command, "--out", str(out / "bundles"), "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        return {"error": done.stderr.strip()}
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def results(runs: Sequence[Run], given: argparse.Namespace) -> dict[str, Any]:
    """Collect the test errors after the last epoch, in percent, and the speed.

    A single seed has no interval: the values of `dsop_minus_plain` that are not finite are
    None.
    """
    rows = [run.history() for run in runs]
    finished = {
        (run.arm, run.seed): 100 * (1 - row[-1]["top1"])
        for run, row in zip(runs, rows, strict=True)
        if len(row) == given.epochs
    }
    seeds = [
        seed for seed in range(given.seeds) if all((arm, seed) in finished for arm in ARMS)
    ]
    errors = {arm: [finished[arm, seed] for seed in seeds] for arm in ARMS}
    difference = dataclasses.asdict(paired(errors["dsop"], errors["plain"])) if seeds else {}
    speeds = [
        row["images_per_second"]
        for history in rows
        for row in history
        if "images_per_second" in row
    ]
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
    }


def main(given: argparse.Namespace) -> int:
    """Train and report."""
    given.out.mkdir(parents=True, exist_ok=True)
    folders = [
        (arm, seed, given.out / arm / f"seed-{seed}")
        for seed in range(given.seeds)
        for arm in ARMS
    ]
    runs = [Run(*values) for values in folders]
    is_complete = train_all(runs, given)
    found = {**results(runs, given), **provenance()}
    first = next(run for run in runs if run.arm == "dsop")
    if len(first.history()) == given.epochs:
        found["export"] = export(first, given.out)
    text = json.dumps(found, indent=2, allow_nan=False)
    (given.out / "results.json").write_text(f"{text}\n", encoding="utf-8")
    print(text)
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
    for name, default in (("seeds", 3), ("epochs", 160), ("batch-size", 256), ("at-once", 4)):
        parser.add_argument(f"--{name}", type=positive, default=default)
    parser.add_argument(
        "--workers", type=int, default=2, help="loader processes of each training (2)"
    )
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="stop and save after this time"
    )
    return parser.parse_args(words)


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGHUP):  # stop the trainings, as Ctrl-C
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, signal.default_int_handler)
    sys.exit(main(parse_arguments()))
