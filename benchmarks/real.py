"""A network with published weights in every precision: top-1, agreement, file size and export time.

    python benchmarks/real.py --weights FILE --model NAME --calibration DIR --test DIR [--json]

The weights are imported, exported as fp32, fp16 and int8 (both forms, calibrated on --calibration), verified,
and evaluated on --test. Both folders have photographs sorted by class, such as WordNet IDs. Agreement is the
share of test photographs with the predicted class of the fp32 file. Times are processor times.
docs/benchmarks/real.md contains the results.
"""

import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from measure import Result, existing, make_parser, markdown, one_line_errors, report

import sopdeploy
from sopdeploy.evaluation.metrics import Rate
from sopdeploy.files import check_is_weights
from sopdeploy.importers.import_weights import import_weights
from sopdeploy_commands.bundles.scores import scores_of_bundle
from sopdeploy_commands.bundles.verify import verify

FORMS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp16": {"precision": "fp16"},
    "int8 for CPUs": {"precision": "int8", "int8_for": "cpu"},
    "int8 for TensorRT": {"precision": "int8", "int8_for": "tensorrt"},
}


class Row(NamedTuple):
    """One form: its accuracy, its agreement with the fp32 file, its size and the time of its export."""

    form: str
    top1: Rate
    agreement: Rate
    megabytes: float
    seconds: float


def measure(checkpoint: Path, calibration: Path, test: Path, folder: Path) -> list[Row]:
    """Export, verify and evaluate *checkpoint* in every form; return a row for each."""
    rows: list[Row] = []
    reference: list[int] = []
    for name, options in FORMS.items():
        images: dict[str, Any] = {"calibrate": calibration} if options.get("precision") == "int8" else {}
        begin = time.process_time()
        exported = sopdeploy.export(checkpoint, folder / name.replace(" ", "-"), **options, **images)
        seconds = time.process_time() - begin
        verify(exported.path)
        _, scores, _ = scores_of_bundle(exported.path, test, on_image=lambda _done, _total: None)
        if not isinstance(scores, list):
            raise TypeError("the network has several classes per image")
        predicted = [score.top5[0] for score in scores]
        reference = reference or predicted
        right = sum(score.target == score.top5[0] for score in scores)
        equal = sum(a == b for a, b in zip(predicted, reference, strict=True))
        megabytes = (exported.path / "model.onnx").stat().st_size / 1e6
        rows.append(Row(name, Rate.of(right, len(scores)), Rate.of(equal, len(scores)), megabytes, seconds))
    return rows


def cells(row: Row) -> list[str]:
    """Format a row of the table."""
    shares = (
        f"{100 * rate.share:.1f} % ({100 * rate.low:.1f} to {100 * rate.high:.1f})"
        for rate in (row.top1, row.agreement)
    )
    return [row.form, *shares, f"{row.megabytes:.1f}", f"{row.seconds:.0f}"]


def main() -> None:
    """Run from the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--weights", type=existing, required=True)
    parser.add_argument(
        "--model", required=True, help="name in the catalog, such as timm:tf_efficientnet_lite0"
    )
    parser.add_argument("--calibration", type=existing, required=True, help="photographs for int8 ranges")
    parser.add_argument("--test", type=existing, required=True, help="other photographs, sorted by class")
    given = parser.parse_args()
    with one_line_errors(), tempfile.TemporaryDirectory() as temporary:
        checkpoint = Path(temporary) / "checkpoint.pt"
        import_weights(check_is_weights(given.weights), given.model, checkpoint)
        rows = measure(checkpoint, given.calibration, given.test, Path(temporary))
    if given.json:
        values = [
            Result(case=f"{row.form}: {key}", ours=100 * rate.share, unit="%", runs=1)
            for row in rows
            for key, rate in (("top1", row.top1), ("agreement", row.agreement))
        ]
        report(values, as_json=True)
        return
    head = ("form", "top-1", "agreement with fp32", "MB", "export, CPU s")
    print(markdown(head, map(cells, rows)))


if __name__ == "__main__":
    main()
