"""`sopdeploy eval`: evaluate a checkpoint, a bundle or a server."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from sopdeploy.api.options import EvaluateOptions
from sopdeploy.cli.command import command
from sopdeploy.cli.console import err, image_progress, out, plain_text

if TYPE_CHECKING:
    from sopdeploy.api.evaluation import Evaluation
    from sopdeploy.evaluation.heads import HeadAccuracy
    from sopdeploy.evaluation.metrics import ClassificationReport
    from sopdeploy.evaluation.multi_label import MultiLabelReport

MAX_CLASSES = 50  # of more classes, the output lists those with the lowest recall or average precision
MAX_COLUMNS = 12  # with more classes, the terminal shows no confusion matrix
MAX_MISTAKES = 5


def show(evaluation: "Evaluation") -> None:
    """Print the metrics, and the frequent mistakes."""
    from sopdeploy.evaluation.metrics import ClassificationReport

    for note in evaluation.notes:
        err.print(plain_text(f"warning: {note}"))
    if isinstance(evaluation.metrics, ClassificationReport):
        _print_report(evaluation.metrics)
        _print_heads(evaluation.heads)
    else:
        _print_multi_label_report(evaluation.metrics)


def summarize(evaluation: "Evaluation") -> dict[str, Any]:
    """Build the JSON output."""
    heads = [head.model_dump(mode="json") for head in evaluation.heads]
    return {
        "source": evaluation.source,
        "kind": evaluation.kind,
        "tta": evaluation.tta,
        **evaluation.facts,
        "notes": list(evaluation.notes),
        **({"heads": heads} if heads else {}),
        **evaluation.metrics.model_dump(mode="json"),
    }


@command(show, summarize=summarize)
def evaluate(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="A checkpoint, a bundle, or the URL of a server.")
    ],
    data: Annotated[Path, typer.Option(help="Folder of images, DIR/<class>/*.jpg or with labels.csv.")],
    *,
    options: EvaluateOptions,
) -> "Evaluation":
    """Evaluate a checkpoint, a bundle or a running server on a folder of images.

    Classes are matched by name; classes without images are named and left out. Accuracies have Wilson 95 %
    intervals; the calibration error uses 15 bins. If a temperature was fitted, the output includes the
    calibration error without it; if a rejection threshold was fitted, the fraction of accepted images.
    --heads adds top-1, top-5 and loss of every branch, and its share of the weighted training loss. A network
    with several classes per image needs a folder with `labels.csv`; its metrics are mAP, and F1 of each class
    at its threshold.

    Example: [bold]sopdeploy eval runs/latest/best.pt --data test-photos[/bold]

    Example: [bold]sopdeploy eval bundles/dsop-resnet20-3f6c01d2a4b7 --data test-photos --tta flip[/bold]

    Example: [bold]sopdeploy eval http://127.0.0.1:8000 --data test-photos --json[/bold]
    """
    with image_progress() as on_image:
        from sopdeploy.api.evaluation import evaluate as run

        return run(source, data, options=options, on_image=on_image)


def _print_report(found: "ClassificationReport") -> None:
    top1, top5 = (
        f"[bold]{rate.share:.2%}[/] ({rate.low:.1%} to {rate.high:.1%})" for rate in (found.top1, found.top5)
    )
    out.print(f"top-1 {top1}   top-5 {top5}   of {found.count} images")
    error = found.calibration
    before = found.uncalibrated_error
    without = "" if before is None else f", {before:.4f} without the temperature"
    out.print(f"nll {found.nll:.4f}   calibration error {error.error:.4f} ({error.bins} bins){without}")
    if (known := found.accepted) is not None:
        out.print(f"accepted as known {known.share:.2%} ({known.low:.1%} to {known.high:.1%})")
    classes: Any = found.classes
    if len(classes) > MAX_CLASSES:
        classes = sorted(classes, key=lambda one: 1.0 if one.recall is None else one.recall.share)[
            :MAX_CLASSES
        ]
    table = Table("class", "images", "precision", "recall", "95 %", box=None, pad_edge=False)
    for one in classes:
        precision = "-" if one.precision is None else f"{one.precision:.2%}"
        recall = (
            (f"{rate.share:.2%}", f"{rate.low:.1%} to {rate.high:.1%}") if (rate := one.recall) else ("-", "")
        )
        table.add_row(plain_text(one.label), str(one.count), precision, *recall)
    out.print(table)
    names = [one.label for one in found.classes]
    if len(names) <= MAX_COLUMNS:
        matrix = Table("true \\ predicted", box=None, pad_edge=False)
        for name in names:
            matrix.add_column(plain_text(name))
        for name, row in zip(names, found.confusion, strict=True):
            matrix.add_row(plain_text(name), *map(str, row))
        out.print(matrix)
    mistakes = sorted(
        (-count, names[true], names[predicted])
        for true, row in enumerate(found.confusion)
        for predicted, count in enumerate(row)
        if count and true != predicted
    )
    for count, true, predicted in mistakes[:MAX_MISTAKES]:
        out.print(plain_text(f"{-count} x {true} predicted as {predicted}"))


def _print_heads(heads: "Sequence[HeadAccuracy]") -> None:
    if not heads:
        return
    table = Table("head", "top-1", "95 %", "top-5", "loss", "weight", "share", box=None, pad_edge=False)
    for one in heads:
        top1, top5 = one.top1, one.top5
        interval = f"{top1.low:.1%} to {top1.high:.1%}"
        rates = (f"{top1.share:.2%}", interval, f"{top5.share:.2%}", f"{one.loss:.4f}")
        table.add_row(one.name, *rates, f"{one.weight:g}", f"{one.share:.1%}")
    out.print(table)


def _print_multi_label_report(found: "MultiLabelReport") -> None:
    out.print(
        f"mAP [bold]{found.map:.2%}[/]   macro F1 {found.macro_f1:.2%}   micro F1 {found.micro_f1:.2%}   "
        f"of {found.count} images"
    )
    classes: Any = found.classes
    if len(classes) > MAX_CLASSES:
        classes = sorted(classes, key=lambda one: one.average_precision or 0.0)[:MAX_CLASSES]
    columns = ("class", "images", "predicted", "threshold", "AP", "precision", "recall", "F1")
    table = Table(*columns, box=None, pad_edge=False)
    for one in classes:
        rates = (one.average_precision, one.precision, one.recall, one.f1)
        shown = ["-" if rate is None else f"{rate:.2%}" for rate in rates]
        table.add_row(
            plain_text(one.label), str(one.count), str(one.answered), f"{one.threshold:.3f}", *shown
        )
    out.print(table)
