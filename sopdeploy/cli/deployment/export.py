"""`sopdeploy export`: convert a checkpoint to a bundle."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sopdeploy.cli.command import command
from sopdeploy.cli.console import steps
from sopdeploy.cli.deployment.export_summary import show
from sopdeploy_export.options import ExportOptions, NetworkExportOptions

if TYPE_CHECKING:
    from sopdeploy_export.pipeline import Exported


@command(show, summarize=lambda exported: exported.summary())
def export(
    checkpoint: Annotated[
        Path, typer.Argument(help="A checkpoint of `sopdeploy train`, or with --network any weight file.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the bundle.")] = Path("bundles"),
    *,
    options: ExportOptions,
    source: NetworkExportOptions,
) -> "Exported":
    """Convert a checkpoint to a bundle: detach, prove equivalence, export to ONNX, compare, write.

    With --network, the file holds the weights of a network of your own, which is built by your code.

    Example: [bold]sopdeploy export runs/latest/best.pt --detach[/bold]
    """
    with steps("exporting") as step:
        if source.network is not None:
            from sopdeploy.api.user_network import export_weights

            return export_weights(checkpoint, source, out, options, step)
        from sopdeploy.api.deployment import export as run

        return run(checkpoint, out, options=options, on_step=step)
