"""`sopdeploy serve`: serve bundles over HTTP."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from sopdeploy.cli.command import command
from sopdeploy.cli.console import err, plain_text
from sopdeploy.config import Options

BundlesArgument = Annotated[
    list[str], typer.Argument(metavar="BUNDLE...", help="A bundle, a folder of bundles, or NAME=BUNDLE.")
]
SettingOption = Annotated[
    list[str] | None, typer.Option("--set", help="Any other setting as name=value; repeatable.")
]
ConfigOption = Annotated[Path | None, typer.Option(help="TOML file with settings.")]


class ServeOptions(Options):
    """The settings that have an option of their own; `Settings` validates them."""

    host: str | None = None
    """Address to listen on; by default 127.0.0.1."""
    port: int | None = None
    """Port; 0 selects a free port; by default 8000."""
    runtime: str | None = None
    """auto, onnxruntime-cpu, onnxruntime-cuda or tensorrt; by default auto."""
    devices: str | None = None
    """One process per device: `0,1`, UUIDs, MIG ids or `cpu`; by default one process."""
    front_ends: str | None = None
    """Processes per device for HTTP and decoding, or `auto`; by default one for all."""
    threads: int | None = None
    """CPU threads of the runtime."""
    max_batch: int | None = None
    """Largest batch."""
    queue_size: int | None = None
    """Images that may wait in the queue."""
    shadow: str | None = None
    """NAME=SHARE: also send a share of the requests, such as 0.05, to the bundle NAME."""
    model_control: bool = False
    """Allow clients to load, unload and swap models."""
    keys: Path | None = None
    """Require an API key from this file; see `sopdeploy key`."""
    verify_key: Path | None = None
    """Serve only bundles signed with this public key."""
    log: str | None = None
    """Request log format: json or console; by default console on a terminal."""


@command()
def serve(
    bundles: BundlesArgument,
    *,
    options: ServeOptions,
    config: ConfigOption = None,
    assignments: SettingOption = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print all settings as a TOML file and exit.")
    ] = False,
) -> None:
    """Serve bundles over HTTP: POST an image to /v1/classify.

    Settings come from flags or --set name=value, from environment variables such as SOPDEPLOY_PORT, and from
    the --config file, in this order of priority.

    Example: [bold]sopdeploy serve bundles/dsop-resnet20-3f6c01d2a4b7 --port 8000[/bold]

    Example: [bold]sopdeploy serve flowers=bundles/dsop-resnet20-3f6c01d2a4b7 birds=other/bundle[/bold]

    Example: [bold]sopdeploy serve live=bundles/dsop-resnet20-3f6c01d2a4b7 new=other --shadow new=0.05[/bold]
    """
    from sopdeploy_service.settings import load_settings, parse_assignments, to_toml, unused_variables

    given = options.model_dump(exclude_defaults=True)
    settings = load_settings(config, **parse_assignments(assignments or (), **given))
    for name in unused_variables():
        note = f"environment variable {name} is not a setting and has no effect"
        err.print(Text.assemble(("note:", "yellow"), " ", plain_text(note)))
    if print_config:
        sys.stdout.write(to_toml(settings))
        return
    from sopdeploy_service.server.process import serve as run

    raise typer.Exit(run(bundles, settings))
