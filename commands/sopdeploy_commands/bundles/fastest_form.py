"""Which form of a bundle is fastest on this processor: float32 or int8, with each runtime for CPUs."""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np
import onnx

from sopdeploy.bundle.folder import Bundle
from sopdeploy.bundle.sealed import SealedFile
from sopdeploy.environment import install_hint
from sopdeploy.errors import RuntimeUnavailableError
from sopdeploy.plugins import RUNTIMES
from sopdeploy_export.lower.int8 import Int8Quantizer
from sopdeploy_service.runtime.base import OwnRuntime, Runtime
from sopdeploy_service.settings import Settings

ONE_THREAD = Settings(threads=1)
MIN_ROUNDS = 4  # the first one is not counted
MEASURED_SECONDS = 1.5  # of all rounds together
SMALLEST_GAIN = 1.1  # less is within the noise of a measurement
_Key = TypeVar("_Key", bound=Hashable)


class BundleForm(NamedTuple):
    """The precision of a graph, and the title of the runtime that executes it."""

    precision: str
    runtime: str


def runtimes_on_cpu() -> dict[str, type[OwnRuntime]]:
    """Return the runtimes that need no GPU, by their titles; `auto` uses the first one."""
    own: dict[str, type[OwnRuntime]] = RUNTIMES.own()
    return {runtime.title: runtime for runtime in own.values() if not runtime.needs_gpu}


def describe_fastest_form(bundle: Bundle) -> str:
    """Measure the forms of *bundle*, float32 or int8 for CPUs, and say which is fastest and how to get it."""
    seconds = {form: statistics.median(times) for form, times in measure_forms(bundle).items()}
    runtimes = runtimes_on_cpu()
    default = next(iter(runtimes))
    shipped = BundleForm(bundle.manifest.precision, default)
    best = min(seconds, key=lambda form: seconds[form])
    gain = seconds[shipped] / seconds[best]

    # How a user gets the fastest form: another precision, another runtime, or both.
    options = []
    if best.precision != shipped.precision:
        options.append("export with --precision int8 --calibrate PHOTOS")
    if best.runtime != default:
        options.append(f"serve with --runtime {runtimes[best.runtime].setting}")

    if gain < SMALLEST_GAIN or not options:
        text = f"this bundle with {default} is the fastest form on this processor"
    else:
        faster = f"{best.precision} with {best.runtime}: {gain:.1f} x faster on this processor"
        text = f"{faster}: {', '.join(options)}"

    # Runtimes that are not installed were not measured.
    missing = [runtime for runtime in runtimes.values() if not runtime.is_set_up()]
    return text + "".join(
        f" ({install_hint(runtime.title, f'sopdeploy[{runtime.extra}]')})"
        for runtime in missing
    )


def measure_forms(bundle: Bundle) -> dict[BundleForm, list[float]]:
    """Measure the processor seconds of runs of each form of *bundle* that works here, alternately.

    Each form runs on one thread, in processor time: other load affects this least. A float32
    graph is also quantized, with ranges of a noise image; these affect the answers, but not the
    time.
    """
    shape = (bundle.manifest.batch.minimum, *bundle.manifest.image_shape)
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)

    # Beside the bundle as it is, its int8 form, quantized here on one image of noise.
    bundles = [bundle]
    if bundle.manifest.precision == "fp32":
        with suppress(Exception):  # no convolution, or one that the quantizer cannot convert
            quantizer = Int8Quantizer(
                onnx.load_model_from_string(bundle.onnx.read()), images[:1]
            )
            graph = SealedFile([quantizer.quantize().SerializeToString()])
            manifest = bundle.manifest.model_copy(update={"precision": "int8"})
            bundles.append(replace(bundle, manifest=manifest, graph=graph))

    # Every form in every runtime of this processor that has its operators.
    forms: dict[BundleForm, Runtime] = {}
    for form_bundle in bundles:
        precision = form_bundle.manifest.precision
        for title, runtime in runtimes_on_cpu().items():
            if precision not in runtime.precisions():
                continue
            # The runtime is not installed, or lacks an operator.
            with suppress(RuntimeUnavailableError):
                forms[BundleForm(precision, title)] = runtime(form_bundle, ONE_THREAD)

    return measure_alternately(
        {form: partial(runtime.run, images) for form, runtime in forms.items()}
    )


def measure_alternately(runs: Mapping[_Key, Callable[[], object]]) -> dict[_Key, list[float]]:
    """Measure the processor seconds of *runs* in rounds, in which each runs once; the first is not counted."""
    times: dict[_Key, list[float]] = {name: [] for name in runs}
    end = time.process_time() + MEASURED_SECONDS
    rounds = 0

    while rounds < MIN_ROUNDS or time.process_time() < end:
        rounds += 1
        for name, run in runs.items():
            began = time.process_time()
            run()
            times[name].append(time.process_time() - began)

    return {name: seconds[1:] for name, seconds in times.items()}
