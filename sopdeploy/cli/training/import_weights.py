"""`sopdeploy import`: convert published weights of other projects to a checkpoint."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sopdeploy.cli.command import command
from sopdeploy.cli.console import JsonOption, out, plain_text, print_field, print_json, steps
from sopdeploy.cli.training.train import SetOption
from sopdeploy.importers.options import ImportOptions

if TYPE_CHECKING:
    from sopdeploy.importers.import_weights import ImportReport


@command()
def import_file(
    file: Annotated[
        Path, typer.Argument(help="Weights: .pth, .pth.tar, .th, .safetensors, or MatConvNet's .mat.")
    ],
    name: Annotated[str, typer.Option("--as", help="The network: a name of `sopdeploy models`.")],
    checkpoint: Annotated[Path, typer.Option("--out", help="The checkpoint to write.")] = Path("ckpt.pt"),
    settings: SetOption = None,
    *,
    options: ImportOptions,
    keys: Annotated[bool, typer.Option("--keys", help="List the source of every tensor.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Convert published weights: fast-MPN-COV, GSoP, GM-SOP, torchvision, timm, CIFAR ResNets.

    Example: [bold]sopdeploy import mpncovresnet50-15991845.pth --as isqrt-resnet50[/bold]

    Example: [bold]sopdeploy import net-epoch-60.mat --as gmsop-16-8-resnet18 --labels names.txt[/bold]
    """
    with steps("importing", quiet=as_json):
        from sopdeploy.importers.fit import nest_settings
        from sopdeploy.importers.import_weights import import_weights
        from sopdeploy.training.recipe import parse_override

        config = nest_settings(dict(map(parse_override, settings or ())))
        report = import_weights(file, name, checkpoint, options, config)
    if as_json:
        print_json(report.model_dump(mode="json"))
    else:
        _show(report, with_tensors=keys)


def _show(report: "ImportReport", *, with_tensors: bool) -> None:
    for row in report.rows if with_tensors else ():
        source = " .. ".join(dict.fromkeys((row.of[0], row.of[-1]))) if row.of else "-"
        out.print(plain_text(f"{row.name} {row.shape} <- {source}: {row.how}"))
    absent = sum(not row.of for row in report.rows)
    rules = report.preprocess
    mean, std = (", ".join(f"{value:.4g}" for value in values) for values in (rules.mean, rules.std))
    geometry = f"resize {rules.resize}, crop {rules.crop}"
    if rules.fit != "crop":
        geometry = f"{rules.fit} to {rules.crop}"
    fields = [
        ("found", report.looks_like),
        ("mapped", f"{len(report.rows) - absent} tensors as {report.model}, {absent} counters set to 0"),
        ("ignored", ", ".join([*report.ignored, *report.beside]) or "nothing"),
        ("input", f"{geometry}, {rules.interpolation}, mean {mean}, std {std}"),
        ("classes", f"{report.num_classes}: {report.labels}"),
        ("written", report.checkpoint),
        *(("note", note) for note in report.notes),
    ]
    for title, text in fields:
        print_field(title, text)
