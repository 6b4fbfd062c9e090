"""`sopdeploy doctor`: find the bottleneck of a server."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from sopdeploy.cli.command import command
from sopdeploy.cli.console import err, out, plain_text, print_table, say, show_steps

if TYPE_CHECKING:
    from sopdeploy.doctor import Diagnosis

_COLUMNS = ("clients", "img/s", "p50 ms", "p99", "runtime", "decode", "client", "batch", "refused")


def _show(diagnosis: "Diagnosis") -> None:
    """Print a line per number of clients, the time of each stage, and the advice."""
    say(f"{diagnosis.model} at {diagnosis.url}, {diagnosis.device}")
    rows = (
        (
            f"{step.concurrency}{' *' * (step == diagnosis.best)}",
            *(f"{value:.1f}" for value in (step.rate, step.p50_ms, step.p99_ms)),
            *(f"{busy:.0%}" for busy in (step.runtime_busy, step.decoder_busy, step.client_busy)),
            f"{step.mean_batch:.1f}",
            f"{step.refused_share:.0%}",
        )
        for step in diagnosis.steps
    )
    print_table(_COLUMNS, rows)
    stages = {**diagnosis.best.stage_ms, "elsewhere": diagnosis.best.elsewhere_ms}
    out.print("per request: " + ", ".join(f"{name} {value:.1f} ms" for name, value in stages.items()))
    say(diagnosis.advice.why, style="bold")
    say(diagnosis.advice.change, diagnosis.advice.gain, *(f"note: {note}" for note in diagnosis.notes))
    if diagnosis.stopped is not None:
        err.print(Text.assemble(("stopped early:", "yellow"), " ", plain_text(diagnosis.stopped)))


@command(_show)
def doctor_command(
    url: Annotated[str, typer.Option(help="URL of the server.")],
    images: Annotated[
        Path | None,
        typer.Option(help="Folder of images to send; by default generated images, 640 x 480."),
    ] = None,
    seconds: Annotated[float, typer.Option(min=1, max=300, help="Duration of the load.")] = 20.0,
    concurrency: Annotated[int, typer.Option(min=1, max=256, help="Maximum of concurrent requests.")] = 32,
    model: Annotated[str | None, typer.Option(help="Model name, if the server has several.")] = None,
    api_key: Annotated[str | None, typer.Option(help="API key of the server.")] = None,
) -> "Diagnosis":
    """Find the bottleneck of a running server: decoding, queue, runtime, network or the client itself.

    Sends images with an increasing number of clients and reads /metrics. A client whose request is rejected
    waits as long as the server asks; the first other error ends the load.

    Example: [bold]sopdeploy doctor --url http://127.0.0.1:8000 --images photos --seconds 20[/bold]
    """
    with show_steps(f"measuring for {seconds:.0f} s"):
        from sopdeploy.doctor import examine

        return examine(
            url, images=images, seconds=seconds, concurrency=concurrency, model=model, api_key=api_key
        )
