"""`sopdeploy triton`: add a bundle to a Triton model repository."""

from pathlib import Path
from typing import Annotated

import typer

from sopdeploy.cli.command import command
from sopdeploy.cli.console import BundleArgument, print_field


@command()
def triton_command(
    bundle: BundleArgument,
    repository: Annotated[Path, typer.Argument(help="Triton model repository; created if it is missing.")],
) -> None:
    """Write a bundle into a Triton model repository: config, labels, warm-up and graph.

    Example: sopdeploy triton bundles/photos-3f6c01d2a4b7 models
    """
    from sopdeploy.bundle.folder import open_bundle
    from sopdeploy_export.triton import write_triton

    written = write_triton(open_bundle(bundle), repository)
    print_field("model", f"{written.name}, batches of 1 to {written.max_batch}")
    print_field("written", f"{written.path}: {', '.join(written.files)}", style="bold green")
