"""Soak test: a server under a mix of clients for minutes, checked for leaks and wrong responses.

The server is `sopdeploy serve` with real bundles and ONNX Runtime on the CPU. It receives valid images of
several sizes (alone, in forms, in JSON and in the Open Inference Protocol), invalid bodies, slow bodies and
floods of requests. Some clients disconnect, and one swaps the model every few seconds. Every `ROUND_SECONDS`
all clients stop and the resources of the idle server are measured, because requests in progress change the
memory by tens of MB. Limits: resident memory at rest grows by less than 1 MB per minute, no thread or
descriptor remains, every response names its bundle and equals `sopdeploy predict` with that bundle, no 5xx.
Exit code 1 if a limit is exceeded.

    python benchmarks/soak.py --seconds 300
"""

import asyncio
import json
import random
import re
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
from measure import make_parser, report
from soak_accounts import Bound, Resources, Tally, bounds, read_all_resources, results
from soak_clients import (
    Scenario,
    disconnecting,
    floods,
    forms,
    invalid_images,
    monitoring,
    single_images,
    slow_bodies,
    valid_bodies,
)  # fmt: skip
from soak_swaps import NAME, inference_protocol, json_bodies, model_swaps, start_all_threads

from sopdeploy.bundle.folder import read_manifest
from sopdeploy.client import Client
from sopdeploy.files import move_link

ROUND_SECONDS = 15.0
SETTLE_SECONDS = 20.0
STEADY = 6  # consecutive equal counts, half a second apart
BUSY = re.compile(r"^sopdeploy_queue_depth(?:{.*})? (?!0\.0$)", re.M)
CLASSES = 100  # maximum number of compared classes


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--seconds", type=float, default=300, help="duration of the load after the warm-up")
    parser.add_argument("--warm-up", type=float, help="seconds; default a quarter of --seconds, at most 60")
    parser.add_argument(
        "--bundles", type=Path, nargs=2, metavar="BUNDLE",
        help="two bundles with the same classes; default: networks trained on digits for one epoch",
    )  # fmt: skip
    arguments = parser.parse_args()
    warm_up = min(60.0, arguments.seconds / 4) if arguments.warm_up is None else arguments.warm_up
    with tempfile.TemporaryDirectory() as name:
        bundles = arguments.bundles or [digits_bundle(Path(name), seed) for seed in (0, 1)]
        tally, at_rest, limits = soak(bundles, Path(name), arguments.seconds, warm_up)
    if arguments.json:
        report(results(tally, at_rest), as_json=True, seconds=arguments.seconds)
    else:
        show(tally, limits)
    return int(any(bound.kept is False for bound in limits))


def soak(
    bundles: Sequence[Path], folder: Path, seconds: float, warm_up: float
) -> tuple[Tally, list[Resources], list[Bound]]:
    """Run the soak test; return the responses, the resources of the server over time, and the limits."""
    bodies = valid_bodies()
    labels = json.loads((bundles[0] / "labels.json").read_bytes())
    classes = min(CLASSES, len(labels))
    expected = {digest(bundle): predicted(bundle, bodies, folder, classes) for bundle in bundles}
    link = folder / "live"
    move_link(link, str(bundles[0]))
    with server(link) as (process, url):
        scenario = Scenario(
            url=url, bodies=bodies, expected=expected, tally=Tally(), classes=classes, labels=labels,
            link=link, bundles=bundles,
        )  # fmt: skip
        rounds(process.pid, scenario, warm_up, seed=1)
        with Client(url) as client:
            client.classify([*bodies.values()] * 2)  # starts all threads of the server
        asyncio.run(start_all_threads(url, min(bodies.values(), key=len)))
        before = settled(process.pid, url)
        scenario = replace(scenario, tally=Tally())
        at_rest = [before, *rounds(process.pid, scenario, seconds, seed=100)]
        process.send_signal(signal.SIGTERM)
        code = process.wait(60)
    return scenario.tally, at_rest, bounds(scenario.tally, at_rest, code)


def digest(bundle: Path) -> str:
    """Read the id of *bundle*, which its responses contain."""
    return read_manifest(bundle).id


MIX: Sequence[Callable[[Scenario, random.Random], Coroutine[Any, Any, None]]] = (
    single_images, single_images, single_images, forms, json_bodies, inference_protocol, model_swaps,
    invalid_images, disconnecting, slow_bodies, slow_bodies, floods, monitoring,
)  # fmt: skip


async def load(scenario: Scenario, seconds: float, seed: int) -> None:
    """Run all clients for *seconds*, then close their connections."""
    tasks = [
        asyncio.create_task(client(scenario, random.Random(seed + number)))  # noqa: S311 - not a secret
        for number, client in enumerate(MIX)
    ]
    done, _ = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        scenario.tally.fail(f"a client failed: {task.exception()!r}")


def rounds(pid: int, scenario: Scenario, seconds: float, seed: int) -> list[Resources]:
    """Run the clients for *seconds*; return the resources of the idle server after each round."""
    at_rest = []
    count = max(1, round(seconds / ROUND_SECONDS))
    for number in range(count):
        asyncio.run(load(scenario, seconds / count, seed + number * len(MIX)))
        at_rest.append(settled(pid, scenario.url))
    return at_rest


def settled(pid: int, url: str) -> Resources:
    """Wait until the server is idle and releases no more resources; return its resources.

    They are read from /proc, because a request would open another connection.
    """
    deadline = time.monotonic() + SETTLE_SECONDS
    while BUSY.search(httpx.get(f"{url}/metrics").text) and time.monotonic() < deadline:
        time.sleep(0.5)
    counts: list[tuple[int, int]] = []
    while time.monotonic() < deadline and (len(counts) < STEADY or len(set(counts[-STEADY:])) > 1):
        time.sleep(0.5)
        resources = read_all_resources(pid)
        counts.append((resources.threads, resources.descriptors))
    return read_all_resources(pid)


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


def sopdeploy(*arguments: str) -> str:
    """Run one command and return its output."""
    command = [sys.executable, "-m", "sopdeploy", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


@contextmanager
def server(link: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Serve the bundle of *link* in another process; yield the process and the URL."""
    command = [sys.executable, "-m", "sopdeploy", "serve", f"{NAME}={link}", "--port", "0"]
    options = ["--setting", "queue_size=64", "--threads", "1", "--setting", "follow=true"]
    with subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline() if process.stdout else ""
            if not line.startswith("ready: "):
                raise SystemExit(f"the server stopped before it was ready (exit code {process.wait()})")
            yield process, line.split()[1]
        finally:
            process.kill()


def show(tally: Tally, limits: list[Bound]) -> None:
    """Print the number of responses by kind, and the limits."""
    for (kind, what), count in sorted(tally.outcomes.items()):
        print(f"{kind:10} {what:32} {count:8}")
    marks: dict[Any, str] = {True: "kept", False: "EXCEEDED", None: "not judged"}
    for bound in limits:
        print(f"{bound.name:12} {bound.measured:36} {bound.allowed:20} {marks[bound.kept]}")
    for failure in tally.failures:
        print(f"  {failure}")


if __name__ == "__main__":
    sys.exit(main())
