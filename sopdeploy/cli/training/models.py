"""`sopdeploy models` and `sopdeploy describe`."""

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from sopdeploy.cli.command import command
from sopdeploy.cli.console import out, print_table, say

if TYPE_CHECKING:
    from sopdeploy.models.describe import Description

NetworkOption = Annotated[
    list[str] | None,
    typer.Option("--option", metavar="KEY=VALUE", help="Option of the network; repeatable."),
]


def show_models(_: list[dict[str, str]]) -> None:
    """Print a table per family, with image size and number of classes."""
    from sopdeploy.models.registry import CATALOG, FAMILIES, plugin_networks, title

    families = {title(family): family.ENTRIES for family in FAMILIES}
    plugins = {f"Plug-in {distribution}": networks for distribution, networks in plugin_networks().items()}
    for heading, entries in {**families, **plugins}.items():
        table = Table(box=None, pad_edge=False, show_header=False)
        table.add_column(min_width=max(map(len, CATALOG)), no_wrap=True)
        for name, entry in entries.items():
            table.add_row(name, entry.summary, f"{entry.image_size} px", f"{entry.num_classes} classes")
        out.print(Text(heading, "bold"))
        out.print(table)
        out.print()
    out.print("[bold]Networks of timm[/], 'timm:NAME'; 'dsop-timm:NAME' for every NAME with feature maps")
    out.print("[bold]First-order and second-order head[/], 'head:NAME' for every NAME without branches")


@command(show_models)
def models_command() -> list[dict[str, str]]:
    """List the networks of the catalog.

    Example: [bold]sopdeploy models[/bold]
    """
    from sopdeploy.models.registry import entry, list_models

    return [{"name": name, "summary": entry(name).summary} for name in list_models()]


def show_description(description: "Description") -> None:
    """Print the counts, and the published numbers."""
    parts = {f"  {part}": counts for part, counts in description.parts.items()}
    counted = {"training": description.training, **parts, "deployed": description.shipped}
    say(f"{description.name} for {description.num_classes} classes at {description.image_size} pixels")
    rows = ((Text(name), f"{counts.parameters:,}", f"{counts.macs:,}") for name, counts in counted.items())
    print_table(("", "parameters", "multiply-adds"), rows)
    say(f"training only: {', '.join(description.training_only) or 'nothing'}")
    say(f"features: {description.representation}", *(figure.sentence() for figure in description.published))


@command(show_description)
def describe_command(
    name: Annotated[str, typer.Argument(help="A name of `sopdeploy models`.")],
    options: NetworkOption = None,
    image_size: Annotated[int | None, typer.Option(min=1, help="Side of the image in pixels.")] = None,
    num_classes: Annotated[int | None, typer.Option(min=1, help="Number of classes.")] = None,
) -> "Description":
    """Count parameters and multiply-adds of a network, in training and deployed.

    Example: [bold]sopdeploy describe dsop-resnet18 --option aux_stride=table[/bold]

    Example: [bold]sopdeploy describe resnet50 --option pooling=isqrt --option conv5_stride=1[/bold]
    """
    from sopdeploy.models.describe import describe as describe_model
    from sopdeploy.models.registry import make_config
    from sopdeploy.training.recipe import parse_override

    config: dict[str, Any] = dict(parse_override(option) for option in options or ())
    make_config(name, config)  # rejects keys that are also parameters of describe_model
    return describe_model(name, image_size=image_size, num_classes=num_classes, **config)
