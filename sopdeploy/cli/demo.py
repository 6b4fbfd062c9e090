"""`sopdeploy demo`: train, export, verify and serve a small network with the commands a user would type."""

import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from sopdeploy.cli.console import err, one_line_errors, out, plain_text
from sopdeploy.errors import SopdeployError

ROWS = 10  # predictions to print
MIN_ACCURACY = 0.98
READY_TIMEOUT = 60  # seconds
STOP_TIMEOUT = 30


def demo(
    destination: Annotated[
        Path, typer.Option("--out", help="Parent folder; each demo creates a new numbered folder in it.")
    ] = Path("demo"),
) -> None:
    """Train on handwritten digits, export, verify, serve and classify over HTTP in about a minute.

    Example: [bold]sopdeploy demo[/bold]
    """
    with one_line_errors():
        folder = _new_folder(destination)
        run = folder / "run"
        _sopdeploy("train", "--recipe", "digits-dsop", "--out", str(run))
        _sopdeploy("export", str(run / "best.pt"), "--detach", "--out", str(folder))
        bundle = next(folder.glob("dsop-*"))
        _sopdeploy("verify", str(bundle))
        with _server(bundle) as url:
            accuracy = _classify_digits(url)
        if accuracy < MIN_ACCURACY:
            raise SopdeployError(
                f"only {accuracy:.1%} of the digits were classified correctly over HTTP, at least "
                f"{MIN_ACCURACY:.0%} are expected; check the installation with `sopdeploy env`"
            )
    out.print("\n[bold]Next: use your own photos[/], in folders photos/<class>/*.jpg:")
    out.print("  sopdeploy train --data photos")
    out.print("  sopdeploy export runs/latest/best.pt --detach")
    out.print("  sopdeploy serve bundles/latest")


def _new_folder(parent: Path) -> Path:
    for number in range(1, 10_000):
        folder = parent / str(number)
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise SopdeployError(
                f"{parent}: cannot be written ({error.strerror}); choose another --out"
            ) from error
        return folder
    raise SopdeployError(f"{parent}: contains 9,999 demos; remove the folder")


def _show_command(*arguments: str) -> list[str]:
    """Print `sopdeploy` with *arguments* and return the command line that runs it in this Python."""
    out.print(f"\n[bold cyan]$ sopdeploy {' '.join(arguments)}[/]")
    return [sys.executable, "-m", "sopdeploy", *arguments]


def _sopdeploy(*arguments: str) -> None:
    code = subprocess.run(_show_command(*arguments), check=False).returncode
    if code:
        raise typer.Exit(code)


@contextmanager
def _server(bundle: Path) -> Iterator[str]:
    """Serve *bundle* on a free port and yield its URL; at the end, SIGTERM must stop it with exit code 0."""
    command = _show_command("serve", str(bundle), "--port", "0")
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        line = process.stdout.readline() if process.stdout else ""
        if not line.startswith("ready: "):
            raise SopdeployError(
                f"the server exited before it was ready (exit code {process.wait()}); see its error above"
            )
        out.print(line.strip())
        yield line.split()[1]
        process.send_signal(signal.SIGTERM)
        code = process.wait(STOP_TIMEOUT)
        if code:
            raise SopdeployError(f"the server stopped with exit code {code}, not 0; see its log above")
        out.print("stopped cleanly")
    finally:
        process.kill()
        process.wait()


def _classify_digits(url: str) -> float:
    """Classify every held-out digit over HTTP as PNG, print the first predictions and return the accuracy."""
    import httpx

    from sopdeploy.data.datasets.small import open_digits
    from sopdeploy.evaluation.metrics import Rate

    digits = open_digits().held_out
    table = Table("digit", "prediction", "probability", "", box=None, pad_edge=False)
    correct = 0
    with httpx.Client(base_url=url, timeout=READY_TIMEOUT) as client:
        for index in range(len(digits)):
            image, target = digits[index]
            body = io.BytesIO()
            image.save(body, "PNG")
            headers = {"Content-Type": "image/png"}
            response = client.post("/v1/classify", content=body.getvalue(), headers=headers)
            if response.status_code != 200:
                err.print(plain_text(response.text))
                raise SopdeployError(
                    f"{url}: status {response.status_code} for a digit; see the response above"
                )
            best, truth = response.json()["classes"][0], digits.labels[target]
            correct += best["label"] == truth
            if index < ROWS:
                mark = "[green]correct[/]" if best["label"] == truth else "[red]wrong[/]"
                table.add_row(truth, best["label"], f"{best['probability']:.4f}", mark)
    out.print(table)
    found = Rate.of(correct, len(digits))
    right = f"{correct} of {len(digits)} held-out digits classified correctly over HTTP"
    interval = f"95 % interval {100 * found.low:.1f} to {100 * found.high:.1f} %"
    out.print(f"{right}: [bold]{found.share:.2%}[/] ({interval}; too high: they also selected the epoch)")
    return found.share
