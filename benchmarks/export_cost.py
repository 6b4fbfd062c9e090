"""Time and memory of an export by step, including certificate and parity.

Exports networks with random weights with --detach, each in its own process, because the peak memory
of a process never decreases. Processor seconds include all threads; other load affects them least. The limits
are for two cores: 90 seconds and 4 GB for DSoP ResNet-50, 60 seconds for ResNet-18.

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
from measure import Result, parse, report

from sopdeploy.models.registry import create_model
from sopdeploy_export.options import ExportOptions
from sopdeploy_export.pipeline import export_checkpoint

BOUNDS = {"dsop-resnet18": (60, 4.0), "dsop-resnet50": (90, 4.0)}  # seconds, GB


def measured(path: Path, folder: Path) -> dict[str, Any]:
    """Export the checkpoint at *path* into *folder* and measure each step and the total."""
    marks: list[tuple[str, float, float]] = []

    def step(name: str) -> None:
        marks.append((name, perf_counter(), process_time()))

    export_checkpoint(path, folder, options=ExportOptions(detach=True), on_step=step)
    step("end")
    return {
        "steps": {
            name: {"wall": end_wall - wall, "processor": end_processor - processor}
            for (name, wall, processor), (_, end_wall, end_processor) in pairwise(marks)
        },
        "wall_seconds": marks[-1][1] - marks[0][1],
        "processor_seconds": marks[-1][2] - marks[0][2],
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
    }


def in_a_process(name: str, folder: Path) -> dict[str, Any]:
    """Measure the export of network *name* with random weights in a new process."""
    torch.manual_seed(0)
    path = checkpoint(name, create_model(name), folder)
    command = [sys.executable, __file__, "--one", str(path), str(folder / "bundles")]
    costs: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return costs


def results(name: str, costs: dict[str, Any]) -> list[Result]:
    """Build the results of one network: totals compared with their limits, then every step."""
    seconds, memory = BOUNDS[name]
    totals = (("wall time", "wall_seconds", "s", seconds), ("peak memory", "peak_gb", "GB", memory))
    return [
        *(
            Result(case=f"{name}: {what}", against="limit", ours=costs[key], other=limit, unit=unit, runs=1)
            for what, key, unit, limit in totals
        ),
        Result(case=f"{name}: processor time", ours=costs["processor_seconds"], unit="cpu-s", runs=1),
        *(
            Result(case=f"{name}: {step}", ours=cost["processor"], unit="cpu-s", runs=1)
            for step, cost in costs["steps"].items()
        ),
    ]


def main() -> None:
    """Run from the command line; `--one` measures a single export in this process."""
    if "--one" in sys.argv:
        print(json.dumps(measured(Path(sys.argv[-2]), Path(sys.argv[-1]))))
        return
    arguments = parse(__doc__)
    rows: list[Result] = []
    for name in list(BOUNDS)[: 1 if arguments.quick else None]:
        with tempfile.TemporaryDirectory() as folder:
            rows += results(name, in_a_process(name, Path(folder)))
    report(rows, as_json=arguments.json)


if __name__ == "__main__":
    main()
