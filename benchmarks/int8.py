"""Processor time of an image in each form that a CPU can serve: float32 and int8, ONNX Runtime and OpenVINO.

    python benchmarks/int8.py BUNDLE [...] [--json]

Measures what `sopdeploy export` measures before it names the fastest form: one thread, processor time, one
image, all forms alternately. BUNDLE is a float32 bundle; its int8 graph has the ranges of noise, which
affect the answers but not the time. docs/howto/int8.md has the results.
"""

import statistics
from collections.abc import Iterator
from pathlib import Path

from measure import Result, existing, make_parser, one_line_errors, report

from sopdeploy.bundle.folder import open_bundle
from sopdeploy_commands.bundles.fastest_form import BundleForm, measure_forms

FLOAT32 = BundleForm("fp32", "ONNX Runtime")


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
