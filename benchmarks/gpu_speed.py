"""The speed part of `gpu_check.py`: engines against torch and ONNX Runtime on CUDA, in one process."""

import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from measure import Result, interleaved
from numpy.typing import NDArray

from sopdeploy.bundle.folder import Bundle, open_bundle
from sopdeploy.tensorrt.session import EngineSession
from sopdeploy_export.tensorrt.engine import EngineOptions, Machine, get_engine
from sopdeploy_service.runtime.onnxruntime import CUDA, CUDA_OPTIONS, OnnxRuntime

BATCHES = (1, 8, 32)
WANTED = 1.5  # required speed-up over torch.compile at batch size 1
Run = Callable[[Any], Any]
Report = Callable[[str], None]


@dataclass(frozen=True)
class Case:
    """One bundle, and functions that run the same network in torch, if it is installed."""

    bundle: Path
    precision: str
    torch: dict[str, Run]


def check_speed(case: Case, here: Machine, runs: int, report: Report, *, with_cuda: bool) -> dict[str, Any]:
    """Build the engine of *case*, which includes its probes, and compare its speed with other runtimes."""
    bundle = open_bundle(case.bundle)
    options = EngineOptions(profiles=",".join(map(str, BATCHES)))
    begin = time.monotonic()
    built = get_engine(bundle, options, report)
    seconds = time.monotonic() - begin
    again = get_engine(bundle, options)
    with ExitStack() as stack:
        plan, key = built.path.read_bytes(), built.record.key
        session = EngineSession(here.trt, here.cuda, plan, bundle.manifest, key, graphs=True)
        stack.callback(session.close)
        sides = {"TensorRT": session.run, **case.torch}
        if with_cuda:
            runtime = OnnxRuntime(bundle, provider=CUDA, options=CUDA_OPTIONS)
            stack.callback(runtime.close)
            sides["onnxruntime CUDA"] = runtime.run
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


def timed(bundle: Bundle, sides: dict[str, Run], batch: int, runs: int) -> dict[str, Any]:
    """Measure the median milliseconds of each runtime for one batch, alternately."""
    images = noise(bundle, batch)
    seconds = interleaved([partial(run, images) for run in sides.values()], runs=runs, warmups=10)
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

    def two_in_flight() -> None:
        end = session.begin(images)
        for _ in range(runs - 1):
            following = session.begin(images)
            end()
            end = following
        end()

    alone, two = interleaved([one_at_a_time, two_in_flight], runs=5, warmups=1)
    rates = [round(batch * runs / statistics.median(seconds)) for seconds in (alone, two)]
    return {"batch": batch, **dict(zip(("one at a time", "two in flight"), rates, strict=True))}


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


def slow(cases: list[dict[str, Any]]) -> list[str]:
    """List the cases whose engine misses its required speed-up over torch.compile at batch size 1."""
    rows = [(case["bundle"], case["precision"], case["milliseconds"][0]) for case in cases]
    return [
        f"{bundle} {precision}: {row['torch.compile'] / row['TensorRT']:.2f} times torch.compile at batch 1, "
        f"at least {WANTED} is required"
        for bundle, precision, row in rows
        if row.get("torch.compile", float("inf")) < WANTED * row["TensorRT"]
    ]
