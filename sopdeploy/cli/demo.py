"""`sopdeploy demo`: the main job from pictures to HTTP answers, by the commands a user would type."""

import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from sopdeploy.cli.console import err, one_line_errors, out
from sopdeploy.errors import SopdeployError

if TYPE_CHECKING:
    import httpx

SHOWN = 10
WANTED = 0.98
READY_SECONDS = 60
STOP_SECONDS = 30


def demo(
    destination: Annotated[
        Path, typer.Option("--out", help="Folder for the demo's run and bundle; a new one inside it.")
    ] = Path("demo"),
) -> None:
    """Train on handwritten digits, export with proof, verify, serve, ask over HTTP, stop: under a minute.

    Example: [bold]sopdeploy demo[/bold]
    """
    with one_line_errors():
        folder = new_folder(destination)
        run = folder / "run"
        sopdeploy("train", "--recipe", "digits-dsop", "--out", str(run))
        sopdeploy("export", str(run / "best.pt"), "--detach", "--out", str(folder))
        bundle = next(folder.glob("dsop-*"))
        sopdeploy("verify", str(bundle))
        with server(bundle) as url:
            share = ask(url)
        if share < WANTED:
            raise SopdeployError(f"only {share:.1%} of the digits were answered right over HTTP")
    out.print("\n[bold]Now with your own photos[/], in folders photos/<class>/*.jpg:")
    out.print("  sopdeploy train --data photos")
    out.print("  sopdeploy export runs/photos-dsop/best.pt --detach")
    out.print("  sopdeploy serve bundles/dsop-resnet20-*/")


def new_folder(parent: Path) -> Path:
    """Return the first folder `parent/N` that does not exist yet, made."""
    for number in range(1, 10_000):
        folder = parent / str(number)
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as problem:
            raise SopdeployError(f"{parent}: cannot be written ({problem.strerror})") from problem
        return folder
    raise SopdeployError(f"{parent}: is full of demos; remove it")


def command(*arguments: str) -> list[str]:
    """Return the command line of `sopdeploy` with *arguments*, in this Python."""
    return [sys.executable, "-m", "sopdeploy", *arguments]


def sopdeploy(*arguments: str) -> None:
    """Show and run one command; end with its own exit code where it fails."""
    out.print(f"\n[bold cyan]$ sopdeploy {' '.join(arguments)}[/]")
    code = subprocess.run(command(*arguments), check=False).returncode
    if code:
        raise typer.Exit(code)


@contextmanager
def server(bundle: Path) -> Iterator[str]:
    """Serve *bundle* on a free port and give its URL; SIGTERM at the end, which must drain and exit 0."""
    arguments = ("serve", str(bundle), "--port", "0")
    out.print(f"\n[bold cyan]$ sopdeploy {' '.join(arguments)}[/]")
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command(*arguments), stdout=subprocess.PIPE, text=True, env=environment)
    try:
        line = process.stdout.readline() if process.stdout else ""
        if not line.startswith("ready: "):
            raise SopdeployError(f"the server ended before it was ready (exit code {process.wait()})")
        out.print(line.strip())
        yield line.split()[1]
        process.send_signal(signal.SIGTERM)
        code = process.wait(STOP_SECONDS)
        if code:
            raise SopdeployError(f"the server stopped with exit code {code}")
        out.print("stopped cleanly")
    finally:
        process.kill()
        process.wait()


def ask(url: str) -> float:
    """Send every held-out digit to the server; show the first answers; return the share that is right."""
    import httpx

    from sopdeploy.data.datasets.small import open_digits

    digits = open_digits().held_out
    table = Table("digit", "answer", "probability", "", box=None, pad_edge=False)
    right = 0
    with httpx.Client(base_url=url, timeout=READY_SECONDS) as client:
        for index in range(len(digits)):
            picture, target = digits[index]
            best = classify(client, picture)
            truth = digits.labels[target]
            right += best["label"] == truth
            if index < SHOWN:
                mark = "[green]right[/]" if best["label"] == truth else "[red]wrong[/]"
                table.add_row(truth, best["label"], f"{best['probability']:.4f}", mark)
    out.print(table)
    share = right / len(digits)
    out.print(f"{right} of {len(digits)} held-out digits answered right over HTTP: [bold]{share:.2%}[/]")
    return share


def classify(client: "httpx.Client", picture: Any) -> dict[str, Any]:
    """Return the best class that the service gives for *picture*, sent as PNG."""
    body = io.BytesIO()
    picture.save(body, "PNG")
    answer = client.post("/v1/classify", content=body.getvalue(), headers={"Content-Type": "image/png"})
    if answer.status_code != 200:
        err.print(answer.text)
        raise SopdeployError(f"{client.base_url}: answered {answer.status_code} to a digit")
    best: dict[str, Any] = answer.json()["classes"][0]
    return best
