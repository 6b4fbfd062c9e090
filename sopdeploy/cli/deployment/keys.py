"""`sopdeploy sign` and `sopdeploy key`: signatures of bundles, and API keys of the server."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from sopdeploy.cli.command import command
from sopdeploy.cli.console import BundleArgument, err, plain_text, print_field


def _show(signed: dict[str, Any]) -> None:
    """Print the signature file, and the public key if it is new."""
    if signed["public_key"] is not None:
        print_field("key", f"distribute {signed['public_key']}, keep the other file secret", style="")
    print_field("signed", str(signed["signature"]), style="")


@command(_show)
def sign_command(
    bundle: BundleArgument,
    key: Annotated[Path, typer.Option(help="Private key in a PEM file: an elliptic curve key.")],
    new_key: Annotated[
        bool, typer.Option("--new-key", help="Create the key first; the public key is written to KEY.pub.")
    ] = False,
) -> dict[str, Any]:
    """Sign a bundle: write BUNDLE.sig beside it, for --require-signature of `pull` and `serve`.

    The signature has the format of OpenSSF Model Signing; `model_signing verify key` accepts it, too.

    Example: [bold]sopdeploy sign bundles/photos-3f6c01d2a4b7 --key release.key[/bold]
    """
    from sopdeploy.bundle.signing import make_key
    from sopdeploy.bundle.signing import sign as run

    public = make_key(key) if new_key else None
    return {"signature": run(bundle, key), "public_key": public}


@command()
def key_command(
    name: Annotated[str, typer.Argument(help="Name of the client; it appears in the server's log.")],
    keys: Annotated[Path, typer.Option(help="API key file; created if it is missing.")],
    rate: Annotated[
        float | None, typer.Option(help="Largest number of images per second; by default no limit.")
    ] = None,
    burst: Annotated[
        int | None, typer.Option(min=1, help="Images allowed at once after a pause; by default 32.")
    ] = None,
    admin: Annotated[bool, typer.Option("--admin", help="Allow the key to load and swap models.")] = False,
) -> None:
    """Create an API key, print it once and store its hash; servers read the file when they start.

    Example: [bold]sopdeploy key phone-app --keys keys.toml --rate 100[/bold]
    """
    from sopdeploy_service.http.api_keys import new_key

    created = new_key(keys, name, rate=rate, burst=burst, admin=admin)
    sys.stdout.write(created + "\n")
    err.print(plain_text(f"{keys} stores only a hash: keep the key, it is not shown again"))
