"""`sopdeploy import`: convert published weights of other projects to a checkpoint."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from sopdeploy.cli.console import JsonOption, one_line_errors, out, plain_text, print_field, print_json, steps


def import_file(
    file: Annotated[
        Path, typer.Argument(help="Weights: .pth, .pth.tar, .th, .safetensors, or MatConvNet's .mat.")
    ],
    name: Annotated[str, typer.Option("--as", help="The network: a name of `sopdeploy models`.")],
    destination: Annotated[Path, typer.Option("--out", help="The checkpoint to write.")] = Path("ckpt.pt"),
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A config value that the file does not contain."),
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="Class names in the order of the outputs: a .json list or text lines.")
    ] = None,
    resize: Annotated[int | None, typer.Option(min=1, help="Shorter side of the image in pixels.")] = None,
    crop: Annotated[int | None, typer.Option(min=1, help="Side of the center crop in pixels.")] = None,
    interpolation: Annotated[
        Literal["bilinear", "bicubic"] | None, typer.Option(help="Interpolation of the resize.")
    ] = None,
    fit: Annotated[
        Literal["crop", "pad", "squash"] | None,
        typer.Option(help="How images become squares: center crop, padding, or change of the aspect ratio."),
    ] = None,
    keys: Annotated[bool, typer.Option("--keys", help="List the source of every tensor.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Convert published weights: fast-MPN-COV, GSoP, GM-SOP, torchvision, timm, CIFAR ResNets.

    Example: [bold]sopdeploy import mpncovresnet50-15991845.pth --as isqrt-resnet50[/bold]

    Example: [bold]sopdeploy import net-epoch-60.mat --as gmsop-16-8-resnet18 --labels names.txt[/bold]
    """
    with one_line_errors(as_json), steps("importing", quiet=as_json):
        from sopdeploy.importers.fit import nest_settings
        from sopdeploy.importers.import_weights import ImportOptions, import_weights
        from sopdeploy.training.recipe import parse_override

        options = ImportOptions(
            settings=nest_settings(dict(parse_override(setting) for setting in settings or [])),
            labels=labels,
            resize=resize,
            crop=crop,
            interpolation=interpolation,
            fit=fit,
        )
        report = import_weights(file, name, destination, options)
    if as_json:
        print_json(report.model_dump(mode="json"))
        return
    for row in report.rows if keys else ():
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
