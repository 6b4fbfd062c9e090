"""The server of this project for `benchmarks/serving.py`, with a simulated runtime or with a bundle.

    python benchmarks/serving_ours.py --port 8000 --fake 20,10 --largest 8
    python benchmarks/serving_ours.py --port 8000 --bundle FOLDER --largest 8

It has two decoders and one thread of the runtime.
"""

import argparse
import signal
import sys
from pathlib import Path
from typing import get_args

import uvicorn

from sopdeploy.bundle.folder import Bundle
from sopdeploy.bundle.manifest import BatchRange, Lineage, Manifest, TensorRecord
from sopdeploy.images.preprocess import Decoding, Preprocess
from sopdeploy_service.app import create_app
from sopdeploy_service.inference.loader import LoadedModel, load_model
from sopdeploy_service.runtime.device_memory import limit_heaps
from sopdeploy_service.server.draining_server import freeze_objects, http_config
from sopdeploy_service.settings import Sandbox, Settings, load_settings
from tests.support.fake_runtime import FakeOverlappingRuntime

CLASSES = 1000


def fake_model(
    fixed_ms: float, per_image_ms: float, largest: int, decoding: Decoding = "full"
) -> LoadedModel:
    """Create a model for 224-pixel images and 1000 classes whose runtime sleeps."""
    manifest = Manifest(
        project="benchmark",
        exported_at="2026-01-02T03:04:05.000000Z",
        model="fake",
        config={},
        inputs=(TensorRecord(name="images", dtype="uint8", shape=(None, 224, 224, 3)),),
        outputs=(TensorRecord(name="logits", dtype="float32", shape=(None, CLASSES)),),
        preprocess=Preprocess(resize=224, crop=224, decoding=decoding),
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
        bundle=Bundle(path=Path("fake"), manifest=manifest, labels=labels),
        runtime=runtime,
        replays={},
    )


def settings_for(largest: int, sandbox: Sandbox = "auto") -> Settings:
    """Create the server's settings: two decoders, one thread of the runtime."""
    return load_settings(
        max_batch=largest, decoders=2, threads=1, queue_size=1024, sandbox=sandbox
    )


def main() -> None:
    """Serve until a signal arrives."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--fake", help="milliseconds per batch and per image, such as 20,10")
    parser.add_argument("--bundle", type=Path)
    parser.add_argument(
        "--decoding", choices=get_args(Decoding), default="full", help="with --fake"
    )
    parser.add_argument("--sandbox", choices=get_args(Sandbox), default="auto")
    parser.add_argument("--largest", type=int, default=8)
    arguments = parser.parse_args()
    limit_heaps()
    freeze_objects()
    settings = settings_for(arguments.largest, arguments.sandbox)
    if arguments.bundle is not None:
        model = load_model(arguments.bundle, settings)
    elif arguments.fake:
        fixed, each = map(float, arguments.fake.split(","))
        model = fake_model(fixed, each, arguments.largest, arguments.decoding)
    else:
        parser.error("pass --fake or --bundle")
    app = create_app({"model": model}, settings)
    config = http_config(app, settings)
    config.port = arguments.port
    # uvicorn raises the signal again after its shutdown.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    uvicorn.Server(config).run()


if __name__ == "__main__":
    main()
