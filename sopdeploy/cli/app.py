"""The `sopdeploy` command line. Commands import heavy packages only when they run."""

import os
import sys
from contextlib import nullcontext, suppress
from typing import Annotated, Any

import typer

from sopdeploy import __version__
from sopdeploy.cli import demo, env
from sopdeploy.cli.console import one_line_errors, out
from sopdeploy.cli.deployment import engine, export, inspect, keys, transfer
from sopdeploy.cli.serving import bench, classify, doctor, health, predict, serve
from sopdeploy.cli.training import compare, data, evaluate, import_weights, models, reproduce, train

OUTPUT_CLOSED = 1  # the exit code of Typer and Rich if stdout is closed

app = typer.Typer(
    name="sopdeploy",
    help="Train an image classifier on a folder of images, export it with a proof, and serve it over HTTP.",
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command("train", cls=train.TrainCommand, rich_help_panel="Train")(train.train)
app.command("eval", rich_help_panel="Train")(evaluate.evaluate)
app.command("calibrate", rich_help_panel="Train")(evaluate.calibrate)
app.command("compare", rich_help_panel="Train")(compare.compare)
app.command("reproduce", rich_help_panel="Train")(reproduce.reproduce)
app.command("report", rich_help_panel="Train")(evaluate.report)
app.command("recipes", rich_help_panel="Train")(train.recipes)
app.add_typer(data.data, name="data", rich_help_panel="Train")
app.command("models", rich_help_panel="Train")(models.models)
app.command("describe", rich_help_panel="Train")(models.describe)
app.command("import", rich_help_panel="Train")(import_weights.import_file)
app.command("export", rich_help_panel="Export")(export.export)
app.command("inspect", rich_help_panel="Export")(inspect.inspect)
app.command("verify", rich_help_panel="Export")(predict.verify)
app.command("engine", rich_help_panel="Export")(engine.engine)
app.command("triton", rich_help_panel="Export")(export.triton)
app.command("sign", rich_help_panel="Distribute")(keys.sign)
app.command("push", rich_help_panel="Distribute")(transfer.push)
app.command("pull", rich_help_panel="Distribute")(transfer.pull)
app.command("predict", rich_help_panel="Serve")(predict.predict)
app.command("classify", rich_help_panel="Serve")(classify.classify)
app.command("serve", rich_help_panel="Serve")(serve.serve)
app.command("ray", rich_help_panel="Serve")(serve.ray)
app.command("health", rich_help_panel="Serve")(health.health)
app.command("key", rich_help_panel="Serve")(keys.key)
app.command("bench", rich_help_panel="Serve")(bench.bench)
app.command("doctor", rich_help_panel="Serve")(doctor.doctor)
app.command("demo", rich_help_panel="Get started")(demo.demo)
app.command("env", rich_help_panel="Get started")(env.env)

QUICK_START = (
    ("sopdeploy demo", "run the whole workflow in a minute"),
    ("sopdeploy train --data photos", "train on photos/<class>/*.jpg"),
    ("sopdeploy export runs/latest/best.pt --detach", "detach branches, prove, write a bundle"),
    ("sopdeploy verify bundles/latest", "check files and numbers on this machine"),
    ("sopdeploy predict bundles/latest photo.jpg", "classify images without a server"),
    ("sopdeploy serve bundles/latest", "serve over HTTP, with a web page"),
    ("sopdeploy doctor --url http://127.0.0.1:8000", "find the bottleneck of a server"),
)
OTHER_COMMANDS = {
    "before training": ("data", "recipes", "models", "describe", "import"),
    "training results": ("eval", "report", "calibrate", "compare", "reproduce"),
    "bundles": ("inspect", "bench", "engine", "triton", "sign", "push", "pull"),
    "many images": ("classify",),
    "servers": ("key", "health", "ray"),
    "this machine": ("env",),
}


def _show_version(requested: bool) -> None:
    if requested:
        sys.stdout.write(f"sopdeploy {__version__}\n")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Train an image classifier on a folder of images, export it with a proof, and serve it over HTTP."""
    if context.invoked_subcommand is not None:
        return
    out.print("[bold]Quick start[/]\n")
    width = max(len(command) for command, _ in QUICK_START)
    for number, (command, purpose) in enumerate(QUICK_START, 1):
        out.print(f"  {number}  [cyan]{command:<{width}}[/]  [dim]{purpose}[/]")
    out.print("\n[bold]Other commands[/]\n")
    for topic, commands in OTHER_COMMANDS.items():
        out.print(f"     {topic:<16} {', '.join(commands)}")
    out.print("\n`sopdeploy COMMAND --help` shows options and an example, `sopdeploy --help` all commands.")


def main() -> None:
    """Run the command line; exit with 1 if the reader of stdout has closed it, as `head` does.

    If stdout cannot be written for another reason, such as a full disk, that is a user error. Output to a
    stream that was closed before the start (`>&-`) is discarded.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123, SIM115
    # On shared cores, spinning OpenMP threads slow each other down. Must be set before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    code: Any = 0
    try:
        with one_line_errors():
            try:
                app(prog_name="sopdeploy")
            except SystemExit as stop:
                code = stop.code
            with suppress(OSError) if code else nullcontext():  # the command has printed its error
                sys.stdout.flush()  # the interpreter flushes it too late to handle an error
    except BrokenPipeError:
        code = OUTPUT_CLOSED
    except typer.Exit as stop:
        code = stop.exit_code
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # discards what is still in the buffer
    sys.exit(code)
