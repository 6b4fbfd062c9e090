"""Soak test: a server under a mix of clients for minutes, checked for leaks and wrong responses.

One `sopdeploy serve` with real bundles and ONNX Runtime on the CPU receives valid images of several sizes,
alone, in forms, in JSON and in the Open Inference Protocol, invalid bodies, clients that disconnect, slow
bodies and floods; its model is swapped every few seconds. Every `ROUND_SECONDS` all clients stop and the
resources of the idle server are measured, because requests in progress change the memory by tens of MB.
Limits: resident memory at rest grows by less than 1 MB per minute, no thread or descriptor remains, every
response names its bundle and equals `sopdeploy predict` with that bundle, no 5xx. Exit code 1 if a limit is
exceeded.

    python benchmarks/soak.py --seconds 300
"""

import argparse
import asyncio
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
from measure import report
from soak_accounts import Bound, Holding, Tally, bounds, holding, results
from soak_clients import Ground, bad, flood, forms, good_bodies, leaving, one_by_one, slow, watching
from soak_swaps import NAME, crowd, json_bodies, protocol, swapping

from sopdeploy.bundle.folder import read_manifest
from sopdeploy.client import Client

ROUND_SECONDS = 15.0
SETTLE_SECONDS = 20.0
STEADY = 6  # equal counts in a row, half a second apart
CLASSES = 100  # compared of a network that has more


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=300, help="of load, after the warm-up")
    parser.add_argument("--warm-up", type=float, help="seconds; default a quarter of --seconds, at most 60")
    parser.add_argument(
        "--bundles", type=Path, nargs=2, metavar="BUNDLE",
        help="two with the same classes; default: trained on digits for an epoch each",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    arguments = parser.parse_args()
    warm_up = min(60.0, arguments.seconds / 4) if arguments.warm_up is None else arguments.warm_up
    with tempfile.TemporaryDirectory() as name:
        bundles = arguments.bundles or [digits_bundle(Path(name), seed) for seed in (0, 1)]
        tally, held, found = soak(bundles, Path(name), arguments.seconds, warm_up)
    if arguments.json:
        report(results(tally, held), as_json=True, seconds=arguments.seconds)
    else:
        show(tally, found)
    return int(any(bound.held is False for bound in found))


def soak(
    bundles: Sequence[Path], folder: Path, seconds: float, warm_up: float
) -> tuple[Tally, list[Holding], list[Bound]]:
    """Return what was answered, what the process held meanwhile, and the bounds."""
    bodies = good_bodies()
    labels = json.loads((bundles[0] / "labels.json").read_bytes())
    classes = min(CLASSES, len(labels))
    expected = {digest(bundle): predicted(bundle, bodies, folder, classes) for bundle in bundles}
    copies = on_shelf(bundles, folder / "shelf")
    with server(copies[0]) as (process, url):
        ground = Ground(
            url=url, bodies=bodies, expected=expected, tally=Tally(), classes=classes, labels=labels,
            folders=[copy.name for copy in copies],
        )  # fmt: skip
        rounds(process.pid, ground, warm_up, seed=1)
        with Client(url) as client:
            client.classify([*bodies.values()] * 2)  # so many at once that every thread has been started
        asyncio.run(crowd(url, min(bodies.values(), key=len), copies[2].name))
        before = settled(process.pid, url)
        ground = replace(ground, tally=Tally())
        held = [before, *rounds(process.pid, ground, seconds, seed=100)]
        process.send_signal(signal.SIGTERM)
        code = process.wait(60)
    return ground.tally, held, bounds(ground.tally, held, code)


def digest(bundle: Path) -> str:
    """Return the id of *bundle*, which its answers carry."""
    return read_manifest(bundle).id


def on_shelf(bundles: Sequence[Path], folder: Path) -> list[Path]:
    """Return two copies of each of *bundles* in *folder*, in turn: the next one is never loaded already."""
    return [
        shutil.copytree(bundle, folder / f"{place}-{number}")
        for place in range(2)
        for number, bundle in enumerate(bundles)
    ]


MIX: Sequence[Callable[[Ground, random.Random], Coroutine[Any, Any, None]]] = (
    one_by_one, one_by_one, one_by_one, forms, json_bodies, protocol, swapping,
    bad, leaving, slow, slow, flood, watching,
)  # fmt: skip


async def load(ground: Ground, seconds: float, seed: int) -> None:
    """Run every client for *seconds*, then let none of its connections stay."""
    tasks = [asyncio.create_task(client(ground, random.Random(seed + n))) for n, client in enumerate(MIX)]  # noqa: S311
    done, _ = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        ground.tally.fail(f"a client failed: {task.exception()!r}")


def rounds(pid: int, ground: Ground, seconds: float, seed: int) -> list[Holding]:
    """Run the clients for *seconds* and return what the server holds each time that they have left."""
    held = []
    count = max(1, round(seconds / ROUND_SECONDS))
    for number in range(count):
        asyncio.run(load(ground, seconds / count, seed + number * len(MIX)))
        held.append(settled(pid, ground.url))
    return held


def settled(pid: int, url: str) -> Holding:
    """Return what the server holds once nothing is with it any more and it has stopped letting go.

    It is counted without asking the server, which would be a connection of its own.
    """
    end = time.monotonic() + SETTLE_SECONDS
    while "sopdeploy_queue_depth 0.0" not in httpx.get(f"{url}/metrics").text and time.monotonic() < end:
        time.sleep(0.5)
    counts: list[tuple[int, int]] = []
    while time.monotonic() < end and (len(counts) < STEADY or len(set(counts[-STEADY:])) > 1):
        time.sleep(0.5)
        found = holding(pid)
        counts.append((found.threads, found.descriptors))
    return holding(pid)


def predicted(
    bundle: Path, bodies: Mapping[str, bytes], folder: Path, classes: int
) -> dict[str, dict[str, float]]:
    """Return what `sopdeploy predict` says to each of *bodies*."""
    for name, body in bodies.items():
        (folder / name).write_bytes(body)
    files = [str(folder / name) for name in bodies]
    text = sopdeploy("predict", str(bundle), *files, "--top-k", str(classes), "--json")
    return {
        Path(row["image"]).name: {item["label"]: item["probability"] for item in row["classes"]}
        for row in json.loads(text)
    }


def digits_bundle(folder: Path, seed: int) -> Path:
    """Train on handwritten digits for an epoch, export with proof, return the bundle."""
    run, out = folder / f"run-{seed}", folder / f"bundles-{seed}"
    settings = ["--set", "epochs=1", "--set", f"seed={seed}"]
    sopdeploy("train", "--recipe", "digits-dsop", *settings, "--out", str(run))
    sopdeploy("export", str(run / "best.pt"), "--detach", "--out", str(out))
    return next(out.glob("dsop-*"))


def sopdeploy(*arguments: str) -> str:
    """Run one command and return what it printed."""
    command = [sys.executable, "-m", "sopdeploy", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


@contextmanager
def server(bundle: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Serve *bundle* in a process of its own; give it and its URL."""
    command = [sys.executable, "-m", "sopdeploy", "serve", f"{NAME}={bundle}", "--port", "0"]
    options = ["--queue-size", "64", "--threads", "1", "--model-control"]
    with subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline() if process.stdout else ""
            if not line.startswith("ready: "):
                raise SystemExit(f"the server ended before it was ready (exit code {process.wait()})")
            yield process, line.split()[1]
        finally:
            process.kill()


def show(tally: Tally, found: list[Bound]) -> None:
    """Print what was answered and every bound."""
    for (kind, what), count in sorted(tally.outcomes.items()):
        print(f"{kind:10} {what:32} {count:8}")
    marks: dict[Any, str] = {True: "held", False: "BROKEN", None: "not judged"}
    for bound in found:
        print(f"{bound.name:12} {bound.found:36} {bound.allowed:20} {marks[bound.held]}")
    for failure in tally.failures:
        print(f"  {failure}")


if __name__ == "__main__":
    sys.exit(main())
