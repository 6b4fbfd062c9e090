"""`sopdeploy predict` and `sopdeploy serve`: answers from a bundle, on the spot or over HTTP."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from sopdeploy.cli.console import USER_ERROR, err, error_line, one_line_errors, out, plain, print_json

BundleArgument = Annotated[Path, typer.Argument(help="A bundle that `sopdeploy export` wrote.")]


def predict(
    bundle: BundleArgument,
    images: Annotated[list[Path], typer.Argument(help="Pictures to classify.")],
    top_k: Annotated[int | None, typer.Option(min=1, help="Classes per picture.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for a script.")] = False,
) -> None:
    """Classify pictures without a server; the numbers are the service's.

    Example: [bold]sopdeploy predict bundles/dsop-resnet20-3f6c01d2a4b7 photo.jpg[/bold]
    """
    with one_line_errors(as_json):
        from sopdeploy_service.commands.predict import predict as run
        from sopdeploy_service.settings import load_settings

        found = run(bundle, images, load_settings(top_k=top_k))
    if as_json:
        print_json([prediction.model_dump(mode="json") for prediction in found])
    for prediction in found:
        if prediction.error is not None:
            err.print(error_line(f"{prediction.image}: {prediction.error.detail}", prediction.error.code))
        elif not as_json:
            classes = ", ".join(f"{c.label} {c.probability:.4f}" for c in prediction.classes)
            changed = f" [dim]({', '.join(prediction.warnings)})[/dim]" if prediction.warnings else ""
            out.print(f"{plain(prediction.image)}: {plain(classes)}{changed}")
    if any(prediction.error is not None for prediction in found):
        raise typer.Exit(USER_ERROR)


def serve(
    bundles: Annotated[
        list[str], typer.Argument(metavar="BUNDLE...", help="A bundle, a folder of bundles, or NAME=BUNDLE.")
    ],
    host: Annotated[
        str | None, typer.Option(help="Address to listen on. [dim]default 127.0.0.1[/dim]")
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=0, help="Port; 0 takes a free one. [dim]default 8000[/dim]")
    ] = None,
    runtime: Annotated[
        str | None,
        typer.Option(
            help="auto, onnxruntime-cpu, onnxruntime-cuda, onnxruntime-tensorrt or tensorrt. "
            "[dim]default auto[/dim]"
        ),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of the engine.")] = None,
    max_batch: Annotated[int | None, typer.Option(min=1, help="Largest batch.")] = None,
    max_body_bytes: Annotated[int | None, typer.Option(min=1, help="Largest request body.")] = None,
    max_pixels: Annotated[int | None, typer.Option(min=1, help="Largest picture.")] = None,
    queue_size: Annotated[int | None, typer.Option(min=1, help="Pictures that may wait.")] = None,
    model_control: Annotated[
        bool, typer.Option("--model-control", help="Let clients load, unload and swap models.")
    ] = False,
    keys: Annotated[
        Path | None, typer.Option(help="Answer those with a key in this file only; see `sopdeploy key`.")
    ] = None,
    verify_key: Annotated[
        Path | None, typer.Option(help="Serve only what this public key signed; see `sopdeploy sign`.")
    ] = None,
    log: Annotated[
        str | None,
        typer.Option(help="A line per request: json, or console. [dim]default console on a terminal[/dim]"),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="A TOML file with settings.")] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", help="Any other setting, as name=value; repeatable.")
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print every setting as a settings file, and end.")
    ] = False,
) -> None:
    """Answer over HTTP: POST a picture to /v1/classify.

    Every setting is a flag or --set name=value, an environment variable such as SOPDEPLOY_PORT, and a line
    of the --config file, in this order.

    Example: [bold]sopdeploy serve bundles/dsop-resnet20-3f6c01d2a4b7 --port 8000[/bold]

    Example: [bold]sopdeploy serve flowers=bundles/dsop-resnet20-3f6c01d2a4b7 birds=other/bundle[/bold]
    """
    with one_line_errors():
        from sopdeploy_service.settings import as_toml, load_settings, said, unused_variables

        settings = load_settings(
            config,
            **said(
                assignments or (),
                host=host,
                port=port,
                runtime=runtime,
                threads=threads,
                max_batch=max_batch,
                max_body_bytes=max_body_bytes,
                max_pixels=max_pixels,
                queue_size=queue_size,
                model_control=model_control or None,
                keys=keys,
                verify_key=verify_key,
                log=log,
            ),
        )
        for name in unused_variables():
            err.print(f"[yellow]note:[/] {plain(name)} in the environment is no setting and has no effect")
        if print_config:
            sys.stdout.write(as_toml(settings))
            raise typer.Exit
        from sopdeploy_service.server.process import serve as run

        code = run(bundles, settings)
    raise typer.Exit(code)
