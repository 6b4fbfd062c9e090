"""`sopdeploy sign`, `push` and `pull`: sign a bundle, upload it as one archive, download and check it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sopdeploy.cli.command import command
from sopdeploy.cli.console import BundleArgument, print_field

if TYPE_CHECKING:
    from sopdeploy.bundle.transfer import Pulled, Pushed


def show_pushed(pushed: "Pushed") -> None:
    """Print the location of the archive and its hash."""
    signed = "with its signature" if pushed.signed else "not signed"
    print_field("pushed", f"{pushed.url} ({pushed.bytes:,} bytes, {signed})", style="")
    print_field("sha256", pushed.sha256, style="")


@command(show_pushed)
def push_command(
    bundle: BundleArgument,
    destination: Annotated[
        str, typer.Argument(metavar="DEST", help="A folder, s3://BUCKET/PATH or hf://OWNER/NAME.")
    ],
) -> "Pushed":
    """Upload a bundle as one reproducible archive, with its signature if there is one.

    Example: sopdeploy push bundles/photos-3f6c01d2a4b7 s3://models/flowers
    """
    from sopdeploy.bundle.transfer import push as run

    return run(bundle, destination)


def show_pulled(pulled: "Pulled") -> None:
    """Print the folder of the bundle and what was checked."""
    checked = "signature and hashes" if pulled.verified else "hashes"
    print_field("pulled", f"{pulled.path} ({checked} checked)", style="")


@command(show_pulled)
def pull_command(
    source: Annotated[str, typer.Argument(help="Location printed by `push`: a path, s3://... or hf://...")],
    destination: Annotated[Path, typer.Argument(metavar="DIR", help="Folder for the bundle.")],
    sha256: Annotated[str | None, typer.Option(help="Expected sha256 of the archive.")] = None,
    require_signature: Annotated[
        Path | None, typer.Option(help="Require a signature that this public key verifies.")
    ] = None,
) -> "Pulled":
    """Download a bundle, check signature and hashes, and only then move it to its final name.

    Example: sopdeploy pull s3://models/flowers/photos-3f6c01d2a4b7.tar bundles
    """
    from sopdeploy.bundle.transfer import pull as run

    return run(source, destination, sha256=sha256, require_signature=require_signature)


@command()
def sign_command(
    bundle: BundleArgument,
    key: Annotated[Path, typer.Option(help="Private key in a PEM file: an elliptic curve key.")],
    new_key: Annotated[
        bool, typer.Option("--new-key", help="Create the key first; the public key is written to KEY.pub.")
    ] = False,
) -> None:
    """Sign a bundle: write BUNDLE.sig beside it, for --require-signature of `pull` and `serve`.

    The signature has the format of OpenSSF Model Signing; `model_signing verify key` accepts it, too.

    Example: sopdeploy sign bundles/photos-3f6c01d2a4b7 --key release.key
    """
    from sopdeploy.bundle.signing import make_key
    from sopdeploy.bundle.signing import sign as run

    public = make_key(key) if new_key else None
    signature = run(bundle, key)
    if public is not None:
        print_field("key", f"distribute {public}, keep the other file secret", style="")
    print_field("signed", str(signature), style="")
