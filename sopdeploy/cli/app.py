"""`sopdeploy`: the verbs. Each parses, calls one function and prints; heavy imports wait inside them."""

import os
import sys
from typing import Annotated

import typer

from sopdeploy import __version__
from sopdeploy.cli import app as start
from sopdeploy.cli import demo
from sopdeploy.cli import env as environment
from sopdeploy.cli.console import out
from sopdeploy.cli.deployment import engine as engines
from sopdeploy.cli.deployment import export as exporting
from sopdeploy.cli.deployment import transfer as keying
from sopdeploy.cli.deployment import transfer as travelling
from sopdeploy.cli.serving import bench as benching
from sopdeploy.cli.serving import doctor as doctoring
from sopdeploy.cli.serving import health
from sopdeploy.cli.serving import ray as scaling
from sopdeploy.cli.serving import serve as serving
from sopdeploy.cli.training import compare as comparing
from sopdeploy.cli.training import data as data_checking
from sopdeploy.cli.training import evaluate as measuring
from sopdeploy.cli.training import import_weights as importing
from sopdeploy.cli.training import models as catalog
from sopdeploy.cli.training import train as training

app = typer.Typer(
    name="sopdeploy",
    help="Train with second-order pooling, deploy a first-order network, and prove nothing was lost.",
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command("train", cls=training.TrainCommand, rich_help_panel="Train")(training.train)
app.command("eval", rich_help_panel="Train")(measuring.evaluate)
app.command("compare", rich_help_panel="Train")(comparing.compare)
app.command("report", rich_help_panel="Train")(measuring.report)
app.command("recipes", rich_help_panel="Train")(training.recipes)
app.add_typer(data_checking.data, name="data", rich_help_panel="Train")
app.command("models", rich_help_panel="Train")(catalog.models)
app.command("describe", rich_help_panel="Train")(catalog.describe)
app.command("import", rich_help_panel="Train")(importing.import_file)
app.command("export", rich_help_panel="Export")(exporting.export)
app.command("verify", rich_help_panel="Export")(exporting.verify)
app.command("engine", rich_help_panel="Export")(engines.engine)
app.command("triton", rich_help_panel="Export")(engines.triton)
app.command("sign", rich_help_panel="Travel")(travelling.sign)
app.command("push", rich_help_panel="Travel")(travelling.push)
app.command("pull", rich_help_panel="Travel")(travelling.pull)
app.command("predict", rich_help_panel="Serve")(serving.predict)
app.command("serve", rich_help_panel="Serve")(serving.serve)
app.command("ray", rich_help_panel="Serve")(scaling.ray)
app.command("health", rich_help_panel="Serve")(health.health)
app.command("key", rich_help_panel="Serve")(keying.key)
app.command("bench", rich_help_panel="Serve")(benching.bench)
app.command("doctor", rich_help_panel="Serve")(doctoring.doctor)
app.command("demo", rich_help_panel="Learn")(demo.demo)
app.command("env", rich_help_panel="Learn")(environment.env)


def show_version(wanted: bool) -> None:
    """Print the version and end, where it was asked for."""
    if wanted:
        sys.stdout.write(f"sopdeploy {__version__}\n")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    _version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Train with second-order pooling, deploy a first-order network, and prove nothing was lost."""
    if context.invoked_subcommand is None:
        start.show_map()


def main() -> None:
    """Run the command line."""
    # On shared cores, OpenMP threads that spin while they wait stop each other; must be set before torch.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    app(prog_name="sopdeploy")


WALK = (
    ("sopdeploy demo", "see all of it work, in about a minute"),
    ("sopdeploy train --data photos", "learn from photos/<class>/*.jpg"),
    ("sopdeploy export runs/photos-dsop/best.pt --detach", "take off the branches, prove it, write a bundle"),
    ("sopdeploy verify bundles/dsop-resnet20-*/", "is the bundle whole, does this machine compute it"),
    ("sopdeploy predict bundles/dsop-resnet20-*/ photo.jpg", "classify on the spot"),
    ("sopdeploy serve bundles/dsop-resnet20-*/", "answer over HTTP, and in a browser"),
    ("sopdeploy doctor --url http://127.0.0.1:8000", "what limits the server"),
)
BESIDE = {
    "before training": ("data", "recipes", "models", "describe", "import"),
    "of what learned": ("eval", "report", "compare"),
    "of a bundle": ("bench", "engine", "triton", "sign", "push", "pull"),
    "of a server": ("key", "health", "ray"),
    "of this machine": ("env",),
}


def show_map() -> None:
    """Print the walk, a command a line, and the verbs beside it."""
    out.print("[bold]What to type first[/]\n")
    width = max(len(command) for command, _ in WALK)
    for number, (command, about) in enumerate(WALK, 1):
        out.print(f"  {number}  [cyan]{command:<{width}}[/]  [dim]{about}[/]")
    out.print("\n[bold]Beside the walk[/]\n")
    for what, verbs in BESIDE.items():
        out.print(f"     {what:<16} {', '.join(verbs)}")
    out.print(
        "\n`sopdeploy VERB --help` shows a verb's options and an example, `sopdeploy --help` every verb."
    )
