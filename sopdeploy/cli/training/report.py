"""`sopdeploy report`: write an HTML report on a run."""

from pathlib import Path
from typing import Annotated, Any

import typer

from sopdeploy.cli.command import command
from sopdeploy.cli.console import image_progress, say


def _show(written: dict[str, Any]) -> None:
    """Print the page and its size."""
    say(f"{written['report']}: {written['bytes']:,} bytes, opens offline")


@command(_show)
def report_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A folder written by `sopdeploy train`.")],
    data: Annotated[
        Path | None,
        typer.Option(help="Images to evaluate, DIR/<class>/*.jpg; by default the held-out images."),
    ] = None,
    out_file: Annotated[Path | None, typer.Option(help="The HTML file; by default RUN/report.html.")] = None,
) -> dict[str, Any]:
    """Write an HTML report on a run: curves, components, confusions, calibration, worst mistakes.

    Example: [bold]sopdeploy report runs/latest[/bold]

    Example: [bold]sopdeploy report runs/latest --data test-photos --out-file page.html[/bold]
    """
    with image_progress() as on_image:
        from sopdeploy.report.page import write_run_report

        page = write_run_report(run, out_file, data=data, on_image=on_image)
    return {"report": str(page), "bytes": page.stat().st_size}
