"""Checks this machine's GPU in stages of at most five minutes each.

    python benchmarks/gpu_bundles.py build/gpu                      # once, needs torch but no GPU
    python benchmarks/gpu_check.py build/gpu [STAGE ...] [--again] [--out FOLDER]

Each stage runs in a process of its own and writes `gpu-STAGE.json` when it ends; gpu.md lists all of them. A
stage that succeeded for the same commit is not repeated, so the command continues where it stopped. A stage
that fails does not prevent the others; the exit code is then 1. Without TensorRT, the stage `tensorrt` fails
and the others use ONNX Runtime.
"""

import argparse
import json
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from measure import commit, existing, machine, versions

ROOT = Path(__file__).parents[1]
STAGES = (
    "cuda",
    "decode-fast",
    "decode-nvimagecodec",
    "decoding",
    "training",
    "server",
    "http",
    "tensorrt",
    "speed",
)
STAGE_SECONDS = 300.0


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundles", type=existing, help="folder that gpu_bundles.py has written")
    parser.add_argument("stages", nargs="*", choices=[[], *STAGES], metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("--again", action="store_true", help="repeat stages that succeeded for this commit")
    parser.add_argument("--quick", action="store_true", help="fewer timed runs")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "docs" / "benchmarks", help="folder for the results"
    )
    return parser.parse_args()


def run_stage(stage: str, bundles: Path, *, quick: bool, seconds: float = STAGE_SECONDS) -> dict[str, Any]:
    """Run *stage* in its own process, because an error of CUDA ends all CUDA work of a process."""
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_stages.py"), stage, str(bundles)]
    begin = time.monotonic()
    try:
        done = subprocess.run(
            [*command, *(["--quick"] if quick else [])],
            capture_output=True, text=True, timeout=seconds, check=False,
        )  # fmt: skip
        result = json.loads(done.stdout.splitlines()[-1]) if done.stdout and not done.returncode else None
        failure = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    except subprocess.TimeoutExpired:
        result, failure = None, f"not finished after {seconds:.0f} s"
    return {
        "stage": stage,
        "passed": result is not None,
        "seconds": round(time.monotonic() - begin, 1),
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "machine": machine(),
        "versions": versions(),
        **(result or {"text": failure, "gpu": "", "tables": []}),
    }


def page(results: list[dict[str, Any]]) -> str:
    """Build docs/benchmarks/gpu.md from the results of the stages that ran."""
    lines = [
        "# On a GPU",
        "",
        "This page lists what `make gpu-check` checked and measured on a GPU, for readers who check a claim.",
        "",
        "| stage | result | seconds | GPU | date | commit |",
        "|---|---|---|---|---|---|",
    ]
    stages = {result["stage"]: result for result in results}
    for stage in STAGES:
        if result := stages.get(stage):
            text = result["text"] if result["passed"] else f"failed: {result['text']}"
            cells = (text, result["seconds"], result["gpu"], result["date"], result["commit"][:12])
        else:
            cells = ("not run", "", "", "", "")
        lines.append(f"| {stage} | {' | '.join(map(str, cells))} |")
    for table in (table for result in results for table in result["tables"]):
        lines += ["", f"## {table['title']}", "", table["text"], ""]
        lines += [f"| {' | '.join(table['columns'])} |", "|" + "---|" * len(table["columns"])]
        lines += [f"| {' | '.join(map(str, row))} |" for row in table["rows"]]
    if results:
        facts = results[-1]["machine"] | results[-1]["versions"]
        lines += ["", "Machine and versions of the last stage:", ""]
        lines += [f"- {key}: {value}" for key, value in facts.items()]
    return "\n".join(lines) + "\n"


def stored(out: Path) -> dict[str, dict[str, Any]]:
    """Read the results of earlier calls from *out*, by stage."""
    paths = {stage: out / f"gpu-{stage}.json" for stage in STAGES}
    return {stage: json.loads(path.read_text()) for stage, path in paths.items() if path.is_file()}


def main() -> int:
    """Check this machine; return the exit code."""
    options = arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    stages = options.stages or STAGES
    for stage in stages:
        earlier = stored(options.out).get(stage, {})
        if earlier.get("passed") and earlier["commit"] == commit() and not options.again:
            print(f"ok   {stage}: done before", file=sys.stderr, flush=True)
            continue
        result = run_stage(stage, options.bundles, quick=options.quick)
        (options.out / f"gpu-{stage}.json").write_text(json.dumps(result, indent=2) + "\n")
        (options.out / "gpu.md").write_text(page(list(stored(options.out).values())))
        mark = "ok  " if result["passed"] else "FAIL"
        print(f"{mark} {stage}: {result['text']}", file=sys.stderr, flush=True)
    results = stored(options.out)
    return 0 if all(results[stage]["passed"] for stage in stages) else 1


if __name__ == "__main__":
    sys.exit(main())
