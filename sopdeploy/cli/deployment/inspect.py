"""`sopdeploy inspect`: list the parts of a network that its output does not depend on."""

from pathlib import Path
from typing import Annotated

import typer

from sopdeploy.cli.console import JsonOption, one_line_errors, print_field, print_json, steps

OWN = "A network of your own"

NetworkOption = Annotated[
    str | None,
    typer.Option(help="Builder of the network, package.module:callable.", rich_help_panel=OWN),
]
SettingsOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Option key=value of --network; repeatable.", rich_help_panel=OWN),
]
PreprocessOption = Annotated[
    str | None,
    typer.Option(help="timm:NAME, torchvision:WEIGHTS or FILE.json.", rich_help_panel=OWN),
]
TableOption = Annotated[
    str | None,
    typer.Option(
        "--weights",
        help="Key of the state dict to use, if the file has several, such as model_ema.",
        rich_help_panel=OWN,
    ),
]
LogitsOption = Annotated[
    str | None,
    typer.Option(help="Attribute, key or index of the logits in the output.", rich_help_panel=OWN),
]


def inspect(
    weights: Annotated[Path, typer.Argument(help="A weight file.")],
    network: Annotated[str, typer.Option(help="Builder of the network, package.module:callable.")],
    preprocess: Annotated[str, typer.Option(help="timm:NAME, torchvision:WEIGHTS or FILE.json.")],
    settings: SettingsOption = None,
    table: TableOption = None,
    logits: LogitsOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the parts of a network of your own that its output does not depend on; writes nothing.

    They are candidates for `sopdeploy export --training-only`.

    Example: [bold]sopdeploy inspect w.pth --network my_code:build --preprocess rules.json[/bold]
    """
    with one_line_errors(as_json), steps("inspecting", quiet=as_json):
        from sopdeploy.api.user_network import NetworkSource
        from sopdeploy.api.user_network import inspect as run

        found = run(
            NetworkSource(
                weights=weights,
                network=network,
                settings=settings or (),
                preprocess=preprocess,
                table=table,
                logits=logits,
            )
        )
    if as_json:
        print_json(found)
        return
    removed = ", ".join(found["prefixes_removed"]) or "nothing"
    print_field("weights", f"{found['tensors']} tensors fit; removed from the names: {removed}")
    unused = found["unused"]
    print_field("unused", ", ".join(unused) if unused else "nothing; the output depends on every part")
    if unused:
        flags = " ".join(f"--training-only {part}" for part in unused)
        print_field("next", f"sopdeploy export {weights} --network {network} {flags}", style="dim")
