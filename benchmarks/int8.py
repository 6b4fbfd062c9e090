"""Latency of int8 convolutions compared with float32 in ONNX Runtime on this CPU.

Quantizes the convolutions of a detached DSoP ResNet-18 and of an iSQRT ResNet-18, and times the int8 and the
float32 graphs alternately: one thread, CPU time of the process. The weights are random, which affects
accuracy but not latency.

    python benchmarks/int8.py [--quick] [--json]
"""

from collections.abc import Callable, Iterator
from functools import partial
from time import process_time
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from measure import Result, compare, parse, report

from sopdeploy.bundle.manifest import BatchRange
from sopdeploy.environment import EXACT_INT8
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.models.registry import create_model
from sopdeploy_export.graph import capture, generated_images, lower
from sopdeploy_export.precision.casts import float32_parts
from sopdeploy_export.precision.int8 import Int8Quantizer
from sopdeploy_export.proof.networks import detach

NETWORKS: dict[str, dict[str, Any]] = {"dsop-resnet18": {}, "isqrt-resnet50": {"depth": 18}}


def graphs(name: str) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """Export the int8 and the float32 graph of the network *name*."""
    torch.manual_seed(0)
    network = create_model(name, **NETWORKS[name]).eval()
    detached = detach(network) if network.training_only else network
    preprocess = Preprocess()
    plain = lower(capture(detached, preprocess, BatchRange(maximum=8)).any_batch, detached.outputs)
    quantizer = Int8Quantizer(plain, generated_images(preprocess.crop), float32_parts(detached))
    return quantizer.quantize(), plain


def session(model: onnx.ModelProto) -> ort.InferenceSession:
    """Open *model* with one thread, which other load disturbs least."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry(*EXACT_INT8)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def calls(sides: list[ort.InferenceSession], batch: int) -> list[Callable[[], object]]:
    """Create one function per session that runs it on the same *batch* images."""
    images = np.random.default_rng(0).integers(0, 256, (batch, 224, 224, 3), dtype=np.uint8)
    return [partial(side.run, None, {"images": images}) for side in sides]


def run(batches: tuple[int, ...], runs: int) -> Iterator[Result]:
    """Time each network at each batch size."""
    for name in NETWORKS:
        sides = [session(model) for model in graphs(name)]
        for batch in batches:
            ours, other = calls(sides, batch)
            yield compare(
                f"{name} int8, batch {batch}",
                "float32",
                ours,
                other,
                runs=runs,
                warmups=2,
                clock=process_time,
            )


def main() -> None:
    """Measure and print."""
    arguments = parse(__doc__)
    torch.set_num_threads(1)
    results = list(run((1,) if arguments.quick else (1, 8), 9 if arguments.quick else 15))
    report(results, as_json=arguments.json)


if __name__ == "__main__":
    main()
