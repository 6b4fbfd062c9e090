"""`sopdeploy inspect`: list the parts of a network that its output does not depend on."""

from pathlib import Path
from typing import Annotated, Any

import typer

from sopdeploy.cli.command import command
from sopdeploy.cli.console import print_field, steps
from sopdeploy_export.options import NetworkOptions


def show(inspected: dict[str, Any]) -> None:
    """Print which tensors fit, the unused parts, and the next command."""
    removed = ", ".join(inspected["prefixes_removed"]) or "nothing"
    print_field("weights", f"{inspected['tensors']} tensors fit; removed from the names: {removed}")
    unused = inspected["unused"]
    print_field("unused", ", ".join(unused) if unused else "nothing; the output depends on every part")
    if unused:
        flags = " ".join(f"--training-only {part}" for part in unused)
        print_field("next", f"sopdeploy export .. --network {inspected['network']} {flags}", style="dim")


@command(show)
def inspect(
    file: Annotated[Path, typer.Argument(help="A weight file.")], *, options: NetworkOptions
) -> dict[str, Any]:
    """List the parts of a network of your own that its output does not depend on; writes nothing.

    They are candidates for `sopdeploy export --training-only`.

    Example: [bold]sopdeploy inspect w.pth --network my_code:build --preprocess rules.json[/bold]
    """
    with steps("inspecting"):
        from sopdeploy.api.user_network import inspect as run

        return run(file, options)
