"""`sopdeploy ray`: the service as an application of Ray Serve."""

from pathlib import Path
from typing import Annotated

import typer

from sopdeploy.cli.console import one_line_errors, out, plain


def ray(
    bundles: Annotated[
        list[str], typer.Argument(metavar="BUNDLE...", help="A bundle, a folder of bundles, or NAME=BUNDLE.")
    ],
    replicas: Annotated[int | None, typer.Option(min=1, help="So many. [dim]default 1[/dim]")] = None,
    min_replicas: Annotated[int | None, typer.Option(min=0, help="With --max-replicas: at least.")] = None,
    max_replicas: Annotated[
        int | None, typer.Option(min=1, help="Scale with the load, up to so many.")
    ] = None,
    gpus_per_replica: Annotated[
        float, typer.Option(min=0, help="0.5 lets two replicas share a GPU; 0 is the CPU.")
    ] = 0.0,
    cpus_per_replica: Annotated[
        int, typer.Option(min=1, help="What Ray reserves, and the engine's threads unless set.")
    ] = 1,
    emit: Annotated[
        Path | None, typer.Option(help="Write the config file of Ray Serve and end; needs no Ray.")
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="Address that Ray's proxies listen on. [dim]default 127.0.0.1[/dim]")
    ] = None,
    port: Annotated[int | None, typer.Option(min=1, help="Their port. [dim]default 8000[/dim]")] = None,
    config: Annotated[Path | None, typer.Option(help="A TOML file with settings, as of `serve`.")] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", help="Any other setting, as name=value; repeatable.")
    ] = None,
) -> None:
    """Answer over HTTP from several replicas that Ray starts, watches and routes to.

    Example: [bold]sopdeploy ray bundles/dsop-resnet20-3f6c01d2a4b7 --replicas 2[/bold]

    Example: [bold]sopdeploy ray bundles/dsop-resnet20-3f6c01d2a4b7 --max-replicas 8 --emit serve.yaml[/bold]
    """
    with one_line_errors():
        from sopdeploy.bundle.folder import open_bundle
        from sopdeploy_service.inference.bundle_store import BundleStore
        from sopdeploy_service.server.on_ray import plan
        from sopdeploy_service.settings import load_settings, said

        settings = load_settings(config, **said(assignments or (), host=host, port=port))
        scale = plan.scale_of(
            replicas, min_replicas, max_replicas, cpus=cpus_per_replica, gpus=gpus_per_replica
        )
        found = BundleStore(bundles).bundles
        for path in found.values():
            open_bundle(path)  # a damaged one is better found here than on every machine
        if emit is None:
            from sopdeploy_service.server.on_ray.run import run

            raise typer.Exit(run(found, settings, scale))
        plan.write(emit, plan.config(found, settings, scale))
    file = plain(str(emit))
    out.print(f"{file}: `serve run {file}` starts it here, `serve deploy {file}` on a cluster")
