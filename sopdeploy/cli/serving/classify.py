"""`sopdeploy classify`: classify any number of images into parquet files."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sopdeploy.cli.command import command
from sopdeploy.cli.console import BundleArgument, image_progress, print_field
from sopdeploy.cli.serving.serve import ConfigOption, SettingOption
from sopdeploy_service.commands.batch.options import ClassifyOptions

if TYPE_CHECKING:
    from sopdeploy_service.commands.batch.run import Classified

SourcesArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="SOURCE...", help="Folders, .tar archives, lists of paths (.txt), images; paths or URLs."
    ),
]


def _show(classified: "Classified") -> None:
    print_field("images", f"{classified.num_images:,}; {classified.num_errors:,} with an error")
    print_field("rows", str(classified.rows), style="bold green")


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

    Example: sopdeploy classify bundles/photos-3f6c01d2a4b7 photos --out results

    Example: sopdeploy classify bundles/photos-3f6c01d2a4b7 s3://bucket/photos --out results
    """
    from sopdeploy_service.commands.batch.run import classify
    from sopdeploy_service.settings import parse_assignments

    settings = parse_assignments(assignments or ())
    try:
        with image_progress() as on_progress:
            return classify(
                bundle, sources, out, options=options, config=config, on_progress=on_progress, **settings
            )
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped; run the same command again to continue") from None
