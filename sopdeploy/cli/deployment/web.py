"""`sopdeploy web`: write a page that classifies images in the browser."""

from pathlib import Path
from typing import Annotated

import typer

from sopdeploy.cli.command import command
from sopdeploy.cli.console import BundleArgument, print_field, show_steps
from sopdeploy_export.web.site import Site


def _show(site: Site) -> None:
    """Print what was replayed, the time of an image, and the folder."""
    print_field("replayed", f"{site.steps} steps in Chromium, each within its bound")
    print_field("image", f"{site.ms_pixels:.0f} ms for its pixels, {site.ms_network:.0f} ms for the network")
    print_field("written", f"{site.path}: {site.bytes:,} bytes for {site.bundle}", style="bold green")


@command(_show)
def web_command(
    bundle: BundleArgument,
    out: Annotated[Path, typer.Option(help="New folder of static files.")],
    browser: Annotated[
        str | None, typer.Option(help="Program of Chromium for the check; default: one on PATH.")
    ] = None,
    *,
    webgpu: Annotated[bool, typer.Option("--webgpu", help="Let the page use GPUs; 27 MB more.")] = False,
) -> Site:
    """Write a page that classifies images in the browser, checked in a headless Chromium.

    Example: [bold]sopdeploy web bundles/photos-3f6c01d2a4b7 --out site[/bold]
    """
    from sopdeploy.bundle.folder import open_bundle
    from sopdeploy_export.web.site import write_site

    with show_steps("writing the page and replaying the examples in Chromium"):
        return write_site(open_bundle(bundle), out, browser, webgpu=webgpu)
