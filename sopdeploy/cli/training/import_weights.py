"""`sopdeploy import`: published weights of other projects, as a checkpoint."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sopdeploy.cli.console import one_line_errors, out, plain_text, print_field, print_json, steps

if TYPE_CHECKING:
    from sopdeploy.importers.import_weights import ImportReport

Json = Annotated[bool, typer.Option("--json", help="Print JSON for a script, key by key.")]


def import_file(
    file: Annotated[
        Path, typer.Argument(help="Weights: .pth, .pth.tar, .th, .safetensors, or MatConvNet's .mat.")
    ],
    name: Annotated[str, typer.Option("--as", help="The network: a name that `sopdeploy models` lists.")],
    destination: Annotated[Path, typer.Option("--out", help="The checkpoint to write.")] = Path("ckpt.pt"),
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A switch of the network that the file cannot say."),
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="Class names, one a line or a .json list, in the network's order.")
    ] = None,
    resize: Annotated[int | None, typer.Option(min=1, help="Shorter side of a picture in pixels.")] = None,
    crop: Annotated[int | None, typer.Option(min=1, help="Side of the centre crop in pixels.")] = None,
    interpolation: Annotated[str | None, typer.Option(help="bilinear or bicubic.")] = None,
    keys: Annotated[bool, typer.Option("--keys", help="Show where every tensor comes from.")] = False,
    as_json: Json = False,
) -> None:
    """Turn published weights into a checkpoint: fast-MPN-COV, GSoP, GM-SOP, torchvision, timm, CIFAR ResNets.

    Example: [bold]sopdeploy import mpncovresnet50-15991845.pth --as isqrt-resnet50[/bold]

    Example: [bold]sopdeploy import net-epoch-60.mat --as gmsop-16-8-resnet18 --labels names.txt[/bold]
    """
    with one_line_errors(as_json), steps("importing", quiet=as_json):
        from sopdeploy.importers.import_weights import ImportOptions, import_weights, nest_settings
        from sopdeploy.training.recipe import parse_override

        options = ImportOptions(
            settings=nest_settings(dict(parse_override(setting) for setting in settings or [])),
            labels=labels,
            resize=resize,
            crop=crop,
            interpolation=interpolation,
        )
        report = import_weights(file, name, destination, options)
    if as_json:
        print_json(report.model_dump(mode="json"))
        return
    show(report, keys=keys)


def show(report: "ImportReport", *, keys: bool) -> None:
    """Print what was found, mapped and left out."""
    if keys:
        for row in report.rows:
            out.print(plain_text(f"{row.name} {row.shape} <- {several(row.of)}: {row.how}"))
    absent = sum(not row.of for row in report.rows)
    rules = report.preprocess
    mean, std = (", ".join(f"{value:.4g}" for value in values) for values in (rules.mean, rules.std))
    rows = {
        "found": report.looks_like,
        "mapped": f"{len(report.rows) - absent} tensors as {report.model}, {absent} counters set to 0",
        "ignored": ", ".join([*report.ignored, *report.beside]) or "nothing",
        "input": f"resize {rules.resize}, crop {rules.crop}, {rules.interpolation}, mean {mean}, std {std}",
        "classes": f"{report.num_classes}: {report.labels}",
        "written": report.checkpoint,
    }
    for title, text in rows.items():
        print_field(title, text)
    for note in report.notes:
        print_field("note", note)


def several(names: tuple[str, ...]) -> str:
    """Return first and last of *names*."""
    return " .. ".join(dict.fromkeys((names[0], names[-1]))) if names else "-"
