"""Our server, for `benchmarks/serving.py`: over a pretend engine of known time, or over a bundle.

python benchmarks/serving_ours.py --port 8000 --pretend 20,10 --largest 8
python benchmarks/serving_ours.py --port 8000 --bundle FOLDER --largest 8

With `--accounts FILE` it writes at its end how many images it decoded, and the CPU seconds that decoding them
and the engine's batches took, each on the clock of the thread that did it.
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

import uvicorn

from sopdeploy.bundle.folder import Bundle
from sopdeploy.bundle.manifest import BatchRange, Lineage, Manifest, TensorRecord
from sopdeploy.images.preprocess import Preprocess
from sopdeploy_service.app import create_app
from sopdeploy_service.images import loaders
from sopdeploy_service.inference.loader import LoadedModel, load_model
from sopdeploy_service.runtime.base import OverlappingRuntime
from sopdeploy_service.runtime.fake import FakeOverlappingRuntime
from sopdeploy_service.server.process import http_config, prepare_process
from sopdeploy_service.settings import Settings, load_settings

CLASSES = 1000


def pretend(fixed_ms: float, per_image_ms: float, largest: int) -> LoadedModel:
    """Return a network of 224 pixels and 1000 classes that only sleeps."""
    manifest = Manifest(
        model="pretend",
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
        classes=CLASSES, fixed_ms=fixed_ms, per_image_ms=per_image_ms, largest_batch=largest
    )
    return LoadedModel(
        bundle=Bundle(path=Path("pretend"), manifest=manifest, labels=labels), runtime=runtime, replays={}
    )


def settings_for(largest: int, *, decoders: int, threads: int) -> Settings:
    """Return the server's settings."""
    return load_settings(max_batch=largest, decoders=decoders, threads=threads, queue_size=1024)


@dataclass(slots=True)
class Accounts:
    """Images decoded, and the CPU seconds of decoding and of the engine."""

    images: int = 0
    decode_s: float = 0.0
    engine_s: float = 0.0

    def over_decoder(self, decode: Callable[..., Any]) -> Callable[..., Any]:
        """Return *decode*, entered here."""

        def counted(*given: Any, **more: Any) -> Any:
            self.images += 1
            with self.entered("decode_s"):
                return decode(*given, **more)

        return counted

    def over(self, inference: LoadedModel) -> LoadedModel:
        """Return *inference* with its runtime entered here."""
        kind = EnteredDevice if isinstance(inference.runtime, OverlappingRuntime) else Entered
        return replace(inference, runtime=kind(inference.runtime, self))

    @contextmanager
    def entered(self, name: str) -> Iterator[None]:
        """Enter the CPU seconds of what this thread does in the block under *name*."""
        begun = time.thread_time()
        yield
        setattr(self, name, getattr(self, name) + time.thread_time() - begun)


class Entered:
    """A *runtime* whose runs are entered in *accounts*."""

    def __init__(self, runtime: Any, accounts: Accounts) -> None:
        self.name, self.device, self.largest_batch = runtime.name, runtime.device, runtime.largest_batch
        self._runtime = runtime
        self._accounts = accounts

    def run(self, images: Any) -> Any:
        """Return what it computes."""
        with self._accounts.entered("engine_s"):
            return self._runtime.run(images)


class EnteredDevice(Entered):
    """The same of a runtime that is given the next batch while one is at work."""

    def begin(self, images: Any) -> Any:
        """Begin a batch."""
        with self._accounts.entered("engine_s"):
            wait = self._runtime.begin(images)

        def entered() -> Any:
            with self._accounts.entered("engine_s"):
                return wait()

        return entered


def main() -> None:
    """Serve until a signal comes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--pretend", help="milliseconds of a batch and of each image in it: 20,10")
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--largest", type=int, default=8)
    parser.add_argument("--decoders", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--accounts", type=Path, help="where to write what decoding and the engine took")
    given = parser.parse_args()
    prepare_process()
    settings = settings_for(given.largest, decoders=given.decoders, threads=given.threads)
    if given.bundle is not None:
        inference = load_model(given.bundle, settings)
    elif given.pretend:
        fixed, each = map(float, given.pretend.split(","))
        inference = pretend(fixed, each, given.largest)
    else:
        sys.exit("say --pretend or --bundle")
    accounts = Accounts()
    if given.accounts is not None:
        loaders.decode = accounts.over_decoder(loaders.decode)
        inference = accounts.over(inference)
    app = create_app({"model": inference}, settings)
    config = http_config(app, settings)
    config.port = given.port
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # uvicorn raises it again when it has stopped
    try:
        uvicorn.Server(config).run()
    finally:
        if given.accounts is not None:
            given.accounts.write_text(json.dumps(asdict(accounts)))


if __name__ == "__main__":
    main()
