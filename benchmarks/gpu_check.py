"""Checks this machine's GPU and measures engines on it.

Steps: ONNX Runtime's CUDA provider, a TensorRT engine with CUDA graphs, the decoders `fast` and
`nvimagecodec`, a server on the engine with model swaps, a training run, and the speed of a detached
DSoP-ResNet-50, a GSoP-Net2 and a GM-SOP in fp32 and fp16 against torch eager, torch.compile and ONNX Runtime
on CUDA, copies included.

Prints a line per step. Writes docs/benchmarks/gpu.md and gpu.json if every step succeeds; otherwise exits
with code 1 and leaves both as they are. A step that is left out with --skip is listed as such on the page.

    python benchmarks/gpu_check.py [--quick] [--bundle BUNDLE ...] [--skip STEP ...] [--out FOLDER]

With --bundle, existing bundles are used; then only the training run needs torch. Without TensorRT, skip the
steps tensorrt, server and speed.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from gpu_speed import Case, check_speed, results, slow
from gpu_steps import (
    CheckFailedError,
    check_cuda_runtime,
    check_decoder,
    check_engine,
    check_server,
    check_training,
)
from measure import document, machine, versions

from sopdeploy.bundle.folder import Bundle, open_bundle
from sopdeploy.errors import SopdeployError
from sopdeploy.tensorrt.cuda import open_cuda
from sopdeploy_export.tensorrt.engine import this_machine

ROOT = Path(__file__).parents[1]
NETWORKS = ("dsop-resnet50", "gsop-net2-resnet50", "gmsop-16-8-resnet18")
STEPS = ("cuda", "tensorrt", "decode-fast", "decode-nvimagecodec", "server", "training", "speed")
WITH_ENGINE = {"tensorrt", "server", "speed"}  # the other steps need no TensorRT
PRECISIONS = ("fp32", "fp16")


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="the first network, fewer runs")
    parser.add_argument("--bundle", type=Path, action="append", default=[], help="an existing bundle")
    parser.add_argument("--skip", choices=STEPS, action="append", default=[], help="leave out a step")
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

    for name in NETWORKS[: 1 if given.quick else None]:
        checkpoint = make_checkpoint(name, folder)
        for precision in PRECISIONS:
            bundle = make_bundle(checkpoint, precision, folder)
            yield Case(bundle=bundle, precision=precision, torch=torch_sides(checkpoint, precision))


def functional_steps(bundle: Bundle, folder: Path) -> dict[str, Callable[[], str]]:
    """List the steps that use one *bundle*, by name."""
    return {
        "cuda": partial(check_cuda_runtime, bundle),
        "tensorrt": partial(check_engine, bundle),
        "decode-fast": partial(check_decoder, bundle, "fast"),
        "decode-nvimagecodec": partial(check_decoder, bundle, "nvimagecodec"),
        "server": partial(check_server, bundle, folder / "server"),
        "training": partial(check_training, folder / "training"),
    }


def run_all(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run every step that --skip does not name; return the content of the page."""
    here = None if set(given.skip) >= WITH_ENGINE else this_machine()
    gpu = here.gpu if here else open_cuda().gpu()
    wanted = list(cases(given, folder))
    said: dict[str, str] = {}
    for name, step in functional_steps(open_bundle(wanted[0].bundle), folder).items():
        if name not in given.skip:
            said[name] = step()
            say(f"ok   {name}: {said[name]}")
    runs = 20 if given.quick else 200
    with_cuda = "cuda" not in given.skip
    measured = []
    if here and "speed" not in given.skip:
        for case in wanted:
            measured.append(check_speed(case, here, runs, say, with_cuda=with_cuda))
            say(f"ok   speed: {measured[-1]['bundle']}, {case.precision}")
    if complaints := slow(measured):
        raise CheckFailedError("; ".join(complaints))
    facts = {**machine(), "gpu": gpu.name, "architecture": gpu.architecture, "commit": commit()}
    return {"facts": facts, "steps": said, "skipped": sorted(set(given.skip)), "cases": measured}


def page(found: dict[str, Any]) -> str:
    """Build docs/benchmarks/gpu.md."""
    facts = {"date": datetime.now(UTC).date().isoformat(), **found["facts"], **versions()}
    lines = [
        "# On a GPU",
        "",
        "This page lists what `make gpu-check` checked and measured on a GPU, for readers who check a claim.",
        "",
    ]
    lines += [f"- {key}: {value}" for key, value in facts.items()]
    lines += [
        "",
        "| step | result |",
        "|---|---|",
        *(f"| {name} | {said} |" for name, said in found["steps"].items()),
    ]
    lines += [f"| {name} | not run |" for name in found["skipped"]]
    if found["cases"]:
        lines += ["", "Milliseconds per batch, medians, copies to and from the GPU included:"]
    for case in found["cases"]:
        names = [name for name in case["milliseconds"][0] if name != "batch"]
        lines += ["", f"## {case['bundle']}, {case['precision']}", ""]
        lines += [f"Built in {case['build_seconds']} s; all probes within their tolerance.", ""]
        lines += [f"| batch | {' | '.join(names)} |", "|" + "---|" * (len(names) + 1)]
        lines += [
            f"| {row['batch']} | {' | '.join(str(row[n]) for n in names)} |" for row in case["milliseconds"]
        ]
        told = ", ".join(f"{name} {rate}" for name, rate in case["images_per_second"].items())
        lines += ["", f"Images per second over consecutive batches: {told}."]
    return "\n".join(lines) + "\n"


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
        with tempfile.TemporaryDirectory() as folder:
            found = run_all(given, Path(folder))
    except (SopdeployError, CheckFailedError) as problem:
        say(f"gpu-check: {problem}")
        return 1
    summary = document(
        results(found["cases"]), **found["facts"], steps=found["steps"], skipped=found["skipped"]
    )
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "gpu.json").write_text(json.dumps(summary, indent=2) + "\n")
    (given.out / "gpu.md").write_text(page(found))
    say(f"written: {given.out / 'gpu.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
