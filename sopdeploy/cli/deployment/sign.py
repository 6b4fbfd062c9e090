"""`sopdeploy sign`: sign a bundle with an Ed25519 key."""

from pathlib import Path
from typing import Annotated

import typer

from sopdeploy.cli.console import BundleArgument, JsonOption, one_line_errors, print_field, print_json


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
