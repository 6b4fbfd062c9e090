"""`sopdeploy classify`: classify any number of images into parquet files."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sopdeploy.cli.command import command
from sopdeploy.cli.console import BundleArgument, err, image_progress, print_field
from sopdeploy.cli.serving.serve import ConfigOption, SettingOption
from sopdeploy_service.commands.batch.options import ClassifyOptions

if TYPE_CHECKING:
    from sopdeploy_service.commands.batch.run import Classified

INTERRUPTED = 130  # exit code of a command that Ctrl-C ends, as in a shell

SourcesArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="SOURCE...",
        help="Folders, quoted patterns, images, tar and parquet files, lists of paths (.txt), URLs.",
    ),
]


def _show(classified: "Classified") -> None:
    """Print the numbers of images and errors, and the files."""
    done, images = classified.classified, classified.num_images
    new = "" if done == images else f", {done:,} of them in this run"
    print_field("images", f"{images:,}{new}; {classified.num_errors:,} with an error")
    if classified.drift is not None:
        print_field("drift", classified.drift_text)
    print_field("rows", f"{classified.rows}: {classified.num_parts} parquet files", style="bold green")
    print_field("report", str(classified.report))


@command(_show)
def classify_command(
    bundle: BundleArgument,
    sources: SourcesArgument,
    out: Annotated[Path, typer.Option(help="Folder for the results; an interrupted run is continued.")],
    *,
    options: ClassifyOptions,
    config: ConfigOption = None,
    assignments: SettingOption = None,
) -> "Classified":
    """Classify any number of images into parquet files, one row per image.

    Repeat the command to continue an interrupted run. An image that cannot be used gets a row with its error.
    The results equal those of the service.

    Example: [bold]sopdeploy classify bundles/photos-3f6c01d2a4b7 photos --out results[/bold]

    Example: [bold]sopdeploy classify bundles/photos-3f6c01d2a4b7 'shards/*.tar' --out results[/bold]
    """
    from sopdeploy_service.commands.batch.run import classify as run
    from sopdeploy_service.settings import parse_assignments

    settings = parse_assignments(assignments or ())
    try:
        with image_progress() as on_image:
            return run(
                bundle,
                sources,
                out,
                options=options,
                config=config,
                on_progress=lambda done, _errors, total: on_image(done, total),
                **settings,
            )
    except KeyboardInterrupt:
        err.print("stopped; run the same command again to continue")
        raise typer.Exit(INTERRUPTED) from None
