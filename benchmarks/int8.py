"""Processor time of an image in each form that a CPU can serve: float32 and int8, ONNX Runtime and OpenVINO.

    python benchmarks/int8.py BUNDLE [...] [--json]

Measures one image on one thread in processor time, which other load affects least, all forms alternately.
BUNDLE is a float32 bundle; its int8 graph has the ranges of noise, which affect the answers but not the
time. docs/howto/int8.md has the results.
"""

import statistics
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
from measure import Result, existing, make_parser, one_line_errors, report
from numpy.typing import NDArray

from sopdeploy.bundle.folder import Bundle, open_bundle
from sopdeploy.commands.network_choice import measure_alternately
from sopdeploy.environment import lacks_vnni
from sopdeploy.errors import RuntimeUnavailableError
from sopdeploy_export.precision.int8 import Int8Quantizer
from sopdeploy_service.runtime.base import Runtime
from sopdeploy_service.runtime.onnxruntime import OnnxRuntime
from sopdeploy_service.runtime.openvino import OpenVINORuntime


class Form(NamedTuple):
    """The precision of a graph, and the runtime that executes it."""

    precision: str
    runtime: str


FLOAT32 = Form("fp32", "ONNX Runtime")
RUNTIMES: dict[str, type[OnnxRuntime | OpenVINORuntime]] = {
    FLOAT32.runtime: OnnxRuntime,
    "OpenVINO": OpenVINORuntime,
}


def measure_forms(bundle: Bundle) -> dict[Form, list[float]]:
    """Measure the processor seconds of runs of each form of *bundle* that works here."""
    shape = (bundle.manifest.batch.minimum, *bundle.manifest.image_shape)
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    forms: dict[Form, Runtime] = {}
    with tempfile.TemporaryDirectory() as folder:
        for graph in (bundle, quantize(bundle, images[:1], Path(folder))):
            for name, open_runtime in RUNTIMES.items():
                sums_saturate = graph.manifest.precision == "int8" and name == "OpenVINO" and lacks_vnni()
                if sums_saturate:
                    continue
                with suppress(RuntimeUnavailableError):  # not installed, or an operator that it lacks
                    forms[Form(graph.manifest.precision, name)] = open_runtime(graph, threads=1)
    return measure_alternately({form: partial(runtime.run, images) for form, runtime in forms.items()})


def quantize(bundle: Bundle, images: NDArray[np.uint8], folder: Path) -> Bundle:
    """Write the int8 graph of *bundle* into *folder*; return the bundle with this graph."""
    manifest = bundle.manifest.model_copy(update={"precision": "int8"})
    quantized = replace(bundle, path=folder, manifest=manifest)
    quantized.onnx.write_bytes(Int8Quantizer(onnx.load(bundle.onnx), images).quantize().SerializeToString())
    return quantized


def results_of(path: Path) -> Iterator[Result]:
    """Measure the forms of the bundle at *path*."""
    bundle = open_bundle(path)
    seconds = measure_forms(bundle)
    milliseconds = {form: 1000 * statistics.median(times) for form, times in seconds.items()}
    for form, ours in milliseconds.items():
        yield Result(
            case=f"{bundle.manifest.model}: {form.precision} with {form.runtime}",
            against=" with ".join(FLOAT32),
            ours=ours,
            other=milliseconds[FLOAT32],
            unit="cpu-ms",
            runs=len(seconds[form]),
        )


def main() -> None:
    """Run from the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("bundles", nargs="+", type=existing)
    given = parser.parse_args()
    with one_line_errors():
        results = [result for path in given.bundles for result in results_of(path)]
    report(results, as_json=given.json)


if __name__ == "__main__":
    main()
