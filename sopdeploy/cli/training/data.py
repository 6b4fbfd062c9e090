"""`sopdeploy data check`: what a folder or archive of pictures holds, before a network learns from it."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from sopdeploy.cli.console import one_line_errors, out, plain_text, print_json

if TYPE_CHECKING:
    from sopdeploy.data.check import DataReport

SHOWN = 10  # of the classes, groups and files of a kind; --json gives all

data = typer.Typer(
    help="Look at pictures before training on them.\n\nExample: [bold]sopdeploy data check photos/[/bold]",
    no_args_is_help=True,
)


@data.command("check")
def check(
    path: Annotated[
        Path, typer.Argument(metavar="DIR|TAR", help="One folder per class, or a tar file of such.")
    ],
    cache: Annotated[
        Path | None, typer.Option(help="Where a compressed archive is unpacked and indexes are kept.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for a script.")] = False,
) -> None:
    """Decode every picture: sizes, formats, classes, duplicates, what is odd and what cannot be read.

    Ends with exit code 2 where a run could not use the data. Duplicates and oddities are only told.

    Example: [bold]sopdeploy data check photos/[/bold]
    """
    with one_line_errors(as_json):
        from sopdeploy.data.check import check as look

        found = look(path, cache)
        if as_json:
            print_json(found.model_dump(mode="json"))
        else:
            show(found)
    with one_line_errors():  # the findings were printed, as JSON too: no second document
        found.must_be_usable()


def show(found: "DataReport") -> None:
    """Print the tables."""
    from sopdeploy.data.image_files import describe_ignored_files

    table = Table("part", "pictures", "MB", "classes", "fewest", "most", box=None, pad_edge=False)
    for part in found.parts:
        counts = part.classes.values()
        sizes = [str(number) for number in (len(counts), min(counts), max(counts))]
        table.add_row(part.name, str(part.count), f"{part.bytes / 1e6:.1f}", *sizes)
    out.print(table)
    for part in found.parts:
        rarest = sorted(part.classes.items(), key=lambda pair: pair[1])
        listed = ", ".join(f"{label} {count}" for label, count in rarest[:SHOWN])
        out.print(
            plain_text(f"{part.name}, rarest classes first: {listed}{dots(len(rarest))}"), highlight=False
        )
    out.print(plain_text(f"formats: {listing(found.formats)}; colours: {listing(found.modes)}"))
    for name, (least, median, most) in {
        "shorter side": found.shorter_side,
        "longer side": found.longer_side,
    }.items():
        out.print(f"{name}: {least} to {most} pixels, median {median}")
    show_duplicates(found)
    for why, files in found.strange.items():
        listed = ", ".join(files[:SHOWN])
        out.print(plain_text(f"{counted(files)}: {why}: {listed}{dots(len(files))}"), highlight=False)
    if found.passed_over:
        out.print(
            plain_text(
                f"not called as pictures are and left out: {describe_ignored_files(found.passed_over)}"
            )
        )
    out.print(
        "every picture can be read" if not found.unreadable else f"{len(found.unreadable)} cannot be read"
    )


def show_duplicates(found: "DataReport") -> None:
    """Print how many pictures are there twice, the worst kinds first."""
    across = [group for group in found.duplicates if group.across]
    differ = [group for group in found.duplicates if group.labels_differ]
    exact = sum(group.same_bytes for group in found.duplicates)
    out.print(
        f"duplicates: {len(found.duplicates)} groups with equal pixels, {exact} of them equal files; "
        f"{len(across)} both to learn from and to measure on, {len(differ)} of different classes"
    )
    worst_first = sorted(found.duplicates, key=lambda group: (not group.across, not group.labels_differ))
    for group in worst_first[:SHOWN]:
        out.print(plain_text(" = ".join(group.files)), highlight=False)


def listing(counts: dict[str, int]) -> str:
    """Return *counts* as words."""
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def counted(files: Sequence[str]) -> str:
    """Return how many pictures *files* are."""
    return "1 picture" if len(files) == 1 else f"{len(files)} pictures"


def dots(count: int) -> str:
    """Say that a list goes on."""
    return ", ..." if count > SHOWN else ""
