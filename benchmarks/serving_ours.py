"""Our server, for `benchmarks/serving.py`: over a pretend engine of known time, or over a bundle.

python benchmarks/serving_ours.py --port 8000 --pretend 20,10 --largest 8
python benchmarks/serving_ours.py --port 8000 --bundle FOLDER --largest 8
"""

import argparse
import sys
from pathlib import Path

import uvicorn

from sopdeploy.bundle import Bundle
from sopdeploy.manifest import BatchRange, Lineage, Manifest, TensorRecord
from sopdeploy.preprocess import Preprocess
from sopdeploy_service.app import create_app
from sopdeploy_service.runtime.pretend import PretendRuntime
from sopdeploy_service.server import http_config, prepare_process
from sopdeploy_service.settings import Settings, load_settings
from sopdeploy_service.verified import Inference, open_verified

CLASSES = 1000


def pretend(fixed_ms: float, per_image_ms: float, largest: int) -> Inference:
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
    runtime = PretendRuntime(
        classes=CLASSES, fixed_ms=fixed_ms, per_image_ms=per_image_ms, largest_batch=largest
    )
    return Inference(
        bundle=Bundle(path=Path("pretend"), manifest=manifest, labels=labels), runtime=runtime, replays={}
    )


def settings_for(largest: int, *, decoders: int, threads: int) -> Settings:
    """Return the server's settings."""
    return load_settings(max_batch=largest, decoders=decoders, threads=threads, queue_size=1024)


def main() -> None:
    """Serve until a signal comes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--pretend", help="milliseconds of a batch and of each image in it: 20,10")
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--largest", type=int, default=8)
    parser.add_argument("--decoders", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    prepare_process()
    settings = settings_for(given.largest, decoders=given.decoders, threads=given.threads)
    if given.bundle is not None:
        inference = open_verified(given.bundle, settings)
    elif given.pretend:
        fixed, each = map(float, given.pretend.split(","))
        inference = pretend(fixed, each, given.largest)
    else:
        sys.exit("say --pretend or --bundle")
    app = create_app({"model": inference}, settings)
    config = http_config(app, settings)
    config.port = given.port
    uvicorn.Server(config).run()


if __name__ == "__main__":
    main()
