"""`sopdeploy ray`: serve bundles on Ray."""

from pathlib import Path
from typing import Annotated

import typer

from sopdeploy.cli.command import command
from sopdeploy.cli.console import out, plain_text
from sopdeploy.cli.serving.serve import BundlesArgument, ConfigOption, SettingOption, flags_of_settings
from sopdeploy_service.server.on_ray.scale import ScaleOptions


class RayServeOptions(ScaleOptions, flags_of_settings("host", "port")):  # type: ignore[misc]
    """Where Ray serves, and on how many replicas."""


@command()
def ray_command(
    bundles: BundlesArgument,
    *,
    options: RayServeOptions,
    emit: Annotated[
        Path | None, typer.Option(help="Write a Ray Serve config file and exit; does not need Ray.")
    ] = None,
    config: ConfigOption = None,
    assignments: SettingOption = None,
) -> None:
    """Serve over HTTP from several replicas that Ray starts, monitors and routes to.

    Example: [bold]sopdeploy ray bundles/photos-3f6c01d2a4b7 --replicas 2[/bold]

    Example: [bold]sopdeploy ray bundles/photos-3f6c01d2a4b7 --max-replicas 8 --emit serve.yaml[/bold]
    """
    from sopdeploy.bundle.folder import open_bundle
    from sopdeploy_service.inference.bundle_store import BundleStore
    from sopdeploy_service.server.on_ray import plan
    from sopdeploy_service.settings import load_settings, parse_assignments

    given = parse_assignments(assignments or (), host=options.host, port=options.port)
    settings = load_settings(config, **given)
    paths = BundleStore(bundles).bundles
    for path in paths.values():
        open_bundle(path)  # report a damaged bundle here instead of on every machine
    if emit is None:
        from sopdeploy_service.server.on_ray.run import run

        raise typer.Exit(run(paths, settings, options))
    plan.write_config(emit, plan.build_config(paths, settings, options))
    out.print(plain_text(f"{emit}: `serve run {emit}` starts it here, `serve deploy {emit}` on a cluster"))
