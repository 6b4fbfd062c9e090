"""The stage `speed` of `gpu_check.py`: every runtime on the same bundle, alternately in one process.

Settings are equal: float32 without TF32 everywhere, inputs and outputs on the host. torch.compile takes up to
a minute for each size of a batch, so it runs the largest one only; int8 has no counterpart in torch.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import torch
from measure import interleaved
from numpy.typing import NDArray

from sopdeploy.bundle.folder import Bundle
from sopdeploy.checkpoint import build_classifier, read_checkpoint
from sopdeploy.tensorrt.session import EngineSession
from sopdeploy_export.engine_builder.engine import get_engine, this_machine
from sopdeploy_export.graph import Deployed
from sopdeploy_export.options import EngineOptions
from sopdeploy_export.proof.networks import detach
from sopdeploy_service.runtime.base import reason_of
from sopdeploy_service.runtime.onnxruntime import CudaOnnxRuntime

BATCHES = (1, 8, 32)  # the profiles of the engine
MEASURED = (1, 5, 8, 20, 32)
COMPILED = "torch.compile"
Run = Callable[[NDArray[np.uint8]], Any]


def speed_rows(bundle: Bundle, runs: int, *, with_tensorrt: bool) -> Iterator[dict[str, Any]]:
    """Measure the median milliseconds per batch of *bundle* on each runtime; yield a row for each batch."""
    with ExitStack() as stack:
        runtime = CudaOnnxRuntime(bundle)
        stack.callback(runtime.close)
        sides: dict[str, Run] = {"onnxruntime CUDA": runtime.run}
        text = f"Milliseconds per batch, medians of {runs} runs, copies to and from the GPU included."
        if bundle.manifest.precision != "int8":
            try:
                of_torch = torch_sides(bundle)
                for run in of_torch.values():
                    run(noise(bundle, max(BATCHES)))
                sides |= of_torch
            except Exception as error:  # for example a torch without CUDA, or without a compiler
                text += f" torch does not run here: {reason_of(error)}."
        if with_tensorrt:
            here, begin = this_machine(), time.monotonic()
            engine = get_engine(bundle, EngineOptions(profiles=",".join(map(str, BATCHES))))
            text += f" The engine was built in {time.monotonic() - begin:.0f} s."
            plan, key = engine.path.read_bytes(), engine.record.key
            session = EngineSession(here.trt, here.cuda, plan, bundle.manifest, key)
            stack.callback(session.close)
            sides = {"TensorRT": session.run, **sides}
            alone, two = back_to_back(session, bundle, max(BATCHES), runs)
            text += f" TensorRT reaches {alone} images/s one batch at a time, {two} with two in flight."
        title = f"{bundle.name}, {bundle.manifest.precision}"
        about = {"title": title, "about": text, "columns": ["batch", *sides]}
        for batch in MEASURED:
            used = {name: run for name, run in sides.items() if name != COMPILED or batch == max(BATCHES)}
            times = dict(zip(used, timed(bundle, used, batch, runs), strict=True))
            yield {**about, "row": [batch, *(times.get(name, "") for name in sides)]}


def torch_sides(bundle: Bundle) -> dict[str, Run]:
    """Create functions that run the checkpoint of *bundle* in torch, eager and compiled."""
    path = bundle.path.parents[1] / f"{bundle.path.parents[1].name}.pt"
    trained = read_checkpoint(path)
    network = build_classifier(trained, path)
    detached = detach(network) if network.training_only else network
    deployed = Deployed(detached, trained.preprocess).eval().cuda()
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    half = bundle.manifest.precision == "fp16"

    def side(model: Any) -> Run:
        def run(images: NDArray[np.uint8]) -> Any:
            with torch.inference_mode(), torch.autocast("cuda", torch.float16, enabled=half):
                return [output.cpu() for output in model(torch.from_numpy(images).cuda())]

        return run

    return {"torch eager": side(deployed), COMPILED: side(torch.compile(deployed, dynamic=False))}


def timed(bundle: Bundle, sides: dict[str, Run], batch: int, runs: int) -> list[float]:
    """Measure the median milliseconds of each runtime for one batch, alternately."""
    images = noise(bundle, batch)
    seconds = interleaved([partial(run, images) for run in sides.values()], runs=runs, warmups=10)
    return [round(statistics.median(values) * 1e3, 3) for values in seconds]


def noise(bundle: Bundle, batch: int) -> NDArray[np.uint8]:
    """Generate *batch* images of the size of *bundle*."""
    shape = (batch, *bundle.manifest.image_shape)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def back_to_back(session: EngineSession, bundle: Bundle, batch: int, runs: int) -> tuple[int, int]:
    """Measure images per second with one batch and with two batches in flight."""
    images = list(noise(bundle, batch))

    def one_at_a_time() -> None:
        for _ in range(runs):
            session.begin(images)()

    def two_in_flight() -> None:
        end = session.begin(images)
        for _ in range(runs - 1):
            following = session.begin(images)
            end()
            end = following
        end()

    alone, two = interleaved([one_at_a_time, two_in_flight], runs=5, warmups=1)
    return round(batch * runs / statistics.median(alone)), round(batch * runs / statistics.median(two))
