"""The page `runs/index.html`, which lists runs and bundles."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote

from sopdeploy.base.files import atomic_write, writing
from sopdeploy.base.project import RUNS, Origin
from sopdeploy.errors import CheckpointError, amount

BUNDLES = Path("bundles")
PAGE = "index.html"  # of the folder `runs`
MAX_BEFORE = 5  # runs that a page lists


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRow:
    """A run, a bundle, or a bundle and its run; `problem` says why it is not served or cannot be read.

    `live`: `promote` has recorded it so. `newest`: of its project, the last export that is complete.
    """

    project: str = ""
    date: str = ""
    run: str = ""
    num_images: int | None = None
    num_classes: int | None = None
    estimate: str = ""
    warnings: tuple[str, ...] = ()
    bundle: str = ""
    live: bool = False
    newest: bool = False
    problem: str = ""


def _describe_origin(origin: Origin | None) -> RunRow:
    """Return what *origin* says about a run."""
    if origin is None:
        return RunRow()
    num_images = origin.num_images
    num_classes = origin.num_classes
    return RunRow(
        date=origin.started, run=origin.run, num_images=num_images, num_classes=num_classes
    )


def write_runs_page() -> None:
    """Write `runs/index.html`, which lists the runs in `runs` and the bundles in `bundles`."""
    from sopdeploy.html.report import HtmlReport, Section, Table, render

    runs = list_runs()
    table = Table(
        caption="A run leads to its report, a bundle to its page. The commands train and export update this page.",
        columns=["date (UTC)", "run", "images", "classes", "accuracy", "bundle", "state"],
        rows=[_cells(row) for row in runs],
        pages=_find_pages(runs),
    )
    sections = [Section(title="The newest first", tables=[table])]
    page = HtmlReport(title="Runs and bundles", sections=sections)
    with writing(RUNS), atomic_write(RUNS / PAGE) as partial:
        partial.write_text(render(page), encoding="utf-8")


def _find_pages(runs: Sequence[RunRow]) -> dict[tuple[int, int], str]:
    """Find the reports and the pages of bundles, by the row and the column of the cells that lead to them."""
    pages = {}
    for number, row in enumerate(runs):
        # The first column is the header of the row.
        places = (
            (0, RUNS / row.run / "report.html", row.run),
            (4, BUNDLES / f"{row.bundle}.html", row.bundle),
        )
        for column, page, name in places:
            if name and page.is_file():
                pages[number, column] = quote(os.path.relpath(page, RUNS))
    return pages


def _cells(row: RunRow) -> list[str]:
    """Return the cells of *row*, with the states that a server and `export` care about."""
    states = (
        "live" if row.live else "",
        "newest" if row.newest else "",
        amount(len(row.warnings), "warning") if row.warnings else "",
        row.problem,
    )
    date = row.date[:16].replace("T", " ")
    estimate = row.estimate.removeprefix("accuracy ")  # the name of the column
    cells = (date, row.run, row.num_images, row.num_classes, estimate, row.bundle)
    return [
        *("" if cell is None else str(cell) for cell in cells),
        ", ".join(filter(None, states)),
    ]


def list_runs() -> list[RunRow]:
    """List the runs in `runs` and the bundles in `bundles`, the newest first.

    Of each project, `serve bundles` serves the bundle that was promoted last, or else the newest one that
    `promote` has not refused.
    """
    from sopdeploy.bundle.listing import list_bundles

    row_of_run = _read_runs()
    rows = []
    exported = set()  # ids of runs with a bundle
    projects = set()  # whose newest bundle has a row

    # A row for each bundle, which knows its run by its id.
    for listed in list_bundles(BUNDLES):
        manifest = listed.manifest
        row = RunRow()  # of a bundle whose manifest cannot be read
        if manifest is not None:
            run_id = "" if manifest.origin is None else manifest.origin.run_id
            exported.add(run_id)
            # The run may be elsewhere; then the bundle says what is known of it.
            row = row_of_run.get(run_id, _describe_origin(manifest.origin))
            row = replace(row, project=manifest.project, date=manifest.exported_at)

        is_newest = row.project not in projects and not listed.is_damaged
        if is_newest:
            projects.add(row.project)

        rows.append(
            replace(
                row,
                bundle=listed.path.name,
                live=listed.is_live,
                newest=is_newest,
                problem=listed.why_not_served,
            )
        )

    # Then the runs that were not exported.
    rows += [row for run_id, row in row_of_run.items() if run_id not in exported]
    return sorted(rows, key=lambda row: row.date, reverse=True)


def _read_runs() -> dict[str, RunRow]:
    """Return the rows of the runs in `runs` by id, as `read_run` returns them."""
    rows = {}
    for best in sorted(RUNS.glob("*/best.pt")):
        if best.parent.is_symlink():  # `runs/latest`
            continue
        run_id, row = read_run(best)
        rows[run_id] = row
    return rows


def read_run(best: Path) -> tuple[str, RunRow]:
    """Return the id and the row of the run of the checkpoint *best*.

    If the checkpoint cannot be read or has no id, the name of its folder takes the place of the id.
    """
    from sopdeploy.training.records.summary import RunSummary, read_summary, training_rows

    # Runs of 0.2.0 and before have no summary, so their checkpoints are read.
    name = best.parent.name
    try:
        summary = read_summary(best.parent)
        if summary is None:
            from sopdeploy.weights.checkpoint import read_checkpoint  # imports torch

            content = read_checkpoint(best)
            summary = RunSummary.of(content.project, content.origin, content.training)
        estimate = dict(training_rows(summary.training)).get("accuracy", "")
    except CheckpointError as error:
        return name, RunRow(run=name, problem=str(error))

    origin = summary.origin
    run_id = name if origin is None else origin.run_id
    row = replace(
        _describe_origin(origin),
        run=name,
        project=summary.project,
        estimate=str(estimate),
        warnings=tuple(summary.training.get("warnings", ())),
    )
    return run_id, row


def list_runs_before(folder: Path, project: str | None) -> list[tuple[object, ...]]:
    """Return date, name, images, classes and accuracy of runs of *project* beside *folder*.

    These are the `MAX_BEFORE` newest ones whose accuracy is known. A checkpoint is read only of
    runs without `run.json`.
    """
    files = folder.parent.glob("*/best.pt")
    others = [best for best in files if not best.parent.is_symlink() and best.parent != folder]
    others.sort(key=lambda best: best.stat().st_mtime, reverse=True)

    rows: list[tuple[object, ...]] = []
    for best in others:
        if len(rows) == MAX_BEFORE:
            break
        _, row = read_run(best)
        if row.estimate and row.project == project:
            date = row.date[:16].replace("T", " ")
            rows.append((date, row.run, row.num_images, row.num_classes, row.estimate))

    return rows
