"""`sopdeploy compare` and `sopdeploy promote`: which of two bundles is better, and which one is live."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sopdeploy.cli.command import command
from sopdeploy.cli.console import err, image_progress, out, plain_text, print_field, print_table, say
from sopdeploy.errors import ConfigError

if TYPE_CHECKING:
    from sopdeploy_service.commands.compare import BundleComparison, BundleScore
    from sopdeploy_service.commands.promote import Promotion

UnknownOption = Annotated[
    Path | None, typer.Option(help="Folder of images of none of the classes, which test `known`.")
]
ToleranceOption = Annotated[
    float,
    typer.Option(min=0, max=50, help="Points of accuracy by which a bundle that is not worse may lose."),
]


def _show(result: "BundleComparison") -> None:
    """Print both bundles, their classes and the verdict."""
    for note in result.notes:
        err.print(plain_text(f"warning: {note}"))
    columns = ("bundle", "top-1", "95 %", "calibration error", "known", "unknown rejected", "ms")
    print_table(columns, map(_row, (result.first, result.second)))
    rows = [
        (
            one.label, str(one.num_images),
            *(f"{right / one.num_images:.1%}" for right in (one.first, one.second)),
            f"{one.wins}, {one.losses}", "" if one.p is None else f"{one.p:.2g}",
        )
        for one in result.classes
    ]  # fmt: skip
    print_table(("class", "images", "first", "second", "better, worse", "p, Holm"), rows)
    say(
        *(
            f"new class {one.label}: {one.second} of {one.num_images} correct, not counted"
            for one in result.new
        )
    )
    if result.removed:
        say(f"only in the first bundle, not counted: {', '.join(result.removed)}")
    say(
        f"left out: {result.num_copies} near-duplicates, {result.trained_on} photographs from the training",
        f"better on {result.wins}, worse on {result.losses} photographs, McNemar p {result.p:.2g}; takes "
        f"{result.second.median_ms / result.first.median_ms:.2f} of the time",
    )
    say(result.summary, style="bold")


def _row(score: "BundleScore") -> tuple[str, ...]:
    shares = (f"{rate.share:.1%}" if rate else "-" for rate in (score.accepted, score.rejected))
    top1 = (f"{score.top1.share:.1%}", f"{score.top1.low:.1%} to {score.top1.high:.1%}")
    return score.bundle, *top1, f"{score.calibration_error:.3f}", *shares, f"{score.median_ms:.1f}"


@command(_show)
def compare_command(
    first: Annotated[Path, typer.Argument(help="A bundle, such as the live one.")],
    second: Annotated[Path, typer.Argument(help="The bundle to compare with it.")],
    data: Annotated[
        Path, typer.Option(help="Folder of images that neither was trained on, DIR/<class>/*.jpg.")
    ],
    unknown: UnknownOption = None,
    tolerance: ToleranceOption = 1.0,
) -> "BundleComparison":
    """Say whether a bundle is better than another one, not worse, or worse, on the same photographs.

    The photographs of classes of both bundles decide. Training images and near-duplicates are left out.

    Example: sopdeploy compare bundles/photos-3f6c01d2a4b7 bundles/latest --data held-out
    """
    with image_progress() as on_image:
        from sopdeploy_service.commands.compare import compare_bundles as run

        return run(first, second, data, unknown=unknown, tolerance=tolerance / 100, on_image=on_image)


def _show_promotion(move: "Promotion") -> None:
    """Print what the link leads to, and why."""
    print_field(move.link, f"{move.after} (before: {move.before or 'nothing'})", style="bold green")
    out.print(plain_text(move.reason))


@command(_show_promotion)
def promote_command(
    new: Annotated[Path | None, typer.Argument(help="The bundle to serve.")] = None,
    over: Annotated[
        Path | None, typer.Option(help="Link that the server follows; created if absent.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of images that neither was trained on, DIR/<class>/*.jpg.")
    ] = None,
    unknown: UnknownOption = None,
    tolerance: ToleranceOption = 1.0,
    force: Annotated[str | None, typer.Option(help="Reason to move the link in any case; recorded.")] = None,
    back: Annotated[Path | None, typer.Option(help="Link to move back to the bundle before.")] = None,
) -> "Promotion":
    """Move the link that a server follows to a bundle that is better or not worse, and record why.

    Refused is a bundle that is worse, overall or in a class, or of which the photographs do not show that it
    is not worse. `promotions.jsonl` beside the link has the figures of each move and refusal; each further
    attempt at the same live bundle needs stronger evidence.

    Example: sopdeploy promote bundles/latest --over bundles/live --data held-out

    Example: sopdeploy promote --back bundles/live
    """
    from sopdeploy_service.commands.promote import promote, promote_back

    if back is not None and new is None and over is None:
        return promote_back(back)
    if new is None or over is None or back is not None:
        raise ConfigError("give NEW --over LINK, or --back LINK")
    with image_progress() as on_image:
        return promote(
            new, over, data, unknown=unknown, tolerance=tolerance / 100, force=force, on_image=on_image
        )
