"""`sopdeploy triton`: write a bundle into a Triton model repository."""

from pathlib import Path
from typing import Annotated

import typer

from sopdeploy.cli.console import BundleArgument, JsonOption, one_line_errors, print_field, print_json


def triton(
    bundle: BundleArgument,
    repository: Annotated[Path, typer.Argument(help="Triton model repository; created if it is missing.")],
    instances: Annotated[int, typer.Option(min=1, help="Model instances per device.")] = 1,
    max_queue_delay: Annotated[
        int, typer.Option(min=0, help="Microseconds to wait for a larger batch.")
    ] = 1000,
    as_json: JsonOption = False,
) -> None:
    """Write a bundle into a Triton model repository: config, labels, warm-up and graph.

    Example: [bold]sopdeploy triton bundles/dsop-resnet20-3f6c01d2a4b7 models[/bold]
    """
    with one_line_errors(as_json):
        from sopdeploy.bundle.folder import open_bundle
        from sopdeploy_export.triton import TritonOptions, write_triton

        options = TritonOptions(instances=instances, max_queue_delay=max_queue_delay)
        written = write_triton(open_bundle(bundle), repository, options)
    if as_json:
        print_json(written.model_dump(mode="json"))
        return
    print_field("model", f"{written.name}, batches of 1 to {written.max_batch}")
    print_field("written", f"{written.path}: {', '.join(written.files)}", style="bold green")
