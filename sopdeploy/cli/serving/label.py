"""`sopdeploy label`: label kept photographs on a local web page."""

from pathlib import Path
from typing import Annotated

import typer

from sopdeploy.cli.command import command
from sopdeploy.cli.console import print_field, say


@command()
def label_command(
    kept: Annotated[
        Path, typer.Argument(metavar="KEPT", help="Folder that `serve --setting keep=KEPT` has written.")
    ],
    photos: Annotated[
        Path,
        typer.Option(help="Folder of the classes; labels go to PHOTOS, PHOTOS-held-out, PHOTOS-unknown."),
    ] = Path("photos"),
    host: Annotated[
        str, typer.Option(help="IP address to listen on; one that other machines reach demands a key.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="TCP port to listen on; 0 is any free port.")
    ] = 8001,
) -> None:
    """Label kept photographs on a local web page, by keyboard or touch; Ctrl-C ends it.

    Each label moves a photograph to PHOTOS/<class>/, one of the uniform sample to PHOTOS-held-out/<class>/,
    and one of no class to PHOTOS-unknown/.

    Example: sopdeploy label kept

    Example: sopdeploy label kept --photos flowers --host 192.168.1.5
    """
    from sopdeploy_service.labelling.app import run_label_server

    def show(url: str, count: int) -> None:
        print_field("photos", f"{count:,} to label")
        print_field("page", url, style="bold green")

    folders = run_label_server(kept, photos, host, port, show)
    moved = [step.target for step in folders.steps if step.target is not None]
    steps = [f"next: sopdeploy train --data {photos}"] if folders.photos.is_dir() else []
    say(f"{len(moved):,} labels", *steps)
