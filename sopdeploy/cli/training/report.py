"""`sopdeploy report`: write an HTML report on a run."""

from pathlib import Path
from typing import Annotated

import typer

from sopdeploy.cli.console import JsonOption, image_progress, one_line_errors, out, plain_text, print_json


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A folder written by `sopdeploy train`.")],
    data: Annotated[
        Path | None,
        typer.Option(help="Images to evaluate, DIR/<class>/*.jpg. [dim]default: the held-out images[/dim]"),
    ] = None,
    destination: Annotated[
        Path | None, typer.Option("--out", help="The HTML file. [dim]default RUN/report.html[/dim]")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write an HTML report on a run: curves, spectra, gates, confusions, calibration, worst mistakes.

    Example: [bold]sopdeploy report runs/latest[/bold]

    Example: [bold]sopdeploy report runs/latest --data test-photos --out page.html[/bold]
    """
    with one_line_errors(as_json), image_progress(quiet=as_json) as on_image:
        from sopdeploy.report import write_report

        page = write_report(run, destination, data=data, on_image=on_image)
    if as_json:
        print_json({"report": str(page), "bytes": page.stat().st_size})
    else:
        out.print(plain_text(f"{page}: {page.stat().st_size:,} bytes, opens offline"))
