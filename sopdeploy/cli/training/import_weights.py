"""`sopdeploy import`: convert published weights to a checkpoint."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sopdeploy.cli.command import command
from sopdeploy.cli.console import print_field, show_steps
from sopdeploy.cli.training.models import NetworkOption
from sopdeploy.files import check_is_weights
from sopdeploy.importers.options import ImportOptions

if TYPE_CHECKING:
    from sopdeploy.importers.import_weights import ImportReport


def _show(report: "ImportReport") -> None:
    """Print what was mapped and written."""
    rules = report.preprocess
    mean, std = (", ".join(f"{value:.4g}" for value in values) for values in (rules.mean, rules.std))
    geometry = f"resize {rules.resize}, crop {rules.crop}"
    print_field("found", report.looks_like)
    print_field("mapped", f"{report.num_tensors} tensors as {report.model}")
    print_field("ignored", ", ".join(report.beside) or "nothing")
    print_field("input", f"{geometry}, {rules.interpolation}, mean {mean}, std {std}")
    print_field("classes", f"{report.num_classes}: {report.labels}")
    print_field("written", report.checkpoint)
    for note in report.notes:
        print_field("note", note)


@command(_show)
def import_command(
    file: Annotated[
        Path, typer.Argument(help="Weights: .pth, .pth.tar, .th, .safetensors, or MatConvNet's .mat.")
    ],
    model: Annotated[str, typer.Option("--as", help="The network: a name of `sopdeploy models`.")],
    out_file: Annotated[Path, typer.Option(help="The checkpoint to write.")] = Path("ckpt.pt"),
    network_options: NetworkOption = None,
    *,
    options: ImportOptions,
) -> "ImportReport":
    """Convert published weights: fast-MPN-COV, GSoP, GM-SOP, torchvision, timm, CIFAR ResNets.

    Example: sopdeploy import mpncovresnet50-15991845.pth --as isqrt-resnet50

    Example: sopdeploy import net-epoch-60.mat --as gmsop-16-8-resnet18 --labels names.txt
    """
    check_is_weights(file)
    with show_steps("importing"):
        from sopdeploy.importers.import_weights import import_weights
        from sopdeploy.training.recipe_files import parse_override

        config = dict(map(parse_override, network_options or ()))
        return import_weights(file, model, out_file, options, config)
