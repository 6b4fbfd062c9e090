"""`sopdeploy sign` and `sopdeploy key`: signatures of bundles, and API keys of the server."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from sopdeploy.cli.console import (
    BundleArgument,
    JsonOption,
    err,
    one_line_errors,
    plain_text,
    print_field,
    print_json,
)


def sign(
    bundle: BundleArgument,
    key: Annotated[Path, typer.Option(help="Secret key file of sopdeploy or minisign, without a password.")],
    new_key: Annotated[
        bool, typer.Option("--new-key", help="Create the key first; the public key is written to KEY.pub.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Sign a bundle: write BUNDLE.minisig beside it, for --verify-key of `pull` and `serve`.

    Example: [bold]sopdeploy sign bundles/dsop-resnet20-3f6c01d2a4b7 --key release.key[/bold]
    """
    with one_line_errors(as_json):
        from sopdeploy.bundle.signing import make_key
        from sopdeploy.bundle.signing import sign as run

        public = make_key(key) if new_key else None
        signature = run(bundle, key)
    if as_json:
        print_json({"signature": signature, "public_key": public})
        return
    if public is not None:
        print_field("key", f"{key}: keep it secret; distribute {public}", style="")
    print_field("signed", str(signature), style="")


def key(
    name: Annotated[str, typer.Argument(help="Name of the client; it appears in the server's log.")],
    file: Annotated[Path, typer.Option(help="Key file; created if it is missing.")],
    rate: Annotated[
        float | None, typer.Option(help="Largest number of images per second. [dim]default: no limit[/dim]")
    ] = None,
    burst: Annotated[
        int | None, typer.Option(min=1, help="Images allowed at once after a pause. [dim]default: 32[/dim]")
    ] = None,
    admin: Annotated[bool, typer.Option("--admin", help="Allow the key to load and swap models.")] = False,
) -> None:
    """Create an API key, print it once and store its hash; servers read the file when they start.

    Example: [bold]sopdeploy key phone-app --file keys.toml --rate 100[/bold]
    """
    with one_line_errors():
        from sopdeploy_service.http.api_keys import new_key

        created = new_key(file, name, rate=rate, burst=burst, admin=admin)
    sys.stdout.write(created + "\n")
    err.print(plain_text(f"{file} stores only a hash: keep the key, it is not shown again"))
