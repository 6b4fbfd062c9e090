"""What does an export cost: seconds and memory of every step, certificate and parity included.

Exports networks of random weights with --detach, each in a process of its own, because the largest memory
of a process never falls. Processor seconds count all threads, and other work disturbs them least; the bounds
are those of two cores: 90 seconds and 4 GB for DSoP ResNet-50, 60 seconds for ResNet-18.

    python benchmarks/export_cost.py [--quick] [--json]
"""

import json
import resource
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch
from detached_latency import checkpoint
from measure import machine, parse, versions

from sopdeploy.models.registry import create_model
from sopdeploy_export.pipeline import ExportOptions, export

BOUNDS = {"dsop-resnet18": (60, 4.0), "dsop-resnet50": (90, 4.0)}  # seconds, GB


def measured(path: Path, folder: Path) -> dict[str, Any]:
    """Return the cost of exporting the checkpoint at *path* into *folder*, by step and in all."""
    marks: list[tuple[str, float, float]] = []

    def step(name: str) -> None:
        marks.append((name, perf_counter(), process_time()))

    export(path, folder, ExportOptions(detach=True), step)
    step("end")
    pairs = list(pairwise(marks))
    return {
        "steps": {a[0]: {"wall": b[1] - a[1], "processor": b[2] - a[2]} for a, b in pairs},
        "wall_seconds": marks[-1][1] - marks[0][1],
        "processor_seconds": marks[-1][2] - marks[0][2],
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
    }


def in_a_process(name: str, folder: Path) -> dict[str, Any]:
    """Return the cost of exporting *name*, with random weights, in a new process."""
    torch.manual_seed(0)
    path = checkpoint(name, create_model(name), folder)
    command = [sys.executable, __file__, "--one", str(path), str(folder / "bundles")]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    seconds, memory = BOUNDS[name]
    return {"model": name, "seconds_allowed": seconds, "gb_allowed": memory, **found}


def show(row: dict[str, Any]) -> None:
    """Print one network's cost, step by step."""
    for name, cost in row["steps"].items():
        print(f"  {name:50} {cost['wall']:8.1f} s {cost['processor']:8.1f} cpu-s")
    print(
        f"{row['model']}: {row['wall_seconds']:.1f} s, {row['processor_seconds']:.1f} cpu-s "
        f"(allowed {row['seconds_allowed']} s), peak {row['peak_gb']:.2f} GB (allowed {row['gb_allowed']:g})"
    )


def main() -> None:
    """Print the table or the JSON document; `--one` is a process's own half."""
    if "--one" in sys.argv:
        print(json.dumps(measured(Path(sys.argv[-2]), Path(sys.argv[-1]))))
        return
    arguments = parse(__doc__)
    rows = []
    for name in list(BOUNDS)[: 1 if arguments.quick else None]:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(in_a_process(name, Path(folder)))
    if arguments.json:
        print(json.dumps({"machine": machine(), "versions": versions(), "results": rows}, indent=2))
        return
    print(", ".join(f"{key} {value}" for key, value in (machine() | versions()).items()))
    for row in rows:
        show(row)


if __name__ == "__main__":
    main()
