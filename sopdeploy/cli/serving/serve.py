"""`sopdeploy serve`: serve bundles over HTTP."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from sopdeploy.cli.console import err, one_line_errors, plain_text

BundlesArgument = Annotated[
    list[str], typer.Argument(metavar="BUNDLE...", help="A bundle, a folder of bundles, or NAME=BUNDLE.")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="Any other setting as name=value; repeatable.")
]


def serve(
    bundles: BundlesArgument,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on. [dim]default: 127.0.0.1[/dim]")
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=0, help="Port; 0 selects a free port. [dim]default: 8000[/dim]")
    ] = None,
    runtime: Annotated[
        str | None,
        typer.Option(help="auto, onnxruntime-cpu, onnxruntime-cuda or tensorrt. [dim]default: auto[/dim]"),
    ] = None,
    devices: Annotated[
        str | None,
        typer.Option(
            help="One process per device: `0,1`, UUIDs, MIG ids or `cpu`. [dim]default: one process[/dim]"
        ),
    ] = None,
    front_ends: Annotated[
        str | None,
        typer.Option(
            help="Processes per device for HTTP and decoding, or `auto`. [dim]default: one for all[/dim]"
        ),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of the runtime.")] = None,
    max_batch: Annotated[int | None, typer.Option(min=1, help="Largest batch.")] = None,
    max_body_bytes: Annotated[int | None, typer.Option(min=1, help="Largest request body.")] = None,
    max_pixels: Annotated[int | None, typer.Option(min=1, help="Largest image in pixels.")] = None,
    queue_size: Annotated[int | None, typer.Option(min=1, help="Images that may wait in the queue.")] = None,
    shadow: Annotated[
        str | None,
        typer.Option(
            metavar="NAME=SHARE", help="Also send a share of the requests, such as 0.05, to the bundle NAME."
        ),
    ] = None,
    model_control: Annotated[
        bool, typer.Option("--model-control", help="Allow clients to load, unload and swap models.")
    ] = False,
    keys: Annotated[
        Path | None, typer.Option(help="Require an API key from this file; see `sopdeploy key`.")
    ] = None,
    verify_key: Annotated[
        Path | None, typer.Option(help="Serve only bundles signed with this public key.")
    ] = None,
    log: Annotated[
        str | None,
        typer.Option(help="Request log format: json or console. [dim]default: console on a terminal[/dim]"),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with settings.")] = None,
    assignments: SetOption = None,
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
    with one_line_errors():
        from sopdeploy_service.settings import load_settings, parse_assignments, to_toml, unused_variables

        settings = load_settings(
            config,
            **parse_assignments(
                assignments or (),
                host=host,
                port=port,
                runtime=runtime,
                devices=devices,
                front_ends=front_ends,
                threads=threads,
                max_batch=max_batch,
                max_body_bytes=max_body_bytes,
                max_pixels=max_pixels,
                queue_size=queue_size,
                shadow=shadow,
                model_control=model_control or None,
                keys=keys,
                verify_key=verify_key,
                log=log,
            ),
        )
        for name in unused_variables():
            note = f"environment variable {name} is not a setting and has no effect"
            err.print(Text.assemble(("note:", "yellow"), " ", plain_text(note)))
        if print_config:
            sys.stdout.write(to_toml(settings))
            raise typer.Exit
        from sopdeploy_service.server.process import serve as run

        code = run(bundles, settings)
    raise typer.Exit(code)
