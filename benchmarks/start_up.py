"""Start-up time and memory of the server.

Starts `sopdeploy serve` several times for a detached DSoP ResNet-18 (random weights, exported here unless
--bundle names another bundle) in ONNX Runtime on the CPU, and measures the time until the server prints
`ready:` and until it has classified the first image. Processor time and resident memory are those at
`ready:`. On a busy machine, processor time is more reliable than wall time.

    python benchmarks/start_up.py [--bundle BUNDLE] [--quick] [--json]
"""

import http.client
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import urlsplit

import torch
from measure import Result, make_parser, report
from random_checkpoint import checkpoint

from sopdeploy.models.registry import create_model
from sopdeploy_export.options import ExportOptions
from sopdeploy_export.pipeline import export_checkpoint

ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("SOPDEPLOY_")}


def random_bundle(folder: Path) -> Path:
    """Export a detached DSoP ResNet-18 with random weights into *folder*."""
    torch.manual_seed(0)
    path = checkpoint("dsop-resnet18", create_model("dsop-resnet18"), folder)
    return export_checkpoint(path, folder, options=ExportOptions(detach=True)).path


def start(bundle: Path) -> dict[str, float]:
    """Start the server for *bundle*, classify an image, and stop it."""
    command = [sys.executable, "-m", "sopdeploy", "serve", str(bundle.resolve()), "--port", "0"]
    command += ["--runtime", "onnxruntime-cpu"]
    image = (bundle / "golden-0.jpg").read_bytes()
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
        began_request = time.perf_counter()
        classify(line.split()[1], image)
        answered = ready + time.perf_counter() - began_request
        if "libtorch" in proc.joinpath("maps").read_text():
            sys.exit("the server loaded torch")
        server.send_signal(signal.SIGTERM)
        server.communicate()
    return {
        "ready_ms": ready * 1000,
        "first_answer_ms": answered * 1000,
        "processor_ms": sum(map(int, fields[11:13])) * 1000 / os.sysconf("SC_CLK_TCK"),
        "resident_mb": resident / 1e6,
    }


def classify(url: str, image: bytes) -> None:
    """Classify *image* at the server *url*; end the program if that fails."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc)
    connection.request("POST", "/v1/classify", image)
    response = connection.getresponse()
    if response.status != http.HTTPStatus.OK:
        sys.exit(f"status {response.status}: {response.read().decode()}")
    response.read()
    connection.close()


def run(bundle: Path, runs: int) -> list[Result]:
    """Measure *runs* starts after one warm-up; return medians."""
    starts = [start(bundle) for _ in range(runs + 1)][1:]
    return [
        Result(
            case=name,
            ours=round(statistics.median(values[name] for values in starts), 1),
            unit="MB" if name.endswith("_mb") else "ms",
            runs=runs,
        )
        for name in starts[0]
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
