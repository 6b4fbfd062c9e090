"""The functional part of `gpu_check.py`: runtimes, decoders, a server with model swaps, a training run.

Each step returns a sentence for the page. It raises `CheckFailedError`, or the error of the checked code.
"""

import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import uvicorn

from sopdeploy.bundle.folder import Bundle
from sopdeploy.bundle.probes import Replay
from sopdeploy.tensorrt.cuda import open_cuda
from sopdeploy_export.tensorrt.engine import EngineOptions, get_engine
from sopdeploy_service.app import create_app
from sopdeploy_service.images.loaders import synthetic_jpeg
from sopdeploy_service.inference.bundle_store import BundleStore
from sopdeploy_service.inference.loader import load_model
from sopdeploy_service.runtime.tensorrt import TensorRTRuntime
from sopdeploy_service.server.process import http_config
from sopdeploy_service.server.sockets import bind, url
from sopdeploy_service.settings import Settings

PROFILES = "1,2,8"
SWAPS = 20
MAX_LEAK_BYTES = 64 << 20  # GPU memory that all swaps may leave allocated
START_SECONDS = 30.0
MIN_ACCURACY = 0.95  # on the held-out digits; the recipe digits-dsop reaches 99 % on a CPU


class CheckFailedError(Exception):
    """A step gave a wrong result; the message is one line."""


def check_cuda_runtime(bundle: Bundle) -> str:
    """Replay the probes on ONNX Runtime's CUDA provider, alone and in batches."""
    loaded = load_model(bundle.path, Settings(runtime="onnxruntime-cuda"))
    loaded.runtime.close()
    return f"{loaded.runtime.name} on {loaded.runtime.device}: probes {_deviations(loaded.replays)}"


def check_engine(bundle: Bundle) -> str:
    """Build an engine, replay the probes on it, and capture the profiles of one batch size as graphs."""
    get_engine(bundle, EngineOptions(profiles=PROFILES))
    loaded = load_model(bundle.path, Settings(runtime="tensorrt", cuda_graphs=True))
    runtime = loaded.runtime
    captured = [str(profile) for profile in runtime.captured] if isinstance(runtime, TensorRTRuntime) else []
    runtime.close()
    if captured != ["1", "2"]:
        raise CheckFailedError(
            f"of the profiles {PROFILES}, {captured or 'none'} became CUDA graphs instead of 1 and 2"
        )
    return f"{runtime.name}: probes {_deviations(loaded.replays)}; CUDA graphs of the profiles 1 and 2"


def _deviations(replays: dict[int, Replay]) -> str:
    found = []
    for size, replay in sorted(replays.items()):
        shares = [replay.deviation[name] / replay.tolerance[name] for name in replay.deviation]
        found.append(f"{max(shares):.2f} at batch {size}")
    return f"deviate by {', '.join(found)} of their tolerance"


def check_decoder(bundle: Bundle, decode: str) -> str:
    """Load the model with the decoder *decode*, which compares its outputs on JPEGs with exact decoding."""
    loaded = load_model(
        bundle.path, Settings.model_validate({"decode": decode, "runtime": "onnxruntime-cpu"})
    )
    found = loaded.fast_decode
    if found is None:
        raise CheckFailedError(f"decode={decode} was not checked")
    return (
        f"{found.pictures} JPEGs: logits drift by {found.drift:.4f}, {found.agreement:.0%} of classes equal"
    )


def check_training(folder: Path) -> str:
    """Train the recipe `digits-dsop` on the GPU and check its accuracy."""
    import sopdeploy  # noqa: PLC0415  needs torch

    run = sopdeploy.train(recipe="digits-dsop", out=folder, device="cuda", progress=False)
    accuracy = run.best_top1 or 0.0
    if accuracy < MIN_ACCURACY:
        raise CheckFailedError(
            f"digits-dsop reaches {accuracy:.1%} accuracy on CUDA, at least {MIN_ACCURACY:.0%} is required"
        )
    return f"digits-dsop on CUDA: {accuracy:.1%} accuracy"


def check_server(bundle: Bundle, folder: Path) -> str:
    """Send images to a server on an engine, swap its model again and again, and compare the GPU's memory."""
    get_engine(bundle, EngineOptions(profiles=PROFILES))
    for name in ("first", "second"):
        shutil.copytree(bundle.path, folder / name)
    settings = Settings(
        runtime="tensorrt", cuda_graphs=True, model_control=True, engine_cache=bundle.path.parent / "engines"
    )
    jpeg, cuda = _jpeg(), open_cuda()
    with _server(folder / "first", settings) as client:
        answers = [_classify(client, jpeg)]
        free = 0
        for swap in range(SWAPS):
            load = {"parameters": {"folder": ("second", "first")[swap % 2]}}
            reply = client.post("/v2/repository/models/model/load", json=load)
            if reply.status_code != 200:
                raise CheckFailedError(f"swap {swap}: {reply.status_code} {reply.text}")
            answers.append(_classify(client, jpeg))
            free = free or cuda.free_memory()  # two versions stay loaded after the first swap
        lost = free - cuda.free_memory()
    difference = max(float(np.abs(np.subtract(answers[0], other)).max()) for other in answers[1:])
    if difference > 1e-6:
        raise CheckFailedError(f"the probabilities change by {difference:g} after a swap of the same network")
    if lost > MAX_LEAK_BYTES:
        raise CheckFailedError(f"{SWAPS} swaps leave {lost / 2**20:.0f} MiB of GPU memory allocated")
    return f"{SWAPS} swaps under requests: equal answers, {max(0, lost) / 2**20:.0f} MiB of GPU memory lost"


@contextmanager
def _server(path: Path, settings: Settings) -> Iterator[httpx.Client]:
    """Serve the bundle at *path* as `model` in a thread."""
    store = BundleStore([f"model={path}"])
    app = create_app({"model": load_model(path, settings)}, settings, store)
    server = uvicorn.Server(http_config(app, settings))
    with bind("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        end = time.monotonic() + START_SECONDS
        while not server.started and time.monotonic() < end:
            time.sleep(0.01)
        try:
            with httpx.Client(base_url=url(listener), timeout=60) as client:
                yield client
        finally:
            server.should_exit = True
            thread.join()


def _classify(client: httpx.Client, jpeg: bytes) -> list[float]:
    reply = client.post("/v1/classify?top_k=5", content=jpeg)
    if reply.status_code != 200:
        raise CheckFailedError(f"/v1/classify: {reply.status_code} {reply.text}")
    return [entry["probability"] for entry in reply.json()["classes"]]


def _jpeg() -> bytes:
    return synthetic_jpeg((640, 480), 0)
