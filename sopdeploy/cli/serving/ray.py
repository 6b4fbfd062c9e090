"""`sopdeploy ray`: serve bundles over HTTP from replicas that Ray starts."""

from pathlib import Path
from typing import Annotated

import typer

from sopdeploy.cli.console import one_line_errors, out, plain_text
from sopdeploy.cli.serving.serve import BundlesArgument, SetOption


def ray(
    bundles: BundlesArgument,
    replicas: Annotated[
        int | None, typer.Option(min=1, help="Number of replicas. [dim]default: 1[/dim]")
    ] = None,
    min_replicas: Annotated[
        int | None, typer.Option(min=0, help="Fewest replicas, with --max-replicas.")
    ] = None,
    max_replicas: Annotated[
        int | None, typer.Option(min=1, help="Scale with the load, up to this number of replicas.")
    ] = None,
    gpus_per_replica: Annotated[
        float, typer.Option(min=0, help="GPUs of a replica: 0.5 lets two share one, 0 uses the CPU.")
    ] = 0.0,
    cpus_per_replica: Annotated[
        int, typer.Option(min=1, help="Cores that Ray reserves; also the default number of threads.")
    ] = 1,
    emit: Annotated[
        Path | None, typer.Option(help="Write a Ray Serve config file and exit; does not need Ray.")
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="Address of Ray's HTTP proxies. [dim]default: 127.0.0.1[/dim]")
    ] = None,
    port: Annotated[int | None, typer.Option(min=1, help="Port. [dim]default: 8000[/dim]")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with settings, as for `serve`.")] = None,
    assignments: SetOption = None,
) -> None:
    """Serve over HTTP from several replicas that Ray starts, monitors and routes to.

    Example: [bold]sopdeploy ray bundles/dsop-resnet20-3f6c01d2a4b7 --replicas 2[/bold]

    Example: [bold]sopdeploy ray bundles/dsop-resnet20-3f6c01d2a4b7 --max-replicas 8 --emit serve.yaml[/bold]
    """
    with one_line_errors():
        from sopdeploy.bundle.folder import open_bundle
        from sopdeploy_service.inference.bundle_store import BundleStore
        from sopdeploy_service.server.on_ray import plan
        from sopdeploy_service.settings import load_settings, parse_assignments

        settings = load_settings(config, **parse_assignments(assignments or (), host=host, port=port))
        scale = plan.scale_of(
            replicas, min_replicas, max_replicas, cpus=cpus_per_replica, gpus=gpus_per_replica
        )
        paths = BundleStore(bundles).bundles
        for path in paths.values():
            open_bundle(path)  # report a damaged bundle here instead of on every machine
        if emit is None:
            from sopdeploy_service.server.on_ray.run import run

            raise typer.Exit(run(paths, settings, scale))
        plan.write(emit, plan.config(paths, settings, scale))
    out.print(plain_text(f"{emit}: `serve run {emit}` starts it here, `serve deploy {emit}` on a cluster"))
