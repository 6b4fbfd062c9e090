"""`sopdeploy doctor`: which stage of a running server is the limit, and what to change."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from sopdeploy.cli.console import err, one_line_errors, out, plain, print_json, steps

if TYPE_CHECKING:
    from sopdeploy.doctor.examine import Diagnosis


def doctor(
    url: Annotated[str, typer.Option(help="The server to examine.")],
    images: Annotated[
        Path | None, typer.Option(help="Folder of pictures to send. [dim]default made ones, 640 x 480[/dim]")
    ] = None,
    seconds: Annotated[float, typer.Option(min=1, max=300, help="How long to ask.")] = 20.0,
    concurrency: Annotated[int, typer.Option(min=1, max=256, help="Most requests at once.")] = 32,
    model: Annotated[str | None, typer.Option(help="Which model, where several answer.")] = None,
    api_key: Annotated[str | None, typer.Option(help="The server's API key.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for a script.")] = False,
) -> None:
    """Say what limits a running server: decoding, queue, engine, network or the client itself.

    Sends a bounded load that obeys every refusal and stops at the first error, and reads /metrics meanwhile.

    Example: [bold]sopdeploy doctor --url http://127.0.0.1:8000 --images photos --seconds 20[/bold]
    """
    with one_line_errors(as_json), steps(f"asking for {seconds:.0f} s", quiet=as_json):
        from sopdeploy.doctor.examine import examine

        found = examine(
            url, images=images, seconds=seconds, concurrency=concurrency, model=model, api_key=api_key
        )
    if as_json:
        print_json(found.model_dump(mode="json"))
    else:
        show(found)


def show(found: "Diagnosis") -> None:
    """Print the steps, the numbers of the best one, and the advice."""
    out.print(plain(f"{found.model} at {found.url}, {found.device}"))
    table = Table(
        "at once", "img/s", "p50 ms", "p95", "p99", "engine", "decode", "client", "batch", "refused",
        box=None, pad_edge=False,
    )  # fmt: skip
    for step in found.steps:
        shares = (step.engine_busy, step.decoder_busy, step.client_busy)
        table.add_row(
            f"{step.concurrency}{' *' if step == found.best else ''}",
            f"{step.rate:.1f}",
            *(f"{value:.1f}" for value in (step.p50_ms, step.p95_ms, step.p99_ms)),
            *(f"{share:.0%}" for share in shares),
            f"{step.mean_batch:.1f}",
            f"{step.refused_share:.0%}",
        )
    out.print(table)
    stages = {**found.best.stage_ms, "elsewhere": found.best.elsewhere_ms}
    out.print("a request: " + ", ".join(f"{name} {value:.1f} ms" for name, value in stages.items()))
    out.print(f"{found.bare_ratio:.2f} of the rate of the bare engine")
    out.print(f"\n[bold]{plain(found.advice.why)}[/]")
    out.print(f"  {plain(found.advice.change)}\n  {plain(found.advice.gain)}")
    for note in found.notes:
        out.print(f"[dim]note:[/] {plain(note)}")
    if found.stopped is not None:
        err.print(f"[yellow]stopped early:[/] {plain(found.stopped)}")
