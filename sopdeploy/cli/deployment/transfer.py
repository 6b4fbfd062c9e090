"""`sopdeploy sign`, `push` and `pull`: a bundle from here to there, and who made it."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from sopdeploy.cli.console import err, one_line_errors, out, plain, print_json

Json = Annotated[bool, typer.Option("--json", help="Print JSON for a script.")]


def sign(
    bundle: Annotated[Path, typer.Argument(help="A bundle that `sopdeploy export` wrote.")],
    key: Annotated[Path, typer.Option(help="The secret key; of minisign too, without a password.")],
    new_key: Annotated[
        bool, typer.Option("--new-key", help="Make the key first; its public part goes to KEY.pub.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Sign a bundle: writes BUNDLE.minisig beside it, for --verify-key of `pull` and `serve`.

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
        out.print(f"key      {plain(str(key))}: keep it; give away {plain(str(public))}")
    out.print(f"signed   {plain(str(signature))}")


def push(
    bundle: Annotated[Path, typer.Argument(help="A bundle that `sopdeploy export` wrote.")],
    destination: Annotated[
        str, typer.Argument(metavar="DEST", help="A folder, s3://BUCKET/PATH or oci://HOST/REPOSITORY[:TAG].")
    ],
    as_json: Json = False,
) -> None:
    """Put a bundle somewhere as one file, the same for everybody, with its signature where there is one.

    Example: [bold]sopdeploy push bundles/dsop-resnet20-3f6c01d2a4b7 s3://models/flowers[/bold]
    """
    with one_line_errors(as_json):
        from sopdeploy.bundle.transfer.push_pull import push as run

        pushed = run(bundle, destination)
    if as_json:
        print_json(asdict(pushed))
        return
    signed = "with its signature" if pushed.signed else "not signed"
    out.print(f"pushed   {plain(pushed.place)} ({pushed.bytes:,} bytes, {signed})")
    out.print(f"sha256   {pushed.sha256}")


def pull(
    source: Annotated[str, typer.Argument(help="What `push` printed: a path, s3://... or oci://...")],
    destination: Annotated[Path, typer.Argument(metavar="DIR", help="Folder for the bundle.")],
    sha256: Annotated[str | None, typer.Option(help="What the archive's sha256 must be.")] = None,
    verify_key: Annotated[Path | None, typer.Option(help="Public key that must have signed it.")] = None,
    max_bytes: Annotated[int, typer.Option(min=1, help="Largest archive.")] = 8_000_000_000,
    as_json: Json = False,
) -> None:
    """Fetch a bundle, check signature and hashes, and give it its name only then.

    Example: [bold]sopdeploy pull s3://models/flowers/dsop-resnet20-3f6c01d2a4b7.tar bundles[/bold]
    """
    with one_line_errors(as_json):
        from sopdeploy.bundle.transfer.push_pull import pull as run

        pulled = run(source, destination, sha256=sha256, verify_key=verify_key, max_bytes=max_bytes)
    if as_json:
        print_json(asdict(pulled))
        return
    signed = "signature and hashes" if pulled.verified else "hashes"
    out.print(f"pulled   {plain(str(pulled.path))} ({signed} checked)")


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
        from sopdeploy_service.http.api_keys import new_key

        made = new_key(file, name, rate=rate, burst=burst, admin=admin)
    sys.stdout.write(made + "\n")
    err.print(f"{plain(str(file))} holds its hash only: keep the key, it is not shown again")
