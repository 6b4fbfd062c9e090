"""`sopdeploy calibrate`: fit temperature and thresholds of an existing checkpoint."""

from pathlib import Path
from typing import Annotated

import typer

from sopdeploy.cli.console import (
    JsonOption,
    err,
    image_progress,
    one_line_errors,
    out,
    plain_text,
    print_json,
)


def calibrate(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint of `sopdeploy train` or `import`.")],
    data: Annotated[
        Path, typer.Option(help="Images not used for training, DIR/<class>/*.jpg or with labels.csv.")
    ],
    destination: Annotated[
        Path | None, typer.Option("--out", help="The new checkpoint. [dim]default <name>-calibrated.pt[/dim]")
    ] = None,
    accepts: Annotated[
        float, typer.Option(help="Fraction of images of known classes to accept as known; 1 rejects none.")
    ] = 0.95,
    workers: Annotated[int, typer.Option(min=0, help="Data loading processes.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Fit temperature and rejection threshold of a checkpoint to images that were not used for training.

    `train` does this at the end of a run, so this command is for imported checkpoints and for other images.
    For a multi-label network it fits a threshold per class instead.

    Example: [bold]sopdeploy calibrate ckpt.pt --data test-photos[/bold]
    """
    with one_line_errors(as_json), image_progress(quiet=as_json) as on_image:
        from sopdeploy.api.calibration import calibrate as run

        found = run(checkpoint, data, destination, accepts=accepts, workers=workers, on_image=on_image)
    for note in found.notes:
        err.print(plain_text(f"warning: {note}"))
    if as_json:
        decision = found.decision.model_dump(mode="json")
        print_json({"checkpoint": str(found.path), "images": found.images, "decision": decision})
        return
    for name, text in found.decision.rows(found.labels):
        out.print(plain_text(f"{name}: {text}"))
    detach = " --detach" if found.training_only else ""
    out.print(plain_text(f"next: sopdeploy export {found.path}{detach}"))
