"""Which form of a bundle is fastest on this processor: float32 or int8, with ONNX Runtime or OpenVINO."""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import NamedTuple, TypeVar

import numpy as np
import onnx

from sopdeploy.bundle.folder import Bundle
from sopdeploy.bundle.sealed import SealedFile
from sopdeploy.environment import install_hint, lacks_vnni
from sopdeploy.errors import RuntimeUnavailableError
from sopdeploy_export.lower.int8 import Int8Quantizer
from sopdeploy_service.runtime.base import Runtime
from sopdeploy_service.runtime.onnxruntime import OnnxRuntime
from sopdeploy_service.runtime.openvino import OpenVINORuntime

RUNTIMES: dict[str, type[OnnxRuntime | OpenVINORuntime]] = {
    "ONNX Runtime": OnnxRuntime,
    "OpenVINO": OpenVINORuntime,
}
DEFAULT = "ONNX Runtime"  # of `serve` on a CPU
MIN_ROUNDS, ROUND_SECONDS = 4, 1.5  # seconds of all rounds together; the first round is not counted
SMALLEST_GAIN = 1.1  # less is within the noise of a measurement
_Key = TypeVar("_Key", bound=Hashable)


class BundleForm(NamedTuple):
    """The precision of a graph, and the runtime that executes it."""

    precision: str
    runtime: str


def describe_fastest_form(bundle: Bundle) -> str:
    """Measure the forms of *bundle*, float32 or int8 for CPUs, and say which is fastest and how to get it."""
    seconds = {form: statistics.median(times) for form, times in measure_forms(bundle).items()}
    shipped = BundleForm(bundle.manifest.precision, DEFAULT)
    best = min(seconds, key=lambda form: seconds[form])
    gain = seconds[shipped] / seconds[best]
    options = []
    if best.precision != shipped.precision:
        options.append("export with --precision int8 --calibrate PHOTOS")
    if best.runtime != DEFAULT:
        options.append("serve with --runtime openvino")
    if gain < SMALLEST_GAIN or not options:
        text = f"this bundle with {DEFAULT} is the fastest form on this processor"
    else:
        faster = f"{best.precision} with {best.runtime}: {gain:.1f} x faster on this processor"
        text = f"{faster}: {', '.join(options)}"
    if find_spec("openvino") is None:
        text += f" ({install_hint('OpenVINO', 'sopdeploy[openvino]')})"
    return text


def measure_forms(bundle: Bundle) -> dict[BundleForm, list[float]]:
    """Measure the processor seconds of runs of each form of *bundle* that works here, alternately.

    Each form runs on one thread, in processor time: other load affects this least. A float32 graph is also
    quantized, with ranges of a noise image; these affect the answers, but not the time.
    """
    shape = (bundle.manifest.batch.minimum, *bundle.manifest.image_shape)
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    bundles = [bundle]
    if bundle.manifest.precision == "fp32":
        with suppress(Exception):  # no convolution, or one that the quantizer cannot convert
            quantizer = Int8Quantizer(onnx.load_model_from_string(bundle.onnx.read()), images[:1])
            graph = SealedFile([quantizer.quantize().SerializeToString()])
            manifest = bundle.manifest.model_copy(update={"precision": "int8"})
            bundles.append(replace(bundle, manifest=manifest, graph=graph))
    forms: dict[BundleForm, Runtime] = {}
    for form_bundle in bundles:
        precision = form_bundle.manifest.precision
        for name, open_runtime in RUNTIMES.items():
            sums_saturate = precision == "int8" and name == "OpenVINO" and lacks_vnni()
            if sums_saturate:
                continue
            with suppress(RuntimeUnavailableError):  # not installed, or an operator that it lacks
                forms[BundleForm(precision, name)] = open_runtime(form_bundle, threads=1)
    return measure_alternately({form: partial(runtime.run, images) for form, runtime in forms.items()})


def measure_alternately(runs: Mapping[_Key, Callable[[], object]]) -> dict[_Key, list[float]]:
    """Measure the processor seconds of each of *runs*, in turn; the first time is not counted."""
    times: dict[_Key, list[float]] = {name: [] for name in runs}
    end, rounds = time.process_time() + ROUND_SECONDS, 0
    while rounds < MIN_ROUNDS or time.process_time() < end:
        rounds += 1
        for name, run in runs.items():
            began = time.process_time()
            run()
            times[name].append(time.process_time() - began)
    return {name: seconds[1:] for name, seconds in times.items()}
