"""Checks this machine's GPU in stages of at most five minutes each, the most valuable first.

    python benchmarks/gpu_bundles.py build/gpu                      # once, needs torch but no GPU
    python benchmarks/gpu_check.py build/gpu [STAGE ...] [--again] [--out FOLDER] [--resume FILE]

What a stage needs is checked first, one line for each. Each stage runs in a process of its own. Its result
is a line of JSON on stdout and in OUT/gpu.jsonl when it ends, and each row of a table is one on stdout once
measured; gpu.md lists the results. A stage that succeeded for the same commit is not repeated: neither one
of gpu.jsonl nor one of the file that --resume names, such as the stdout of an earlier call. A stage that
fails, or whose library is missing, does not prevent the others; the exit code is then 1.
"""

import argparse
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from measure import commit, existing, machine, versions

ROOT = Path(__file__).parents[1]
STAGES = (
    "cuda-fp32",
    "cuda-fp16",
    "cuda-int8",
    "server",
    "training",
    "tensorrt",
    "speed",
    "tests",
)
STAGE_SECONDS = 300.0
LOG_LINES = 30  # of the stderr of a stage, kept in its result
OLDEST_DRIVER = 580  # of CUDA 13
NEEDED = {  # packages, and what does not run without them
    "onnxruntime": "all stages",
    "uvicorn": "server",
    "cuda.bindings": "all stages: the name of the GPU",
    "torch": "training, speed",
    "tensorrt": "tensorrt",
    "torch_tensorrt": "the second way of the stage tensorrt",
    "pytest": "tests",
}


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundles", type=existing, help="folder that gpu_bundles.py has written")
    parser.add_argument("stages", nargs="*", choices=[[], *STAGES], metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("--again", action="store_true", help="repeat stages that succeeded for this commit")
    parser.add_argument("--quick", action="store_true", help="fewer timed runs")
    parser.add_argument("--resume", type=existing, help="file with the JSON lines of an earlier call")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "docs" / "benchmarks", help="folder for the results"
    )
    return parser.parse_args()


def preconditions() -> list[str]:
    """Describe what this machine has and lacks, one line for each."""
    lines = []
    driver = Path("/proc/driver/nvidia/version")
    found = re.search(r"\b(\d+)\.\d+[.\d]*", driver.read_text()) if driver.is_file() else None
    if found is None:
        lines.append("missing: NVIDIA driver")
    else:
        old = int(found[1]) < OLDEST_DRIVER
        lines.append(f"{'too old' if old else 'found'}: NVIDIA driver {found[0]}, needs {OLDEST_DRIVER}")
    lines += [f"{'found' if shutil.which(tool) else 'missing'}: {tool}" for tool in ("git", "make")]
    for package, use in NEEDED.items():
        try:
            here = importlib.util.find_spec(package) is not None
        except ImportError:  # of a package in it
            here = False
        lines.append(f"{'found' if here else 'missing'}: {package} ({use})")
    return lines


def run_stage(stage: str, bundles: Path, *, quick: bool, seconds: float = STAGE_SECONDS) -> dict[str, Any]:
    """Run *stage* in its own process, because an error of CUDA ends all CUDA work of a process.

    What it has printed before an error or the end of its time is kept.
    """
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_stages.py"), stage, str(bundles)]
    command += ["--quick"] if quick else []
    begin = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log: list[str] = []
    stopped = threading.Event()

    def stop() -> None:
        stopped.set()
        process.kill()

    def read_log() -> None:
        for line in process.stderr or ():
            log[:] = [*log[1 - LOG_LINES :], line.rstrip()]

    timer, reader = threading.Timer(seconds, stop), threading.Thread(target=read_log)
    timer.start()
    reader.start()
    parts: list[dict[str, Any]] = []
    with process:  # closes its pipes
        for part in json_lines(process.stdout or ()):
            parts.append(part)
            print(json.dumps({"part_of": stage, **part}), flush=True)
        code = process.wait()
        timer.cancel()
        reader.join()
    passed = code == 0 and bool(parts) and "text" in parts[-1]
    failure = next((line for line in reversed(log) if line.strip()), f"exit code {code}")
    if stopped.is_set():
        failure = f"not finished after {seconds:.0f} s"
    return {
        "stage": stage,
        "passed": passed,
        "seconds": round(time.monotonic() - begin, 1),
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "machine": machine(),
        "versions": versions(),
        "text": parts[-1]["text"] if passed else failure,
        "gpu": parts[-1].get("gpu", "") if passed else "",
        "tables": tables(parts),
        "log": [] if passed else log,
    }


def json_lines(lines: Iterable[str]) -> Iterable[dict[str, Any]]:
    """Yield the JSON objects among *lines*; other lines are what libraries print."""
    for line in lines:
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            yield value


def tables(parts: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Collect the rows among *parts* by table; a later text of a table replaces an earlier one."""
    found: dict[str, dict[str, Any]] = {}
    for part in parts:
        if "row" in part:
            table = found.setdefault(part["title"], {"title": part["title"], "rows": []})
            table |= {"text": part["about"], "columns": part["columns"]}
            table["rows"].append(part["row"])
    return list(found.values())


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


def stored(*files: Path | None) -> dict[str, dict[str, Any]]:
    """Read the results of earlier calls, by stage; a success is never replaced by a failure."""
    found: dict[str, dict[str, Any]] = {}
    for file in files:
        lines = file.read_text().splitlines() if file is not None and file.is_file() else ()
        for result in json_lines(lines):
            if result.get("stage") in STAGES and "passed" in result:
                earlier = found.get(result["stage"], {})
                if result["passed"] or not earlier.get("passed") or earlier["commit"] != result["commit"]:
                    found[result["stage"]] = result
    return found


def main() -> int:
    """Check this machine; return the exit code."""
    options = arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    kept, here, stages = options.out / "gpu.jsonl", commit(), options.stages or STAGES
    for line in preconditions():
        print(line, file=sys.stderr, flush=True)
    results = stored(kept, options.resume)
    for stage in stages:
        earlier = results.get(stage, {})
        if earlier.get("passed") and earlier["commit"] == here and not options.again:
            print(f"ok   {stage}: done before", file=sys.stderr, flush=True)
            continue
        results[stage] = result = run_stage(stage, options.bundles, quick=options.quick)
        line = json.dumps(result)
        print(line, flush=True)
        with kept.open("a") as file:
            file.write(line + "\n")
        (options.out / "gpu.md").write_text(page(list(results.values())))
        mark = "ok  " if result["passed"] else "FAIL"
        print(f"{mark} {stage}: {result['text']}", file=sys.stderr, flush=True)
    return 0 if all(results[stage]["passed"] for stage in stages) else 1


if __name__ == "__main__":
    sys.exit(main())
