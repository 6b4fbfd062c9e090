"""`sopdeploy calibrate`: fit temperature and thresholds of an existing checkpoint."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sopdeploy.api.options import CalibrateOptions
from sopdeploy.cli.command import command
from sopdeploy.cli.console import err, image_progress, plain_text, say

if TYPE_CHECKING:
    from sopdeploy.api.calibration import Calibrated


def _show(calibrated: "Calibrated") -> None:
    """Print the fitted values and the next command."""
    for note in calibrated.notes:
        err.print(plain_text(f"warning: {note}"))
    say(*(f"{name}: {text}" for name, text in calibrated.decision.rows(calibrated.labels)))
    say(f"next: sopdeploy export {calibrated.path}{' --detach' * calibrated.training_only}")


def _summarize(calibrated: "Calibrated") -> dict[str, Any]:
    """Build the JSON output."""
    return {
        "checkpoint": str(calibrated.path),
        "images": calibrated.images,
        "decision": calibrated.decision.model_dump(mode="json"),
        "notes": list(calibrated.notes),
    }


@command(_show, summarize=_summarize)
def calibrate_command(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint of `sopdeploy train` or `import`.")],
    data: Annotated[
        Path, typer.Option(help="Images not used for training, DIR/<class>/*.jpg or with labels.csv.")
    ],
    out_file: Annotated[
        Path | None, typer.Option(help="The new checkpoint; by default <name>-calibrated.pt.")
    ] = None,
    *,
    options: CalibrateOptions,
) -> "Calibrated":
    """Fit temperature and rejection threshold of a checkpoint to images that were not used for training.

    `train` does this at the end of a run, so this command is for imported checkpoints and for other images.
    For a multi-label network it fits a threshold per class instead.

    Example: [bold]sopdeploy calibrate ckpt.pt --data test-photos[/bold]
    """
    with image_progress() as on_image:
        from sopdeploy.api.calibration import calibrate as run

        return run(checkpoint, data, out_file, options=options, on_image=on_image)
