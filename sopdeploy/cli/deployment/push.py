"""`sopdeploy push`: upload a bundle as one archive."""

from dataclasses import asdict
from typing import Annotated

import typer

from sopdeploy.cli.console import BundleArgument, JsonOption, one_line_errors, print_field, print_json


def push(
    bundle: BundleArgument,
    destination: Annotated[
        str, typer.Argument(metavar="DEST", help="A folder, s3://BUCKET/PATH or oci://HOST/REPOSITORY[:TAG].")
    ],
    as_json: JsonOption = False,
) -> None:
    """Upload a bundle as one reproducible archive, with its signature if there is one.

    Example: [bold]sopdeploy push bundles/dsop-resnet20-3f6c01d2a4b7 s3://models/flowers[/bold]
    """
    with one_line_errors(as_json):
        from sopdeploy.bundle.transfer.push_pull import push as run

        pushed = run(bundle, destination)
    if as_json:
        print_json(asdict(pushed))
        return
    signed = "with its signature" if pushed.signed else "not signed"
    print_field("pushed", f"{pushed.place} ({pushed.bytes:,} bytes, {signed})", style="")
    print_field("sha256", pushed.sha256, style="")
