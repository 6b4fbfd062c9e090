"""`sopdeploy export` and `sopdeploy inspect`: convert a checkpoint or a network of your own to a bundle."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sopdeploy.cli.command import command
from sopdeploy.cli.console import print_field, show_steps
from sopdeploy.environment import SLOW_INT8, lacks_vnni
from sopdeploy.errors import ConfigError
from sopdeploy.files import check_is_checkpoint
from sopdeploy_export.options import ExportOptions, NetworkExportOptions, NetworkOptions

if TYPE_CHECKING:
    from sopdeploy_export.report.results import Exported


def show(exported: "Exported", verbose: bool = False) -> None:
    """Print what was removed, proved and measured in four lines, or all facts, and the warnings."""
    lines = exported.lines()
    for name, text in ({**exported.facts(), "bundle": lines["bundle"]} if verbose else lines).items():
        print_field(name, text)
    warnings = list(exported.warnings)
    if exported.manifest.int8_for == "cpu" and lacks_vnni():
        warnings.insert(0, SLOW_INT8)
    if exported.parity.drift_allowed:
        warnings.insert(0, "the numbers drift; the bundle records that this was allowed")
    for warning in warnings:
        print_field("warning", warning, style="bold yellow")


@command(show, summarize=lambda exported: exported.summary())
def export_command(
    checkpoint: Annotated[
        Path, typer.Argument(help="A checkpoint of `sopdeploy train`, or with --network any weight file.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the bundle.")] = Path("bundles"),
    *,
    verbose: Annotated[bool, typer.Option("--verbose", help="Print one line per fact.")] = False,
    options: ExportOptions,
    source: NetworkExportOptions,
) -> "Exported":
    """Convert a checkpoint to a bundle: detach, prove equivalence, export to ONNX, compare, write.

    With --network, the file holds the weights of a network of your own, which is built by your code.

    Example: sopdeploy export runs/latest/best.pt --detach
    """
    del verbose  # `show` reads it
    if source.network is None:  # before the imports, which take seconds
        check_is_checkpoint(checkpoint)
    for folder in filter(None, (options.calibrate, options.evaluate)):
        from sopdeploy.data.folders import data_folder

        data_folder(folder)
    if out.is_file():
        raise ConfigError(f"{out} is a file; choose a folder", setting="out")
    with show_steps("exporting", lines=True) as step:
        if source.network is not None:
            from sopdeploy.api.deployment import export_weights

            return export_weights(checkpoint, source, out, options, step)
        from sopdeploy_export.pipeline import export_checkpoint

        return export_checkpoint(checkpoint, out, options=options, on_step=step)


def show_unused(inspected: dict[str, Any]) -> None:
    """Print which tensors fit, the unused parts, and the next command."""
    removed = ", ".join(inspected["prefixes_removed"]) or "nothing"
    print_field("weights", f"{inspected['num_tensors']} tensors fit; removed from the names: {removed}")
    unused = inspected["unused"]
    print_field("unused", ", ".join(unused) if unused else "nothing; the output depends on every part")
    if unused:
        flags = " ".join(f"--training-only {part}" for part in unused)
        print_field("next", f"sopdeploy export .. --network {inspected['network']} {flags}", style="dim")


@command(show_unused)
def inspect_command(
    file: Annotated[Path, typer.Argument(help="A weight file.")], *, options: NetworkOptions
) -> dict[str, Any]:
    """List the parts of a network of your own that its output does not depend on; writes nothing.

    They are candidates for `sopdeploy export --training-only`.

    Example: sopdeploy inspect w.pth --network my_code:build --preprocess rules.json
    """
    with show_steps("inspecting"):
        from sopdeploy.api.deployment import inspect_network as run

        return run(file, options)
