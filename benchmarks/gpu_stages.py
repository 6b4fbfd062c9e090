"""The stages of `gpu_check.py`: runtimes, a training run, a server, speed.

    python benchmarks/gpu_stages.py STAGE BUNDLES [--quick]

Prints each row of a table as a line of JSON when it is measured, and the result of the stage as the last one;
or its error as the last line of stderr, with exit code 1.
"""

import asyncio
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import uvicorn
from measure import existing, make_parser

from sopdeploy.bundle.folder import Bundle, open_bundle
from sopdeploy.bundle.probes import Replay
from sopdeploy.errors import SopdeployError
from sopdeploy.tensorrt.cuda import open_cuda
from sopdeploy_export.engine_builder.engine import get_engine
from sopdeploy_export.options import EngineOptions
from sopdeploy_service.app import create_app
from sopdeploy_service.images.loaders import synthetic_jpeg
from sopdeploy_service.inference.loader import load_model
from sopdeploy_service.server.draining_server import http_config
from sopdeploy_service.server.sockets import bind, url
from sopdeploy_service.settings import Settings

ROOT = Path(__file__).parents[1]
PROFILES = "1,2,8"
SWAPS = 20
MAX_LEAK_BYTES = 64 << 20  # GPU memory that all swaps may leave allocated
START_SECONDS = 30.0
MIN_ACCURACY = 0.95  # on the held-out digits; the recipe digits-dsop reaches 99 % on a CPU


class CheckFailedError(Exception):
    """A stage gave a wrong result; the message is one line."""


def bundles_in(folder: Path, precision: str = "*") -> list[Bundle]:
    """Open the bundles that gpu_bundles.py has written to *folder*, by default of every precision."""
    paths = sorted(manifest.parent for manifest in folder.glob(f"*/{precision}/*/manifest.json"))
    found = [open_bundle(path) for path in paths if not path.is_symlink()]
    if not found:
        raise CheckFailedError(f"{folder} has no bundle of precision {precision}")
    return found


def has_tensorrt() -> bool:
    """Return whether TensorRT is installed."""
    return importlib.util.find_spec("tensorrt") is not None


def check_cuda(folder: Path, precision: str) -> str:
    """Replay the probes of the bundles of *precision* on the CUDA provider, alone and in batches."""
    passed, failed, bundles = [], [], bundles_in(folder, precision)
    for bundle in bundles:
        try:
            loaded = load_model(bundle.path, Settings(runtime="onnxruntime-cuda"))
        except SopdeployError as error:
            failed.append(f"{bundle.name}: {error}")
            continue
        loaded.runtime.close()
        passed.append(f"{bundle.name}: probes {_deviations(loaded.replays)}")
    if failed:
        others = "; ".join(passed) or "none"
        raise CheckFailedError(f"{len(failed)} of {len(bundles)} fail: {'; '.join(failed)}; passed: {others}")
    return f"{loaded.runtime.name}; {'; '.join(passed)}"


def check_tensorrt(folder: Path) -> str:
    """Build an engine of the largest network in each precision and replay the probes on it."""
    found: dict[str, Bundle] = {}
    for bundle in sorted(bundles_in(folder), key=lambda bundle: bundle.onnx.stat().st_size):
        found[bundle.manifest.precision] = bundle
    sentences = []
    for precision, bundle in found.items():
        get_engine(bundle, EngineOptions(profiles=PROFILES))
        loaded = load_model(bundle.path, Settings(runtime="tensorrt"))
        loaded.runtime.close()
        sentences.append(f"{loaded.runtime.name}, {precision}: probes {_deviations(loaded.replays)}")
    if importlib.util.find_spec("torch_tensorrt") is None:
        return f"{'; '.join(sentences)}; torch-tensorrt is not installed"
    engine = get_engine(found["fp32"], EngineOptions(profiles="8", via="torch-tensorrt"))
    deviation = max(replay.deviation["logits"] for replay in engine.record.replays)
    return f"{'; '.join(sentences)}; torch-tensorrt: logits deviate by {deviation:.2g}"


def _deviations(replays: dict[int, Replay]) -> str:
    shares = {
        size: max(replay.deviation[name] / replay.tolerance[name] for name in replay.deviation)
        for size, replay in sorted(replays.items())
    }
    sentence = ", ".join(f"{share:.2f} at batch {size}" for size, share in shares.items())
    return f"deviate by {sentence} of their tolerance"


def check_training(_: Path) -> str:
    """Train the recipe `digits-dsop` on the GPU and check its accuracy."""
    import sopdeploy  # noqa: PLC0415  needs torch

    with tempfile.TemporaryDirectory() as folder:
        run = sopdeploy.train(recipe="digits-dsop", out=Path(folder) / "run", device="cuda", progress=False)
    accuracy = run.best_top1 or 0.0
    if accuracy < MIN_ACCURACY:
        raise CheckFailedError(
            f"digits-dsop reaches {accuracy:.1%} accuracy on CUDA, at least {MIN_ACCURACY:.0%} is required"
        )
    return f"digits-dsop on CUDA: {accuracy:.1%} accuracy"


def check_server(folder: Path) -> str:
    """Send images to a server, swap two bundles again and again, and compare the GPU's memory."""
    first, second = bundles_in(folder)[:2]
    settings = Settings(runtime="onnxruntime-cuda")
    with tempfile.TemporaryDirectory() as temporary:
        served = Path(temporary) / "bundles"
        for name, bundle in (("first", first), ("second", second)):
            shutil.copytree(bundle.path, served / name)
            if has_tensorrt():
                get_engine(open_bundle(served / name), EngineOptions(profiles=PROFILES))
                settings = Settings(runtime="tensorrt")
        return swap(served, settings)


def swap(served: Path, settings: Settings) -> str:
    """Serve the bundle `first` of the folder *served*, then `second` and `first` alternately."""
    jpeg, cuda = synthetic_jpeg((640, 480), 0), open_cuda()
    with _server(served / "first", settings) as (client, reload):
        versions, answers = [_version(client)], [_classify(client, jpeg)]
        free = 0
        for number in range(SWAPS):
            reload(served / ("second", "first")[number % 2])
            while client.get("/metrics").text.count("sopdeploy_bundle_info{") > 1:
                time.sleep(0.01)  # until the memory of the replaced bundle is free
            versions.append(_version(client))
            answers.append(_classify(client, jpeg))
            free = free or cuda.call("cudaMemGetInfo")
        lost = free - cuda.call("cudaMemGetInfo")
    if any(before == after for before, after in pairwise(versions)):
        raise CheckFailedError(f"a swap did not load the other bundle: versions {versions}")
    difference = max(
        float(np.abs(np.subtract(before, after)).max())
        for before, after in zip(answers, answers[2:], strict=False)
    )
    if difference > 1e-6:
        raise CheckFailedError(f"the probabilities change by {difference:g} after a swap of the same network")
    if lost > MAX_LEAK_BYTES:
        raise CheckFailedError(f"{SWAPS} swaps leave {lost / 2**20:.0f} MiB of GPU memory allocated")
    return (
        f"{SWAPS} swaps of two bundles under requests on {settings.runtime}: equal answers, "
        f"{max(0, lost) / 2**20:.0f} MiB of GPU memory lost"
    )


@contextmanager
def _server(path: Path, settings: Settings) -> Iterator[tuple[httpx.Client, Callable[[Path], None]]]:
    """Serve the bundle at *path* as `model` in a thread; yield a client, and how to serve another bundle."""
    app = create_app({"model": load_model(path, settings)}, settings)
    server = uvicorn.Server(http_config(app, settings))
    with bind("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        end = time.monotonic() + START_SECONDS
        while not server.started and time.monotonic() < end:
            time.sleep(0.01)

        def reload(other: Path) -> None:
            work = app.state.service.registry.reload([f"model={other}"])
            asyncio.run_coroutine_threadsafe(work, server.servers[0].get_loop()).result()

        try:
            with httpx.Client(base_url=url(listener), timeout=60) as client:
                yield client, reload
        finally:
            server.should_exit = True
            thread.join()


def _version(client: httpx.Client) -> str:
    """Return the bundle that serves requests."""
    served: str = client.get("/info").json()["models"][0]["id"]
    return served


def _classify(client: httpx.Client, jpeg: bytes) -> list[float]:
    reply = client.post("/v1/classify?top_k=5", content=jpeg)
    if reply.status_code != 200:
        raise CheckFailedError(f"/v1/classify: {reply.status_code} {reply.text}")
    return [entry["probability"] for entry in reply.json()["classes"]]


def check_tests(_: Path) -> str:
    """Run tests/gpu."""
    command = [sys.executable, "-m", "pytest", "-q", "tests/gpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    last = (done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or [""])[-1]
    if done.returncode or " passed" not in last:  # without TensorRT, all are skipped
        raise CheckFailedError(f"tests/gpu: {last}")
    return f"tests/gpu: {last}"


def speed_of_all(folder: Path, *, quick: bool) -> Iterator[dict[str, Any]]:
    """Measure the rows of the stage `speed`; no other stage needs its imports."""
    from gpu_speed import speed_rows  # noqa: PLC0415  needs torch

    for bundle in bundles_in(folder):
        yield from speed_rows(bundle, 20 if quick else 200, with_tensorrt=has_tensorrt())


CHECKS: dict[str, Callable[[Path], str]] = {
    "cuda-fp32": lambda folder: check_cuda(folder, "fp32"),
    "cuda-fp16": lambda folder: check_cuda(folder, "fp16"),
    "cuda-int8": lambda folder: check_cuda(folder, "int8"),
    "training": check_training,
    "server": check_server,
    "tensorrt": check_tensorrt,
    "tests": check_tests,
}


def main() -> int:
    """Run one stage; return the exit code."""
    parser = make_parser(__doc__)
    parser.add_argument("stage", choices=[*CHECKS, "speed"])
    parser.add_argument("bundles", type=existing)
    parser.add_argument("--quick", action="store_true", help="fewer timed runs")
    options = parser.parse_args()
    try:
        if options.stage == "speed":
            for row in speed_of_all(options.bundles, quick=options.quick):
                print(json.dumps(row), flush=True)
            text = "measured, below"
        else:
            text = CHECKS[options.stage](options.bundles)
    except (SopdeployError, CheckFailedError, ImportError) as problem:
        print(" ".join(str(problem).split()), file=sys.stderr)
        return 1
    print(json.dumps({"text": text, "gpu": open_cuda().gpu().name}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
