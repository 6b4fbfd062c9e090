"""`sopdeploy models`: list the networks of the catalog, or count one of them."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import pydantic
from rich.table import Table
from rich.text import Text

from sopdeploy.cli.command import command
from sopdeploy.cli.console import out, print_table, say
from sopdeploy.errors import ConfigError
from sopdeploy.training.settings.recipe_files import parse_override

if TYPE_CHECKING:
    from sopdeploy.models.describe import Description


def _show(result: "list[dict[str, str]] | Description") -> None:
    """Print the catalog, or the counts of one network."""
    if isinstance(result, list):
        _show_catalog(result)
    else:
        _show_description(result)


def _show_catalog(models: list[dict[str, str]]) -> None:
    """Print *models* by family; those that are not in the catalog follow."""
    from sopdeploy.models.families import PAGE
    from sopdeploy.models.registry import CATALOG, FAMILIES, entry

    # Networks that plug-ins register follow after the families of the catalog.
    listed = {model["name"]: entry(model["name"]) for model in models}
    registered = {name: network for name, network in listed.items() if name not in CATALOG}
    families = [*FAMILIES, ("Networks of other packages", registered)]

    for heading, members in families:
        entries = {name: network for name, network in members.items() if name in listed}
        if not entries:
            continue
        table = Table(box=None, pad_edge=False, show_header=False)
        table.add_column(min_width=max(map(len, CATALOG)), no_wrap=True)
        for name, network in entries.items():
            table.add_row(
                name,
                network.summary,
                f"{network.image_size} px",
                f"{network.num_classes} classes",
            )
        out.print(Text(heading, "bold"))
        out.print(table)
        out.print()

    out.print(
        "[bold]Networks of timm[/], 'timm:NAME'; 'dsop-timm:NAME' for every NAME with feature maps"
    )
    out.print(
        "[bold]First-order and second-order head[/], 'head:NAME' for every NAME without branches"
    )
    out.print(f"{PAGE} describes the families of second-order networks")


def _show_description(description: "Description") -> None:
    """Print the counts, the options with their values, and the published numbers."""
    parts = {f"  {part}": counts for part, counts in description.parts.items()}
    counted = {"training": description.training, **parts, "exported": description.shipped}
    say(
        f"{description.name} for {description.num_classes} classes at {description.image_size} pixels"
    )

    rows = (
        (Text(name), f"{counts.parameters:,}", f"{counts.macs:,}")
        for name, counts in counted.items()
    )
    print_table(("", "parameters", "multiply-adds"), rows)
    say(f"training only: {', '.join(description.training_only) or 'nothing'}")

    # This stride costs four times as much in conv5_x, so the page compares it with the usual
    # one.
    if description.config.get("conv5_stride") == 1:
        from sopdeploy.models.describe import describe

        usual = describe(
            description.name,
            image_size=description.image_size,
            num_classes=description.num_classes,
            **{**description.config, "conv5_stride": 2},
        )
        say(
            f"conv5_x has stride 1: {description.shipped.macs / 1e9:.2f} G multiply-adds once exported, with the "
            f"usual stride of 2 (--option conv5_stride=2) {usual.shipped.macs / 1e9:.2f} G"
        )

    options = []
    # A pooling is shown by its kind, text without quotes, and other values as JSON.
    for key, value in description.config.items():
        short = value.get("kind", value) if isinstance(value, dict) else value
        options.append(f"{key}={short if isinstance(short, str) else json.dumps(short)}")
    say(f"features: {description.representation}", f"options: {', '.join(options)}")
    say(*(figure.sentence() for figure in description.published))


@command(
    _show,
    examples=(
        "sopdeploy models",
        "sopdeploy models gsop",
        "sopdeploy models dsop-resnet18 --option aux_stride=table",
        "sopdeploy models resnet50 --option pooling=isqrt --option conv5_stride=1",
    ),
)
def models(
    name: str | None = None,
    *,
    option: Sequence[str] = (),
    image_size: Annotated[int | None, pydantic.Field(ge=1)] = None,
    num_classes: Annotated[int | None, pydantic.Field(ge=1)] = None,
) -> "list[dict[str, str]] | Description":
    """List the networks of the catalog, or count parameters and multiply-adds of one of them.

    Args:
        name: Network to describe, or a family to list: dsop, gsop, gmsop, isqrt. By default, all are listed.
        option: Option KEY=VALUE of the network; repeatable.
        image_size: Side of the image in pixels.
        num_classes: Number of classes.
    """
    from sopdeploy.models.families import find_family, names_of_family
    from sopdeploy.models.registry import entry, list_models

    if name is None:
        if option or image_size or num_classes:
            raise ConfigError(
                "no network to describe; give a name of `sopdeploy models` before the options"
            )
        return [{"name": known, "summary": entry(known).summary} for known in list_models()]

    # The name of a family, such as gsop, lists its networks.
    family = find_family(name)
    if family is not None and not (option or image_size or num_classes):
        members = names_of_family(family, list_models())
        return [{"name": member, "summary": entry(member).summary} for member in members]

    from sopdeploy.models.describe import describe
    from sopdeploy.models.registry import make_config

    config = dict(map(parse_override, option))
    make_config(name, config)  # rejects keys that are also parameters of `describe`
    return describe(name, image_size=image_size, num_classes=num_classes, **config)
