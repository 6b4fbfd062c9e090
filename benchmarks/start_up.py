"""How soon is a server ready, how much memory has it then, and where did the time go?

Starts `sopdeploy serve` several times for a detached DSoP ResNet-18 (random weights, exported here unless
--bundle names another bundle) and reads its own timeline, its processor time and its resident memory at the
moment of the `ready:` line. On a busy machine the processor time says more than the wall clock.

    python benchmarks/start_up.py [--bundle BUNDLE] [--quick] [--json]
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from detached_latency import checkpoint
from measure import machine, versions

from sopdeploy.models.registry import create_model
from sopdeploy_export.pipeline import ExportOptions, export

ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("SOPDEPLOY_")}


def random_bundle(folder: Path) -> Path:
    """Export a detached DSoP ResNet-18 with random weights into *folder*."""
    torch.manual_seed(0)
    path = checkpoint("dsop-resnet18", create_model("dsop-resnet18"), folder)
    return export(path, folder, ExportOptions(detach=True)).path


def start(bundle: Path) -> dict[str, Any]:
    """Start a server for *bundle*, look at it when it is ready, and stop it."""
    command = [sys.executable, "-m", "sopdeploy", "serve", str(bundle), "--port", "0", "--log", "json"]
    began = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    ) as server:
        line = server.stdout.readline() if server.stdout is not None else ""
        ready = time.perf_counter() - began
        if not line.startswith("ready: "):
            sys.exit(server.communicate()[1])
        proc = Path(f"/proc/{server.pid}")
        fields = proc.joinpath("stat").read_text().rpartition(")")[2].split()
        resident = int(proc.joinpath("statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        torch = "libtorch" in proc.joinpath("maps").read_text()
        server.send_signal(signal.SIGTERM)
        events = [json.loads(text) for text in server.communicate()[1].splitlines()]
    steps = next(event["steps_ms"] for event in events if event["event"] == "started")
    return {
        "ready_ms": ready * 1000,
        "processor_ms": sum(map(int, fields[11:13])) * 1000 / os.sysconf("SC_CLK_TCK"),
        "resident_mb": resident / 1e6,
        "torch": torch,
        **{f"step {name}": spent for name, spent in steps.items()},
    }


def run(bundle: Path, runs: int) -> dict[str, Any]:
    """Return medians over *runs* starts, after one that warms the disk's cache."""
    found = [start(bundle) for _ in range(runs + 1)][1:]
    figures = {name: statistics.median(one[name] for one in found) for name in found[0] if name != "torch"}
    figures["fastest ready_ms"] = min(one["ready_ms"] for one in found)
    figures["model_mb"] = (bundle / "model.onnx").stat().st_size / 1e6
    figures["resident_without_model_mb"] = figures["resident_mb"] - figures["model_mb"]
    return {name: round(value, 1) for name, value in figures.items()} | {
        "torch": any(one["torch"] for one in found)
    }


def main() -> None:
    """Print the figures or a JSON document."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, help="a bundle; else one is exported, which takes a minute")
    parser.add_argument("--quick", action="store_true", help="3 starts instead of 9")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bundle = arguments.bundle or random_bundle(Path(folder))
        figures = run(bundle, 3 if arguments.quick else 9)
    if arguments.json:
        facts = {"load": os.getloadavg()[0]}
        print(
            json.dumps({"machine": machine() | facts, "versions": versions(), "results": figures}, indent=2)
        )
        return
    for name, value in figures.items():
        print(f"{name:28} {value}")


if __name__ == "__main__":
    main()
