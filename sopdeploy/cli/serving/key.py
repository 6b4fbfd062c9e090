"""`sopdeploy key`: create an API key."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from sopdeploy.cli.console import err, one_line_errors, plain_text


def key(
    name: Annotated[str, typer.Argument(help="Name of the client; it appears in the server's log.")],
    file: Annotated[Path, typer.Option(help="Key file; created if it is missing.")],
    rate: Annotated[float | None, typer.Option(help="Images per second. [dim]default: any[/dim]")] = None,
    burst: Annotated[
        int | None, typer.Option(min=1, help="Images allowed at once after a pause. [dim]default: 32[/dim]")
    ] = None,
    admin: Annotated[bool, typer.Option("--admin", help="May also load, unload and swap models.")] = False,
) -> None:
    """Create an API key, print it once and store its hash; servers read the file when they start.

    Example: [bold]sopdeploy key phone-app --file keys.toml --rate 100[/bold]
    """
    with one_line_errors():
        from sopdeploy_service.http.api_keys import new_key

        created = new_key(file, name, rate=rate, burst=burst, admin=admin)
    sys.stdout.write(created + "\n")
    err.print(plain_text(f"{file} stores only a hash: keep the key, it is not shown again"))
