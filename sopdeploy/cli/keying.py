"""`sopdeploy key`: a key for a server that does not answer everybody."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from sopdeploy.cli.console import err, one_line_errors, plain


def key(
    name: Annotated[str, typer.Argument(help="Who it is for; this name stands in the server's log.")],
    file: Annotated[Path, typer.Option(help="The file of keys; made where there is none.")],
    rate: Annotated[float | None, typer.Option(help="Images per second; else without limit.")] = None,
    burst: Annotated[
        int | None, typer.Option(min=1, help="Images at once after a pause. [dim]default 32[/dim]")
    ] = None,
    admin: Annotated[bool, typer.Option("--admin", help="May also load, unload and swap models.")] = False,
) -> None:
    """Make a key, print it once and write its hash; a server reads the file when it starts.

    Example: [bold]sopdeploy key phone-app --file keys.toml --rate 100[/bold]
    """
    with one_line_errors():
        from sopdeploy_service.keys import new_key

        made = new_key(file, name, rate=rate, burst=burst, admin=admin)
    sys.stdout.write(made + "\n")
    err.print(f"{plain(str(file))} holds its hash only: keep the key, it is not shown again")
