"""`sopdeploy runs`: list runs and bundles."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from sopdeploy.bundle.listing import Listed, list_bundles
from sopdeploy.cli.command import command
from sopdeploy.cli.console import out, plain_text, say
from sopdeploy.config import StrictModel
from sopdeploy.errors import CheckpointError
from sopdeploy.project import Origin, short_time


class Row(StrictModel):
    """A run and a bundle of it; one of the two may be missing.

    `date` is the time of the export or, without a bundle, that of the start of the run, in UTC. `live` says
    whether a server of the folder of bundles serves the bundle; `problem` says why not, or what is damaged.
    """

    run: str = ""
    project: str = ""
    date: str = ""
    images: int | None = None
    classes: int | None = None
    estimate: str = ""
    bundle: str = ""
    live: bool = False
    problem: str = ""

    @classmethod
    def of(cls, origin: Origin | None, project: str, bundle: Listed | None = None, **fields: Any) -> "Row":
        """Describe the *bundle* of a run, or the run alone, with *origin*."""
        if bundle is not None:
            fields |= {"bundle": bundle.path.name, "live": not bundle.reason, "problem": bundle.reason}
        if bundle is not None and bundle.manifest is not None:
            fields["date"] = bundle.manifest.exported_at
        if origin is None:
            return cls(project=project, **fields)
        data = {"images": origin.data.images, "classes": origin.data.classes}
        return cls(project=project, **{"run": origin.run.name, "date": origin.run.started, **data, **fields})


def list_rows(runs: Path, bundles: Path) -> Iterator[Row]:
    """Yield a row for each bundle in *bundles*, and one for each run in *runs* without a bundle there."""
    listed = list_bundles(bundles)
    for best in sorted(runs.glob("*/best.pt")):
        if best.parent.is_symlink():
            continue
        from sopdeploy.checkpoint import read_checkpoint
        from sopdeploy.training.epoch_choice import HeldOutEstimate
        from sopdeploy.training.procedure import read_record

        try:
            checkpoint = read_checkpoint(best)
        except CheckpointError as error:
            yield Row(run=best.parent.name, problem=str(error))
            continue
        record, origin = read_record(checkpoint.training), checkpoint.origin
        estimate = "" if record is None else record.describe_score()
        if "estimate" in checkpoint.training:
            estimate = HeldOutEstimate.model_validate(checkpoint.training["estimate"]).describe()
        exported = [one for one in listed if origin is not None and _run_id(one) == origin.run.id]
        for bundle in (*exported, *([] if exported else [None])):
            yield Row.of(origin, checkpoint.project, bundle, run=best.parent.name, estimate=estimate)
        listed = [one for one in listed if one not in exported]
    for one in listed:
        origin = None if one.manifest is None else one.manifest.origin
        yield Row.of(origin, "" if one.manifest is None else one.manifest.project, one)


def _run_id(bundle: Listed) -> str | None:
    origin = None if bundle.manifest is None else bundle.manifest.origin
    return None if origin is None else origin.run.id


def show(rows: list[Row]) -> None:
    """Print a table, the newest first; it is not wrapped, so that every row is one line."""
    if not rows:
        say("no runs and no bundles here; start with: sopdeploy train --data photos")
        return
    table: list[tuple[str, ...]] = [("date (UTC)", "run", "images", "classes", "estimate", "bundle", "")]
    for row in rows:
        counts = ("" if number is None else str(number) for number in (row.images, row.classes))
        estimate, state = row.estimate.partition(" (")[0], "live" if row.live else row.problem
        cells = (short_time(row.date), row.run, *counts, estimate, row.bundle, state)
        table.append(tuple(plain_text(cell).plain for cell in cells))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells in table:
        out.print(Text("  ".join(map(str.ljust, cells, widths)).rstrip()))


@command(show)
def runs(
    folder: Annotated[Path, typer.Option("--runs", help="Folder of runs.")] = Path("runs"),
    bundles: Annotated[Path, typer.Option(help="Folder of bundles.")] = Path("bundles"),
) -> list[Row]:
    """List runs and bundles: date, images, classes, estimate, and the bundles that a server serves (live).

    Example: [bold]sopdeploy runs[/bold]

    Example: [bold]sopdeploy runs --bundles /srv/models --json[/bold]
    """
    return sorted(list_rows(folder, bundles), key=lambda row: row.date, reverse=True)
