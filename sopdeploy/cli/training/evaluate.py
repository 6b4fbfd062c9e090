"""`sopdeploy eval`: measure a network, and fit its temperature and thresholds."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sopdeploy.api.options import EvaluateOptions
from sopdeploy.cli.command import command
from sopdeploy.cli.console import err, image_progress, out, plain_text, print_table, say

if TYPE_CHECKING:
    from sopdeploy.api.evaluation import Evaluation
    from sopdeploy.evaluation.metrics import ClassificationReport
    from sopdeploy.evaluation.multi_label import MultiLabelReport
    from sopdeploy.evaluation.prediction import HeadAccuracy

_MAX_CLASSES = 50  # of more classes, the output lists those with the lowest recall or average precision
MAX_COLUMNS = 12  # with more classes, the terminal shows no confusion matrix
_MAX_MISTAKES = 5


def _show(evaluation: "Evaluation") -> None:
    """Print the metrics, and the frequent mistakes."""
    from sopdeploy.evaluation.metrics import ClassificationReport

    for note in evaluation.notes:
        err.print(plain_text(f"warning: {note}"))
    if isinstance(evaluation.metrics, ClassificationReport):
        _print_report(evaluation.metrics)
        _print_heads(evaluation.heads)
    else:
        _print_multi_label_report(evaluation.metrics)
    if evaluation.decision is not None:
        say(*(f"{name}: {text}" for name, text in evaluation.decision.rows()))


@command(_show, summarize=lambda evaluation: evaluation.summary())
def eval_command(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A checkpoint or a bundle.")],
    data: Annotated[Path, typer.Option(help="Folder of images, DIR/<class>/*.jpg or with labels.csv.")],
    *,
    options: EvaluateOptions,
) -> "Evaluation":
    """Evaluate a checkpoint or a bundle on a folder of images.

    Classes are matched by name; classes without images are named and left out. Accuracies have Wilson 95 %
    intervals; the calibration error uses 15 bins. If a rejection threshold was fitted, the output includes
    the fraction of accepted images.
    --heads adds top-1, top-5 and loss of every branch, and its share of the weighted training loss. A network
    with several classes per image needs a folder with `labels.csv`; its metrics are mAP, and F1 of each class
    at its threshold.
    --fit-decision is for imported checkpoints, and for other images than those of a run, which fits both at
    its end. The metrics are those before the fit.

    Example: sopdeploy eval runs/latest/best.pt --data test-photos

    Example: sopdeploy eval ckpt.pt --data test-photos --fit-decision fitted.pt

    Example: sopdeploy eval bundles/photos-3f6c01d2a4b7 --data test-photos
    """
    with image_progress() as on_image:
        from sopdeploy.api.evaluation import evaluate as run

        return run(source, data, options=options, on_image=on_image)


def _print_report(report: "ClassificationReport") -> None:
    top1, top5 = (
        f"[bold]{rate.share:.2%}[/] ({rate.low:.1%} to {rate.high:.1%})"
        for rate in (report.top1, report.top5)
    )
    out.print(f"top-1 {top1}   top-5 {top5}   of {report.count} images")
    error = report.calibration
    out.print(f"nll {report.nll:.4f}   calibration error {error.error:.4f} ({error.num_bins} bins)")
    if (known := report.accepted) is not None:
        out.print(f"accepted as known {known.share:.2%} ({known.low:.1%} to {known.high:.1%})")
    rows = []
    for entry in _worst(report.classes, lambda entry: 1.0 if entry.recall is None else entry.recall.share):
        precision = "-" if entry.precision is None else f"{entry.precision:.2%}"
        rate = entry.recall
        recall = (f"{rate.share:.2%}", f"{rate.low:.1%} to {rate.high:.1%}") if rate else ("-", "")
        rows.append((entry.label, str(entry.count), precision, *recall))
    print_table(("class", "images", "precision", "recall", "95 %"), rows)
    names = [entry.label for entry in report.classes]
    if len(names) <= MAX_COLUMNS:
        matrix = zip(names, report.confusion, strict=True)
        print_table(("true \\ predicted", *names), ((name, *map(str, row)) for name, row in matrix))
    mistakes = report.mistakes()[:_MAX_MISTAKES]
    say(*(f"{count} x {true} predicted as {predicted}" for true, predicted, count in mistakes))


def _worst(classes: Sequence[Any], score: Callable[[Any], float]) -> Sequence[Any]:
    """Return all *classes*, or of many those with the lowest *score*."""
    return classes if len(classes) <= _MAX_CLASSES else sorted(classes, key=score)[:_MAX_CLASSES]


def _print_heads(heads: "Sequence[HeadAccuracy]") -> None:
    rows = []
    for head in heads:
        interval = f"{head.top1.low:.1%} to {head.top1.high:.1%}"
        rates = (f"{head.top1.share:.2%}", interval, f"{head.top5.share:.2%}", f"{head.loss:.4f}")
        rows.append((head.name, *rates, f"{head.weight:g}", f"{head.share:.1%}"))
    if rows:
        print_table(("head", "top-1", "95 %", "top-5", "loss", "weight", "share"), rows)


def _print_multi_label_report(report: "MultiLabelReport") -> None:
    out.print(
        f"mAP [bold]{report.map:.2%}[/]   macro F1 {report.macro_f1:.2%}   micro F1 {report.micro_f1:.2%}   "
        f"of {report.count} images"
    )
    rows = []
    for entry in _worst(report.classes, lambda entry: entry.average_precision or 0.0):
        rates = (entry.average_precision, entry.precision, entry.recall, entry.f1)
        shown = ("-" if rate is None else f"{rate:.2%}" for rate in rates)
        rows.append((entry.label, str(entry.count), str(entry.answered), f"{entry.threshold:.3f}", *shown))
    print_table(("class", "images", "predicted", "threshold", "AP", "precision", "recall", "F1"), rows)
