"""Builds real engines on this machine's GPU, verifies them and measures their speed.

Builds engines of a detached DSoP-ResNet-50, a GSoP-Net2 and a GM-SOP in fp32 and fp16, and times them,
including copies to and from the GPU, against torch eager, torch.compile and ONNX
Runtime on CUDA. Writes docs/benchmarks/engines.md and engines.json.
Exits with code 1 and one line if there is no GPU or no TensorRT.

    python benchmarks/gpu_check.py [--quick] [--bundle BUNDLE ...] [--out FOLDER]

With --bundle, existing bundles are used and torch is not needed; TensorRT 8.6 needs this with
Python 3.10.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
from measure import Result, document, interleaved, machine, versions
from numpy.typing import NDArray

from sopdeploy.bundle.folder import Bundle, open_bundle
from sopdeploy.bundle.manifest import Manifest
from sopdeploy.errors import RuntimeUnavailableError, SopdeployError
from sopdeploy.tensorrt.session import EngineSession
from sopdeploy_export.tensorrt.engine import EngineOptions, Machine, get_engine, this_machine
from sopdeploy_service.runtime.onnxruntime import CUDA, OnnxRuntime

ROOT = Path(__file__).parents[1]
NETWORKS = ("dsop-resnet50", "gsop-net2-resnet50", "gmsop-16-8-resnet18")
BATCHES = (1, 8, 32)
WANTED = 1.5  # times torch.compile at batch 1
Run = Callable[[Any], Any]


@dataclass(frozen=True)
class Case:
    """One bundle, and functions that run the same network in torch, if it is installed."""

    bundle: Path
    precision: str
    torch: dict[str, Run]


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="the first network, fewer runs")
    parser.add_argument("--bundle", type=Path, action="append", default=[], help="an existing bundle")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "docs" / "benchmarks", help="folder for the results"
    )
    return parser.parse_args()


def cases(given: argparse.Namespace, folder: Path) -> Iterator[Case]:
    """Yield the bundles to check."""
    if given.bundle:
        for path in given.bundle:
            yield Case(bundle=path, precision=open_bundle(path).manifest.precision, torch={})
        return
    from gpu_networks import make_bundle, make_checkpoint, torch_sides  # noqa: PLC0415  needs torch

    written = get_args(Manifest.model_fields["precision"].annotation)
    for name in NETWORKS[: 1 if given.quick else None]:
        checkpoint = make_checkpoint(name, folder)
        for precision in [known for known in ("fp32", "fp16") if known in written]:
            bundle = make_bundle(checkpoint, precision, folder)
            yield Case(bundle=bundle, precision=precision, torch=torch_sides(checkpoint, precision))


def check(case: Case, here: Machine, runs: int) -> dict[str, Any]:
    """Build the engine of *case*, which includes its probes, and compare its speed with other runtimes."""
    bundle = open_bundle(case.bundle)
    begin = time.monotonic()
    built = get_engine(bundle, EngineOptions(profiles=",".join(map(str, BATCHES))), say)
    seconds = time.monotonic() - begin
    again = get_engine(bundle, EngineOptions(profiles=",".join(map(str, BATCHES))))
    with ExitStack() as stack:
        plan = built.path.read_bytes()
        key = built.record.key
        session = EngineSession(here.trt, here.cuda, plan, bundle.manifest, key)
        stack.callback(session.close)
        sides = {"TensorRT": session.run, **case.torch, **onnxruntime_side(bundle)}
        rows = [timed(bundle, sides, batch, runs) for batch in BATCHES]
        rates = back_to_back(session, bundle, max(BATCHES), runs)
    return {
        "bundle": bundle.name,
        "precision": case.precision,
        "build_seconds": round(seconds, 1),
        "from_cache_the_second_time": again.reason is None,
        "receipt": built.record.receipt.model_dump(mode="json"),
        "replays": [replay.model_dump(mode="json") for replay in built.record.replays],
        "plan_bytes": built.record.plan_bytes,
        "milliseconds": rows,
        "images_per_second": rates,
        "runs": runs,
    }


def onnxruntime_side(bundle: Bundle) -> dict[str, Run]:
    """Create a function that runs ONNX Runtime on CUDA, or none if it is not available."""
    try:
        return {"onnxruntime CUDA": OnnxRuntime(bundle, provider=CUDA).run}
    except RuntimeUnavailableError as problem:
        say(f"without onnxruntime on CUDA: {problem}")
        return {}


def timed(bundle: Bundle, sides: dict[str, Run], batch: int, runs: int) -> dict[str, Any]:
    """Measure the median milliseconds of each runtime for one batch, alternately."""
    images = noise(bundle, batch)
    seconds = interleaved([lambda run=run: run(images) for run in sides.values()], runs=runs, warmups=10)
    medians = {name: statistics.median(taken) * 1e3 for name, taken in zip(sides, seconds, strict=True)}
    return {"batch": batch, **{name: round(value, 3) for name, value in medians.items()}}


def noise(bundle: Bundle, batch: int) -> NDArray[np.uint8]:
    """Generate *batch* images of the size of *bundle*."""
    shape = (batch, *bundle.manifest.image_shape)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def back_to_back(session: EngineSession, bundle: Bundle, batch: int, runs: int) -> dict[str, int]:
    """Measure images per second with one batch and with two batches in flight."""
    images = list(noise(bundle, batch))

    def one_at_a_time() -> None:
        for _ in range(runs):
            session.begin(images)()

    def two_under_way() -> None:
        end = session.begin(images)
        for _ in range(runs - 1):
            following = session.begin(images)
            end()
            end = following
        end()

    alone, two = interleaved([one_at_a_time, two_under_way], runs=5, warmups=1)
    rates = [round(batch * runs / statistics.median(seconds)) for seconds in (alone, two)]
    return {"batch": batch, **dict(zip(("one at a time", "two under way"), rates, strict=True))}


def page(found: dict[str, Any]) -> str:
    """Build docs/benchmarks/engines.md."""
    facts = {**found["machine"], "commit": found["commit"], **found["versions"]}
    lines = [
        "# Engines on a GPU",
        "",
        "Written by `make gpu-check`. Milliseconds per batch, medians, copies included.",
        "",
    ]
    lines += [f"- {key}: {value}" for key, value in facts.items()]
    for case in found["cases"]:
        names = [name for name in case["milliseconds"][0] if name != "batch"]
        lines += ["", f"## {case['bundle']}, {case['precision']}", ""]
        lines += [
            f"Built in {case['build_seconds']} s; all probes within their tolerance; precision as requested.",
            "",
        ]
        lines += [f"| batch | {' | '.join(names)} |", "|" + "---|" * (len(names) + 1)]
        lines += [
            f"| {row['batch']} | {' | '.join(str(row[n]) for n in names)} |" for row in case["milliseconds"]
        ]
        told = ", ".join(f"{name} {rate}" for name, rate in case["images_per_second"].items())
        lines += ["", f"Images per second of one batch after the other: {told}."]
    return "\n".join(lines) + "\n"


def results(checked: list[dict[str, Any]]) -> list[Result]:
    """Build the results: milliseconds per batch of TensorRT against every other runtime."""
    return [
        Result(
            case=f"{case['bundle']} {case['precision']}, batch {row['batch']}",
            against=name,
            ours=row["TensorRT"],
            other=milliseconds,
            unit="ms",
            runs=case["runs"],
        )
        for case in checked
        for row in case["milliseconds"]
        for name, milliseconds in row.items()
        if name not in {"batch", "TensorRT"}
    ]


def slow(found: dict[str, Any]) -> list[str]:
    """List the cases whose engine misses its required speed-up over torch.compile at batch size 1."""
    rows = [(case["bundle"], case["precision"], case["milliseconds"][0]) for case in found["cases"]]
    return [
        f"{bundle} {precision}: {row['torch.compile'] / row['TensorRT']:.2f} times torch.compile at batch 1"
        for bundle, precision, row in rows
        if row.get("torch.compile", float("inf")) < WANTED * row["TensorRT"]
    ]


def commit() -> str:
    """Read the measured commit."""
    git = shutil.which("git")
    if git is None:
        return "unknown"
    found = subprocess.run([git, "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def say(text: str) -> None:
    """Print one line of progress."""
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    """Check this machine; return the exit code."""
    given = arguments()
    try:
        here = this_machine()
        with tempfile.TemporaryDirectory() as folder:
            checked = [check(case, here, 20 if given.quick else 200) for case in cases(given, Path(folder))]
    except SopdeployError as problem:
        say(f"gpu-check: {problem}")
        return 1
    facts = {**machine(), "gpu": here.gpu.name, "architecture": here.gpu.architecture}
    found = {"machine": facts, "commit": commit(), "versions": versions(), "cases": checked}
    summary = document(
        results(checked), gpu=here.gpu.name, architecture=here.gpu.architecture, commit=commit()
    )
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "engines.json").write_text(json.dumps(summary, indent=2) + "\n")
    (given.out / "engines.md").write_text(page(found))
    say(f"written: {given.out / 'engines.md'}")
    for complaint in slow(found):
        say(f"gpu-check: {complaint}; at least {WANTED} are wanted")
    return 1 if slow(found) else 0


if __name__ == "__main__":
    sys.exit(main())
