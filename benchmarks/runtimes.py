"""Compare the runtimes of the CPU: time per image of bundles of one network, and agreement of their classes.

    python benchmarks/runtimes.py bundles/fp32/lite0 bundles/bf16-backbone/lite0 bundles/int8/lite0 \
        --photos photos

The first bundle in ONNX Runtime is the reference. Every bundle runs in every runtime that can run it,
alternately with the reference, with one thread and with two. `cpu-ms` is processor time. With `--photos`, a
folder of JPEG files, the share of photographs with the same top class as the reference is measured, too.
"""

import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from measure import Result, compare, existing, make_parser, one_line_errors, report
from numpy.typing import NDArray

from sopdeploy.bundle.folder import Bundle, open_bundle
from sopdeploy.bundle.probes import read_probes, replay
from sopdeploy.errors import ParityError, RuntimeUnavailableError
from sopdeploy.images.formats import load_pixels, open_image
from sopdeploy.images.pixels import preprocess_image
from sopdeploy_service.runtime.base import Runtime
from sopdeploy_service.runtime.onnxruntime import OnnxRuntime
from sopdeploy_service.runtime.openvino import OpenVINORuntime

RUNTIMES: dict[str, type[OnnxRuntime | OpenVINORuntime]] = {
    "onnxruntime": OnnxRuntime,
    "openvino": OpenVINORuntime,
}
RUNS, WARMUPS = 21, 3


def main() -> None:
    """Measure the bundles of the command line and print the results."""
    parser = make_parser(__doc__)
    parser.add_argument("bundles", type=existing, nargs="+")
    parser.add_argument("--photos", type=existing, help="folder of JPEG files")
    given = parser.parse_args()
    with one_line_errors():
        bundles = [open_bundle(path.resolve()) for path in given.bundles]
        files = given.photos.rglob("*") if given.photos else ()
        photos = sorted(path for path in files if path.suffix.lower() in {".jpg", ".jpeg"})
        results = [result for threads in (1, 2) for result in times(bundles, threads)]
        report([*results, *agreements(bundles, photos)], as_json=given.json)


def times(bundles: Sequence[Bundle], threads: int) -> list[Result]:
    """Time every bundle in every runtime against the first one in ONNX Runtime."""
    reference, image = OnnxRuntime(bundles[0], threads=threads), read_probes(bundles[0].probes).images[:1]
    results = []
    for bundle in bundles:
        for name in RUNTIMES:
            runtime = opened(name, bundle, threads)
            if runtime is not None and not (name == "onnxruntime" and bundle is bundles[0]):
                case = f"{bundle.manifest.precision}, {name}, {threads} threads"
                results.append(
                    compare(
                        case,
                        f"{bundles[0].manifest.precision}, onnxruntime",
                        partial(runtime.run, image),
                        partial(reference.run, image),
                        runs=RUNS,
                        warmups=WARMUPS,
                        clock=time.process_time if threads == 1 else time.perf_counter,
                    )
                )
    return results


def opened(name: str, bundle: Bundle, threads: int) -> Runtime | None:
    """Open *bundle* and replay its probes; None, with a message, if the runtime cannot run it."""
    try:
        runtime: Runtime = RUNTIMES[name](bundle, threads=threads)
        replay(read_probes(bundle.probes), runtime.run)
    except (ParityError, RuntimeUnavailableError) as error:
        print(f"{bundle.manifest.precision}, {name}: not measured: {error}", file=sys.stderr)
        return None
    return runtime


def agreements(bundles: Sequence[Bundle], photos: Sequence[Path]) -> list[Result]:
    """Measure the percentage of *photos* with the top class of the reference."""
    if not photos:
        return []
    preprocess = bundles[0].manifest.preprocess
    images = np.stack(
        [preprocess_image(load_pixels(open_image(path.read_bytes())), preprocess) for path in photos]
    )
    expected = top_classes(OnnxRuntime(bundles[0]), images)
    results = []
    for bundle in bundles:
        for name in RUNTIMES:
            if (runtime := opened(name, bundle, 1)) is not None:
                agreement = 100 * float((top_classes(runtime, images) == expected).mean())
                case = f"{bundle.manifest.precision}, {name}: same top class"
                results.append(Result(case=case, ours=agreement, unit="%", runs=len(photos)))
    return results


def top_classes(runtime: Runtime, images: NDArray[np.uint8]) -> NDArray[np.intp]:
    """Classify *images* (n, H, W, 3) one by one; return their top classes (n,)."""
    logits = np.concatenate([runtime.run(images[i : i + 1])["logits"] for i in range(len(images))])
    classes: NDArray[np.intp] = logits.argmax(axis=1)
    return classes


if __name__ == "__main__":
    main()
