"""`sopdeploy eval` and `report`: how good a network is by one set of figures, and a page on its training."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import Progress
from rich.table import Table

from sopdeploy.cli.console import err, one_line_errors, out, plain_text, print_json

if TYPE_CHECKING:
    from sopdeploy.evaluation.metrics import ClassificationReport, Rate, Score

MOST_CLASSES = 50  # that are listed; of more, the ones found least often
MOST_COLUMNS = 12  # of a confusion matrix on a terminal
MOST_MISTAKES = 5

Scored = tuple[Sequence[str], "list[Score]", dict[str, Any]]
Tell = Callable[[int, int], None]


def evaluate(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="A checkpoint, a bundle, or the URL of a service.")
    ],
    data: Annotated[Path, typer.Option(help="Folder of pictures, DIR/<class>/*.jpg.")],
    tta: Annotated[
        str, typer.Option(metavar="VIEWS", help="Average over views: flip or ten-crop; not for a service.")
    ] = "none",
    runtime: Annotated[
        str | None, typer.Option(help="What computes a bundle, as for serve; tensorrt is the engine.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Which model of a service, where several answer.")] = None,
    api_key: Annotated[str | None, typer.Option(help="The service's API key.")] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes that decode for a checkpoint.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for a script.")] = False,
) -> None:
    """Measure a checkpoint, a bundle or a running service on a folder of pictures.

    Classes are matched by name. Shares come with Wilson's 95 % interval, the calibration error has 15 bins.

    Example: [bold]sopdeploy eval runs/photos-dsop/best.pt --data test-photos[/bold]

    Example: [bold]sopdeploy eval bundles/dsop-resnet20-3f6c01d2a4b7 --data test-photos --tta flip[/bold]

    Example: [bold]sopdeploy eval http://127.0.0.1:8000 --data test-photos --json[/bold]
    """
    with one_line_errors(as_json):
        from sopdeploy.errors import ConfigError
        from sopdeploy.evaluation.metrics import classification_report
        from sopdeploy.evaluation.sources import detect_source

        kind = detect_source(source)
        if runtime is not None and kind != "bundle":
            raise ConfigError(
                f"--runtime {runtime}: only a bundle has a choice of runtimes, this is a {kind}"
            )
        with counted(quiet=as_json) as tell:
            if kind == "service":
                labels, scores, facts = of_service(source, data, tta, model, api_key, tell)
            elif kind == "bundle":
                labels, scores, facts = of_bundle(Path(source), data, tta, runtime, tell)
            else:
                labels, scores, facts = of_checkpoint(Path(source), data, tta, workers, tell)
        found = classification_report(labels, scores)
    if as_json:
        print_json({"source": source, "kind": kind, "tta": tta, **facts, **found.model_dump(mode="json")})
    else:
        show(found)


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run of `sopdeploy train`.")],
    data: Annotated[
        Path | None,
        typer.Option(
            help="Pictures to measure on, DIR/<class>/*.jpg. [dim]default what the recipe holds out[/dim]"
        ),
    ] = None,
    destination: Annotated[
        Path | None, typer.Option("--out", help="The page. [dim]default RUN/report.html[/dim]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for a script.")] = False,
) -> None:
    """Write one page on a run: curves, heads, spectra, gate, confusions, calibration, worst mistakes.

    Example: [bold]sopdeploy report runs/photos-dsop[/bold]

    Example: [bold]sopdeploy report runs/photos-dsop --data test-photos --out page.html[/bold]
    """
    with one_line_errors(as_json), counted(quiet=as_json) as tell:
        from sopdeploy.report import write_report

        page = write_report(run, destination, data=data, on_image=tell)
    if as_json:
        print_json({"report": str(page), "bytes": page.stat().st_size})
    else:
        out.print(plain_text(f"{page}: {page.stat().st_size:,} bytes, opens without a network"))


def of_service(url: str, data: Path, tta: str, model: str | None, api_key: str | None, tell: Tell) -> Scored:
    """Return the scores of a service."""
    from sopdeploy.client import Client
    from sopdeploy.errors import ConfigError
    from sopdeploy.evaluation.sources import score_service

    if tta != "none":
        raise ConfigError(f"--tta {tta}: a service answers pictures as they are; measure its bundle")
    with Client(url, api_key=api_key) as client:
        labels, scores = score_service(client, data, model=model, on_image=tell)
    return labels, scores, {}


def of_bundle(path: Path, data: Path, tta: str, runtime: str | None, tell: Tell) -> Scored:
    """Return the scores of a bundle."""
    from sopdeploy_service.commands.evaluate import scores_of_bundle
    from sopdeploy_service.settings import load_settings

    found = scores_of_bundle(path, data, tta=tta, settings=load_settings(runtime=runtime), on_image=tell)
    facts = {"bundle": found.bundle, "runtime": found.runtime, "device": found.device}
    return found.labels, found.scores, facts


def of_checkpoint(path: Path, data: Path, tta: str, workers: int, tell: Tell) -> Scored:
    """Return the scores of a checkpoint."""
    from sopdeploy.evaluation.prediction import score_checkpoint

    labels, scores = score_checkpoint(path, data, tta=tta, workers=workers, on_image=tell)
    return labels, scores, {}


@contextmanager
def counted(*, quiet: bool) -> Iterator[Tell]:
    """Give what is told how many of how many pictures are done: a bar on a terminal, silence elsewhere."""
    if quiet or not err.is_terminal:
        yield lambda _done, _all: None
        return
    with Progress(console=err, transient=True) as progress:
        task = progress.add_task("pictures", total=None)
        yield lambda done, everything: progress.update(task, completed=done, total=everything)


def show(found: "ClassificationReport") -> None:
    """Print the figures, the classes, and who is taken for whom."""
    out.print(f"top-1 {rate(found.top1)}   top-5 {rate(found.top5)}   of {found.count} pictures")
    error = found.calibration
    out.print(f"nll {found.nll:.4f}   calibration error {error.error:.4f} ({error.bins} bins)")
    classes = sorted(found.classes, key=lambda one: one.recall.share)[:MOST_CLASSES]
    if len(classes) == len(found.classes):
        classes = list(found.classes)
    table = Table("class", "pictures", "precision", "recall", "95 %", box=None, pad_edge=False)
    for one in classes:
        precision = "-" if one.precision is None else f"{one.precision:.2%}"
        interval = f"{one.recall.low:.1%} to {one.recall.high:.1%}"
        table.add_row(plain_text(one.label), str(one.count), precision, f"{one.recall.share:.2%}", interval)
    out.print(table)
    if len(found.classes) <= MOST_COLUMNS:
        show_confusion(found)
    for count, shown, answered in mistakes(found)[:MOST_MISTAKES]:
        out.print(plain_text(f"{count} x {shown} taken for {answered}"))


def show_confusion(found: "ClassificationReport") -> None:
    """Print the confusion matrix: a row is what the pictures show, a column what was answered."""
    table = Table("shown \\ answered", box=None, pad_edge=False)
    for one in found.classes:
        table.add_column(plain_text(one.label))
    for one, row in zip(found.classes, found.confusion, strict=True):
        table.add_row(plain_text(one.label), *map(str, row))
    out.print(table)


def mistakes(found: "ClassificationReport") -> list[tuple[int, str, str]]:
    """Return how often which class was taken for which other one, most often first."""
    names = [one.label for one in found.classes]
    pairs = [
        (count, names[shown], names[answered])
        for shown, row in enumerate(found.confusion)
        for answered, count in enumerate(row)
        if count and shown != answered
    ]
    return sorted(pairs, key=lambda pair: (-pair[0], *pair[1:]))


def rate(found: "Rate") -> str:
    """Return a share with its interval."""
    return f"[bold]{found.share:.2%}[/] ({found.low:.1%} to {found.high:.1%})"
