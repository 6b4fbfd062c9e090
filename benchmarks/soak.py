"""Soak test: a server under a mix of clients for minutes, checked for leaks and wrong responses.

The server is `sopdeploy serve` with real bundles and ONNX Runtime on the CPU. It receives valid
images of several sizes (alone, in forms, in JSON and in the Open Inference Protocol), invalid
bodies, slow bodies and floods of images and of requests for metrics. Some clients disconnect,
and one swaps the model every few seconds. Every `ROUND_SECONDS` all clients stop and the
resources of the idle server are measured, because requests in progress change the memory by
tens of MB. Limits: resident memory at rest grows by less than 1 MB per minute, no thread or
descriptor remains, every response names its bundle and equals `sopdeploy predict` with that
bundle, no 5xx. Exit code 1 if a limit is exceeded.

With `--front-ends`, batches run in an engine behind so many front ends. With `--kills`, a
process is killed or stopped every `KILL_SECONDS`, also before its first report; clients then
repeat requests whose connection was lost, and images may get 503 `runtime_dead`.

The run takes a third longer than *seconds*: training, the warm-up, and at least 3 s of rest after each round.

    python benchmarks/soak.py --seconds 300
    python benchmarks/soak.py --seconds 7200 --front-ends 2 --kills
"""

import asyncio
import json
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import httpx
from load import serving
from measure import Result, make_parser, report
from soak_clients import (
    CLOSE,
    MIX,
    NAME,
    Scenario,
    Tally,
    load,
    start_all_threads,
    valid_bodies,
)

from sopdeploy.base.files import move_link
from sopdeploy.bundle.folder import read_manifest

CLASSES = 100  # maximum number of compared classes
ROUND_SECONDS = 15.0
SETTLE_SECONDS = 20.0
STEADY = 6  # consecutive equal counts, half a second apart
BUSY = re.compile(r"^sopdeploy_queue_depth(?:{.*})? (?!0\.0$)", re.M)
MAX_MB_PER_MINUTE = 1.0  # of each process
JUDGED_SECONDS = 60.0  # shorter runs are not judged: the allocator dominates the slope


@dataclass(frozen=True, slots=True)
class Resources:
    """Resources of processes at *moment*: their number, resident bytes, threads, open descriptors."""

    moment: float
    processes: int
    resident: int
    threads: int
    descriptors: int


def read_resources(pid: int) -> Resources:
    """Sum the resources of the process *pid* and its children; shared memory counts once for each.

    A child that ends meanwhile has none.
    """
    files = Path(f"/proc/{pid}/task").glob("*/children")  # each thread has its own
    children = (child for file in files for child in file.read_text().split())
    num_processes = resident = threads = descriptors = 0
    for folder in (Path(f"/proc/{one}") for one in (pid, *children)):
        with suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            status = (folder / "status").read_text(encoding="utf-8")
            numbers = dict(re.findall(r"^(VmRSS|Threads):\s+(\d+)", status, re.M))
            if "VmRSS" not in numbers:
                continue

            descriptors += len(list((folder / "fd").iterdir()))
            resident += int(numbers["VmRSS"])
            threads += int(numbers["Threads"])
            num_processes += 1
    return Resources(time.monotonic(), num_processes, resident * 1024, threads, descriptors)


def is_busy(url: str) -> bool:
    """Whether images wait, or the process that had this connection was killed."""
    try:
        return BUSY.search(httpx.get(f"{url}/metrics").text) is not None
    except httpx.TransportError:
        return True


def settled(pid: int, url: str) -> Resources:
    """Wait until the server is idle and releases no more resources; return its resources.

    It waits at most `SETTLE_SECONDS`.
    They are read from /proc, because a request would open another connection.
    """
    deadline = time.monotonic() + SETTLE_SECONDS
    while is_busy(url) and time.monotonic() < deadline:
        time.sleep(0.5)
    counts: list[tuple[int, int]] = []
    while time.monotonic() < deadline and (
        len(counts) < STEADY or len(set(counts[-STEADY:])) > 1
    ):
        time.sleep(0.5)
        resources = read_resources(pid)
        counts.append((resources.threads, resources.descriptors))
    return read_resources(pid)


def rounds(pid: int, scenario: Scenario, seconds: float, seed: int) -> list[Resources]:
    """Run the clients for *seconds*; return the resources of the idle server after each round."""
    at_rest = []
    count = max(1, round(seconds / ROUND_SECONDS))
    for number in range(count):
        asyncio.run(load(scenario, seconds / count, seed + number * len(MIX)))
        at_rest.append(settled(pid, scenario.url))
    return at_rest


def mb_per_minute(at_rest: Sequence[Resources]) -> float:
    """Compute the growth of the resident memory: the median slope of all pairs, robust to steps."""
    slopes = [
        (late.resident - early.resident) / (late.moment - early.moment)
        for early, late in combinations(at_rest, 2)
    ]
    return statistics.median(slopes) * 60 / 1e6


def results(
    tally: Tally, at_rest: Sequence[Resources], exit_code: int
) -> tuple[list[Result], list[str]]:
    """Build the results, limits first, and name the limits that were exceeded.

    *at_rest* was measured without clients, before the test and after each round. The growth of the
    memory is judged only after `JUDGED_SECONDS`. It also counts as exceeded if the responses of
    only one bundle were compared.
    """
    before, after = at_rest[0], at_rest[-1]
    judged = after.moment - before.moment >= JUDGED_SECONDS
    slope = mb_per_minute(at_rest)
    limits = {  # case: value, limit, unit
        "memory growth": (slope, MAX_MB_PER_MINUTE * after.processes, "MB/min"),
        "threads": (after.threads, before.threads, "threads"),
        "descriptors": (after.descriptors, before.descriptors, "files"),
        "largest deviation of a probability": (tally.worst, CLOSE, ""),
        "wrong responses": (len(tally.failures), 0, "requests"),
        "exit code": (exit_code, 0, ""),
    }
    rows = [
        Result(
            case=case, against="limit", ours=value, other=limit, unit=unit, runs=len(at_rest)
        )
        for case, (value, limit, unit) in limits.items()
    ]
    exceeded = [case for case, (value, limit, _) in limits.items() if value > limit]
    if not judged:
        exceeded = [case for case in exceeded if case != "memory growth"]
    if tally.compared == 0 or len(tally.digests) < 2:
        exceeded.append("compared responses of every bundle")
    counts = sorted(tally.outcomes.items())
    rows += [
        Result(case=" ".join(key), ours=count, unit="requests", runs=1) for key, count in counts
    ]
    return rows, exceeded


def sopdeploy(*arguments: str) -> str:
    """Run one command and return its output."""
    command = [sys.executable, "-m", "sopdeploy", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def predicted(
    bundle: Path, bodies: Mapping[str, bytes], folder: Path, classes: int
) -> dict[str, dict[str, float]]:
    """Run `sopdeploy predict` for all of *bodies*; return probabilities by image and label."""
    for name, body in bodies.items():
        (folder / name).write_bytes(body)
    files = [str(folder / name) for name in bodies]
    text = sopdeploy("predict", str(bundle), *files, "--top-k", str(classes), "--json")
    return {
        Path(row["image"]).name: {item["label"]: item["probability"] for item in row["classes"]}
        for row in json.loads(text)
    }


def digits_bundle(folder: Path, seed: int) -> Path:
    """Train on handwritten digits for one epoch, export, and return the bundle."""
    run, out = folder / f"run-{seed}", folder / f"bundles-{seed}"
    settings = ["--set", "epochs=1", "--set", f"seed={seed}"]
    sopdeploy("train", "--recipe", "digits-dsop", *settings, "--out", str(run))
    sopdeploy("export", str(run / "best.pt"), "--detach", "--out", str(out))
    return (out / "latest").resolve()


def soak(
    bundles: Sequence[Path],
    folder: Path,
    seconds: float,
    warm_up: float,
    front_ends: int,
    *,
    kill: bool,
) -> tuple[Tally, list[Result], list[str]]:
    """Run the soak test; return the responses, the results, and the limits that were exceeded."""
    bodies = valid_bodies()
    labels = json.loads((bundles[0] / "labels.json").read_bytes())
    classes = min(CLASSES, len(labels))
    expected = {
        read_manifest(one).id: predicted(one, bodies, folder, classes) for one in bundles
    }
    link = folder / "live"
    move_link(link, str(bundles[0]))
    keys = folder / "keys.toml"
    secret = sopdeploy("key", "client", "--keys", str(keys)).split()[-1]
    options = [
        "--keys",
        str(keys),
        "--set",
        "queue_size=64",
        "--set",
        "threads=1",
        "--set",
        "follow=true",
    ]
    options += ["--set", f"front_ends={front_ends}"]
    with serving(f"{NAME}={link}", *options) as (process, url):

        def scenario(tally: Tally) -> Scenario:
            return Scenario(
                url=url, bodies=bodies, expected=expected, tally=tally, classes=classes, labels=labels,
                link=link, bundles=bundles, pid=process.pid, keys=keys, secret=secret, kill=kill,
            )  # fmt: skip

        rounds(process.pid, scenario(Tally()), warm_up, seed=1)
        asyncio.run(start_all_threads(scenario(Tally())))
        tally, before = Tally(), settled(process.pid, url)
        at_rest = [before, *rounds(process.pid, scenario(tally), seconds, seed=100)]
        process.send_signal(signal.SIGTERM)
        code = process.wait(60)
    return tally, *results(tally, at_rest, code)


def main() -> int:
    """Run from the command line; return the exit code."""
    parser = make_parser(__doc__)
    parser.add_argument(
        "--seconds", type=float, default=300, help="duration of the load after the warm-up"
    )
    parser.add_argument(
        "--warm-up", type=float, help="seconds; default a quarter of --seconds, at most 60"
    )
    parser.add_argument(
        "--bundles", type=Path, nargs=2, metavar="BUNDLE",
        help="two bundles with the same classes; default: networks trained on digits for one epoch",
    )  # fmt: skip
    parser.add_argument("--front-ends", type=int, default=0, help="processes that serve HTTP")
    parser.add_argument(
        "--kills", action="store_true", help="kill or stop processes; needs --front-ends"
    )
    arguments = parser.parse_args()
    warm_up = (
        min(60.0, arguments.seconds / 4) if arguments.warm_up is None else arguments.warm_up
    )
    with tempfile.TemporaryDirectory() as name:
        bundles = arguments.bundles or [digits_bundle(Path(name), seed) for seed in (0, 1)]
        tally, rows, exceeded = soak(
            bundles,
            Path(name),
            arguments.seconds,
            warm_up,
            arguments.front_ends,
            kill=arguments.kills,
        )
    report(rows, as_json=arguments.json, seconds=arguments.seconds)
    for line in [*(f"exceeded: {case}" for case in exceeded), *tally.failures[:20]]:
        print(line, file=sys.stderr)
    return int(bool(exceeded))


if __name__ == "__main__":
    sys.exit(main())
