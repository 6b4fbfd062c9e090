"""`sopdeploy classify`: classify any number of images into parquet files."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from sopdeploy.cli.console import (
    BundleArgument,
    JsonOption,
    err,
    one_line_errors,
    print_field,
    print_json,
)

INTERRUPTED = 130  # exit code of a command that Ctrl-C ends, as in a shell

SourcesArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="SOURCE...",
        help="Folders, quoted patterns, images, tar archives, lists of paths (.txt), parquet files, URLs.",
    ),
]


def classify(
    bundle: BundleArgument,
    sources: SourcesArgument,
    out: Annotated[Path, typer.Option(help="Folder for the results; an interrupted run is continued.")],
    batch: Annotated[
        int | None,
        typer.Option(min=1, help="Images per batch. [dim]default: 4 on a CPU, else the largest[/dim]"),
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Classes per image.")] = None,
    logits: Annotated[bool, typer.Option("--logits", help="Add a column with the logits.")] = False,
    features: Annotated[
        bool, typer.Option("--features", help="Add a column with the mean features; needs --with-cam.")
    ] = False,
    max_errors: Annotated[
        int | None, typer.Option(min=0, help="Stop when more images have an error. [dim]default: never[/dim]")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Decoder processes. [dim]default: one per core, up to 16[/dim]")
    ] = None,
    part_images: Annotated[int, typer.Option(min=1, help="Images per parquet file.")] = 4096,
    runtime: Annotated[str | None, typer.Option(help="Runtime, as for `serve`.")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with settings, as for `serve`.")] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", help="Any setting of `serve` as name=value; repeatable.")
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Classify on a Ray cluster; `auto` joins or starts one here."),
    ] = None,
    actors: Annotated[int, typer.Option(min=1, help="With --ray: processes that run the network.")] = 1,
    cpus_per_actor: Annotated[int, typer.Option(min=1, help="With --ray: cores per actor.")] = 1,
    gpus_per_actor: Annotated[
        float,
        typer.Option(min=0, help="With --ray: GPUs per actor; 0.5 lets two share one, 0 uses the CPU."),
    ] = 0.0,
    as_json: JsonOption = False,
) -> None:
    """Classify any number of images into parquet files, one row per image.

    Repeat the command to continue an interrupted run. An image that cannot be used gets a row with its error.
    The results equal those of the service.

    Example: [bold]sopdeploy classify bundles/dsop-resnet20-3f6c01d2a4b7 photos --out results[/bold]

    Example: [bold]sopdeploy classify bundles/dsop-resnet20-3f6c01d2a4b7 'shards/*.tar' --out results[/bold]
    """
    with one_line_errors(as_json):
        from sopdeploy.api.batch import classify as run
        from sopdeploy_service.settings import parse_assignments

        try:
            with _progress(quiet=as_json) as on_progress:
                found = run(
                    bundle,
                    sources,
                    out,
                    logits=logits,
                    features=features,
                    max_errors=max_errors,
                    workers=workers,
                    part_images=part_images,
                    config=config,
                    ray=ray,
                    actors=actors,
                    cpus_per_actor=cpus_per_actor,
                    gpus_per_actor=gpus_per_actor,
                    on_progress=on_progress,
                    **parse_assignments(assignments or (), max_batch=batch, top_k=top_k, runtime=runtime),
                )
        except KeyboardInterrupt:
            err.print("stopped; run the same command again to continue")
            raise typer.Exit(INTERRUPTED) from None
    if as_json:
        print_json(found.model_dump(mode="json"))
        return
    new = "" if found.classified == found.images else f", {found.classified:,} of them in this run"
    print_field("images", f"{found.images:,}{new}; {found.errors:,} with an error")
    if found.drift is not None:
        print_field("drift", found.drift_text)
    print_field("rows", f"{found.rows}: {found.parts} parquet files", style="bold green")
    print_field("report", str(found.report))


@contextmanager
def _progress(*, quiet: bool) -> Iterator[Callable[[int, int, int], None]]:
    """Yield a callback (done, errors, total) that draws a progress bar on a terminal."""
    with Progress(
        TextColumn("{task.completed}/{task.total} images"),
        BarColumn(28),
        TextColumn("{task.fields[rate]}{task.fields[errors]}"),
        TimeRemainingColumn(),
        console=err,
        transient=True,
        disable=quiet or not err.is_terminal,
    ) as progress:
        task = progress.add_task("", total=None, rate="", errors="")

        def show(done: int, errors: int, total: int) -> None:
            speed = progress.tasks[0].speed
            progress.update(
                task,
                completed=done,
                total=total,
                rate="" if speed is None else f"{speed:,.0f} per second",
                errors=f", {errors:,} with an error" if errors else "",
            )

        yield show
