"""`sopdeploy bench`: how fast a bundle is on this machine."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sopdeploy.cli.console import one_line_errors, out, plain, print_json, steps
from sopdeploy.errors import ConfigError

if TYPE_CHECKING:
    from sopdeploy_service.commands.bench import Benchmark, Measured


def bench(
    bundle: Annotated[Path, typer.Argument(help="A bundle that `sopdeploy export` wrote.")],
    batch: Annotated[str, typer.Option(help="Batch sizes, with commas between.")] = "1,8",
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of the engine.")] = None,
    against: Annotated[Path | None, typer.Option(help="Another bundle, timed in turn with it.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for a script.")] = False,
) -> None:
    """Time a bundle on this machine: median, p95, p99 and images per second, warm.

    Example: [bold]sopdeploy bench bundles/dsop-resnet20-3f6c01d2a4b7 --batch 1,8[/bold]
    """
    with one_line_errors(as_json), steps("timing", quiet=as_json) as step:
        from sopdeploy_service.commands.bench import bench as run
        from sopdeploy_service.settings import load_settings

        found = run(bundle, load_settings(threads=threads), batch_sizes(batch), against, step)
    if as_json:
        print_json(found.model_dump(mode="json"))
    else:
        show(found)


def batch_sizes(text: str) -> tuple[int, ...]:
    """Return the batch sizes in *text*, "1,8"; raises `ConfigError`."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdigit() and 0 < len(word) < 7 for word in words):
        raise ConfigError(f"--batch: {text!r} is no list of batch sizes; write it as 1,8")
    return tuple(dict.fromkeys(int(word) for word in words))


def show(found: "Benchmark") -> None:
    """Print the machine and a line per bundle and batch size."""
    facts = {**found.machine, **found.versions}
    out.print(plain(", ".join(f"{key} {value}" for key, value in facts.items())))
    for side in (found.ours, found.other):
        if side is not None:
            show_side(side)
    for size, ratio in found.ratios.items():
        out.print(f"[bold]batch {size}[/] takes {ratio:.2f} of the other's time (1 : {1 / ratio:.2f})")


def show_side(side: "Measured") -> None:
    """Print one bundle."""
    out.print(plain(f"{side.bundle} ({side.precision}) on {side.runtime}, {side.device}"))
    for row in side.latencies:
        out.print(
            f"  batch {row.batch:<4} median {row.median_ms:9.2f} ms  p95 {row.p95_ms:9.2f}  "
            f"p99 {row.p99_ms:9.2f}  {row.images_per_s:10.1f} images/s  ({row.runs} runs)"
        )
