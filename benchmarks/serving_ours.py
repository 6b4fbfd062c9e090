"""The server of this project for `benchmarks/serving.py`, with a simulated runtime or with a bundle.

python benchmarks/serving_ours.py --port 8000 --fake 20,10 --largest 8
python benchmarks/serving_ours.py --port 8000 --bundle FOLDER --largest 8

With `--cpu-times FILE` it writes, when it stops, the number of decoded images and the CPU seconds of decoding
and of the runtime, measured with the clocks of the threads that run them.
"""

import argparse
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from fake_runtime import FakeOverlappingRuntime

from sopdeploy.bundle.folder import Bundle
from sopdeploy.bundle.manifest import BatchRange, Lineage, Manifest, TensorRecord
from sopdeploy.images.preprocess import Preprocess
from sopdeploy_service.app import create_app
from sopdeploy_service.images import loaders
from sopdeploy_service.images.decode import Decoded
from sopdeploy_service.inference.loader import LoadedModel, load_model
from sopdeploy_service.runtime.base import OverlappingRuntime
from sopdeploy_service.server.draining_server import freeze_objects, http_config
from sopdeploy_service.server.process import limit_heaps
from sopdeploy_service.settings import Settings, load_settings

CLASSES = 1000


def fake_model(fixed_ms: float, per_image_ms: float, largest: int) -> LoadedModel:
    """Create a model for 224-pixel images and 1000 classes whose runtime sleeps."""
    manifest = Manifest(
        project="benchmark",
        exported_at="2026-01-02T03:04:05.000000Z",
        model="fake",
        config={},
        inputs=(TensorRecord(name="images", dtype="uint8", shape=(None, 224, 224, 3)),),
        outputs=(TensorRecord(name="logits", dtype="float32", shape=(None, CLASSES)),),
        preprocess=Preprocess(resize=224, crop=224),
        batch=BatchRange(),
        opset=18,
        detached=(),
        lineage=Lineage(checkpoint_sha256="0" * 64, program_root="0" * 64, onnx_root="0" * 64),
        versions={},
        files={},
    )
    labels = tuple(f"class {number}" for number in range(CLASSES))
    runtime = FakeOverlappingRuntime(
        num_classes=CLASSES, fixed_ms=fixed_ms, per_image_ms=per_image_ms, largest_batch=largest
    )
    return LoadedModel(
        bundle=Bundle(path=Path("fake"), manifest=manifest, labels=labels), runtime=runtime, replays={}
    )


def replace_decoder(work: Callable[[], object]) -> None:
    """Let the server do *work* instead of decoding; all images become the same pixels."""
    image = Decoded(np.zeros((224, 224, 3), dtype=np.uint8), ())

    def decode(*_: object, **__: object) -> Decoded:
        work()
        return image

    loaders.decode = decode  # type: ignore[attr-defined]


def settings_for(largest: int, *, decoders: int, threads: int, **more: Any) -> Settings:
    """Create the server's settings, with *more* that are not None."""
    return load_settings(max_batch=largest, decoders=decoders, threads=threads, queue_size=1024, **more)


@dataclass(slots=True)
class CpuTimes:
    """Number of decoded images, and CPU seconds of decoding and of the runtime."""

    images: int = 0
    decode_s: float = 0.0
    engine_s: float = 0.0

    def wrap_decode(self, decode: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap *decode* to count images and measure its CPU time."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.images += 1
            with self.measure("decode_s"):
                return decode(*args, **kwargs)

        return counted

    def wrap_model(self, model: LoadedModel) -> LoadedModel:
        """Wrap the runtime of *model* to measure its CPU time."""
        kind = TimedOverlappingRuntime if isinstance(model.runtime, OverlappingRuntime) else TimedRuntime
        return replace(model, runtime=kind(model.runtime, self))

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Add the CPU time of this thread in the block to the field *name*."""
        started = time.thread_time()
        yield
        setattr(self, name, getattr(self, name) + time.thread_time() - started)


class TimedRuntime:
    """A runtime that adds the CPU time of its runs to *times*."""

    def __init__(self, runtime: Any, times: CpuTimes) -> None:
        self.name, self.device, self.largest_batch = runtime.name, runtime.device, runtime.largest_batch
        self._runtime = runtime
        self._times = times
        self.close = runtime.close

    def run(self, images: Any) -> Any:
        """Run the wrapped runtime."""
        with self._times.measure("engine_s"):
            return self._runtime.run(images)


class TimedOverlappingRuntime(TimedRuntime):
    """A timed runtime that accepts the next batch while one is running."""

    def begin(self, images: Any, names: Any = None) -> Any:
        """Start a batch; the returned function waits for its outputs."""
        with self._times.measure("engine_s"):
            wait = self._runtime.begin(images, names)

        def timed_wait() -> Any:
            with self._times.measure("engine_s"):
                return wait()

        return timed_wait


def main() -> None:
    """Serve until a signal arrives."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--fake", help="milliseconds per batch and per image, such as 20,10")
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--largest", type=int, default=8)
    parser.add_argument("--decoders", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cpu-times", type=Path, help="file for the CPU times of decoding and runtime")
    parser.add_argument("--keep", type=Path, help="folder for photographs")
    parser.add_argument("--keep-bytes", type=int)
    arguments = parser.parse_args()
    limit_heaps()
    freeze_objects()
    settings = settings_for(
        arguments.largest,
        decoders=arguments.decoders,
        threads=arguments.threads,
        keep=arguments.keep,
        keep_bytes=arguments.keep_bytes,
    )
    if arguments.bundle is not None:
        model = load_model(arguments.bundle, settings)
    elif arguments.fake:
        fixed, each = map(float, arguments.fake.split(","))
        model = fake_model(fixed, each, arguments.largest)
    else:
        parser.error("pass --fake or --bundle")
    times = CpuTimes()
    if arguments.cpu_times is not None:
        loaders.decode = times.wrap_decode(loaders.decode)  # type: ignore[attr-defined]
        model = times.wrap_model(model)
    app = create_app({"model": model}, settings)
    config = http_config(app, settings)
    config.port = arguments.port
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # uvicorn raises the signal again after its shutdown
    try:
        uvicorn.Server(config).run()
    finally:
        if arguments.cpu_times is not None:
            arguments.cpu_times.write_text(json.dumps(asdict(times)))


if __name__ == "__main__":
    main()
