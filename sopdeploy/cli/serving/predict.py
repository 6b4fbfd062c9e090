"""`sopdeploy predict`: classify images without a server."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from sopdeploy.cli.command import command
from sopdeploy.cli.console import (
    USER_ERROR_EXIT_CODE,
    BundleArgument,
    JsonOption,
    out,
    plain_text,
    print_error,
    print_json,
)

if TYPE_CHECKING:
    from sopdeploy_service.commands.predict import FilePrediction


def _show(prediction: "FilePrediction") -> None:
    """Print the classes of one image in one line."""
    entries = [f"{entry.label} {entry.probability:.4f}" for entry in prediction.classes]
    classes = ", ".join(entries) or "no class reaches its threshold"
    warnings = f" ({', '.join(prediction.warnings)})" if prediction.warnings else ""
    unknown = ""
    if prediction.known is not None:
        classes += f"; score {prediction.score:.4f}"
        unknown = "" if prediction.known else ", probably none of these classes"
    if prediction.stable is False:
        unknown += ", not stable"
    line = plain_text(f"{prediction.image}: {classes}")
    out.print(Text.assemble(line, (unknown, "yellow"), (warnings, "dim")))


@command()
def predict_command(
    bundle: BundleArgument,
    images: Annotated[list[Path], typer.Argument(help="Image files to classify.")],
    top_k: Annotated[int | None, typer.Option(min=1, help="Classes per image.")] = None,
    explain: Annotated[
        Path | None,
        typer.Option(help="PNG file to write: the image with the class activation map of its best class."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Classify image files without a server; the results equal those of the service.

    Example: [bold]sopdeploy predict bundles/photos-3f6c01d2a4b7 photo.jpg[/bold]
    """
    from sopdeploy_service.commands.predict import predict_files as run
    from sopdeploy_service.settings import load_settings

    predictions = run(bundle, images, load_settings(top_k=top_k), explain)
    if as_json:
        print_json([prediction.model_dump(mode="json") for prediction in predictions])
    for prediction in predictions:
        if prediction.error is not None:
            print_error(f"{prediction.image}: {prediction.error.detail}", prediction.error.code)
        elif not as_json:
            _show(prediction)
    if any(prediction.error is not None for prediction in predictions):
        raise typer.Exit(USER_ERROR_EXIT_CODE)
