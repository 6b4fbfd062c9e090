"""Start-up time and memory of the server.

Starts `sopdeploy serve` several times for a detached DSoP ResNet-18 (random weights, exported here unless
--bundle names another bundle) and reads the server's processor time and resident memory when it prints
`ready:`. On a busy machine, processor time is more reliable than wall time.

    python benchmarks/start_up.py [--bundle BUNDLE] [--quick] [--json]
"""

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
from measure import Result, make_parser, report

from sopdeploy.models.registry import create_model
from sopdeploy_export.options import ExportOptions
from sopdeploy_export.pipeline import export

ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("SOPDEPLOY_")}


def random_bundle(folder: Path) -> Path:
    """Export a detached DSoP ResNet-18 with random weights into *folder*."""
    torch.manual_seed(0)
    path = checkpoint("dsop-resnet18", create_model("dsop-resnet18"), folder)
    return export(path, folder, ExportOptions(detach=True)).path


def start(bundle: Path) -> dict[str, Any]:
    """Start a server for *bundle*, measure it when it is ready, and stop it."""
    command = [sys.executable, "-m", "sopdeploy", "serve", str(bundle), "--port", "0"]
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
        server.communicate()
    return {
        "ready_ms": ready * 1000,
        "processor_ms": sum(map(int, fields[11:13])) * 1000 / os.sysconf("SC_CLK_TCK"),
        "resident_mb": resident / 1e6,
        "torch": torch,
    }


def run(bundle: Path, runs: int) -> list[Result]:
    """Measure *runs* starts after one warm-up; values are medians except for the fastest start."""
    found = [start(bundle) for _ in range(runs + 1)][1:]
    if any(one.pop("torch") for one in found):
        sys.exit("the server loaded torch")
    values = {name: statistics.median(one[name] for one in found) for name in found[0]}
    values["fastest ready_ms"] = min(one["ready_ms"] for one in found)
    values["model_mb"] = (bundle / "model.onnx").stat().st_size / 1e6
    values["resident_without_model_mb"] = values["resident_mb"] - values["model_mb"]
    return [
        Result(case=name, ours=round(value, 1), unit="MB" if name.endswith("_mb") else "ms", runs=runs)
        for name, value in values.items()
    ]


def main() -> None:
    """Run from the command line."""
    parser = make_parser(__doc__)
    parser.add_argument(
        "--bundle", type=Path, help="a bundle; by default one is exported, which takes a minute"
    )
    parser.add_argument("--quick", action="store_true", help="3 starts instead of 9")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bundle = arguments.bundle or random_bundle(Path(folder))
        results = run(bundle, 3 if arguments.quick else 9)
    report(results, as_json=arguments.json, load=os.getloadavg()[0])


if __name__ == "__main__":
    main()
