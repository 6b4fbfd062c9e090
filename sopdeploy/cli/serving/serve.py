"""`sopdeploy serve`: serve bundles over HTTP; `sopdeploy key`: create an API key for its clients."""

import sys
from pathlib import Path
from typing import Annotated, Any

import pydantic
import typer
from rich.text import Text

from sopdeploy.cli.command import command
from sopdeploy.cli.console import err, plain_text
from sopdeploy.config import Options
from sopdeploy_service.settings import Settings, load_settings, parse_assignments, to_toml, unused_variables

BundlesArgument = Annotated[
    list[str], typer.Argument(metavar="BUNDLE...", help="A bundle, a folder of bundles, or NAME=BUNDLE.")
]
SettingOption = Annotated[
    list[str] | None,
    typer.Option("--setting", metavar="NAME=VALUE", help="Any other setting of the service; repeatable."),
]
ConfigOption = Annotated[Path | None, typer.Option(help="TOML file with settings.")]


def flags_of_settings(*names: str) -> type[Options]:
    """Create options without defaults for the settings *names*; `Settings` validates their values."""
    fields: dict[str, Any] = {}
    for name in names:
        field = Settings.model_fields[name]
        kind = field.annotation if field.annotation in {bool, int} else str
        default = "" if field.default in {None, ()} or kind is bool else f"; default: {field.default}"
        not_given = False if kind is bool else None
        fields[name] = (kind | None, pydantic.Field(not_given, description=f"{field.description}{default}."))
    return pydantic.create_model("Flags", __base__=Options, **fields)


class ServeOptions(
    flags_of_settings(  # type: ignore[misc] # mypy does not know the class
        *("host", "port", "runtime", "devices", "threads", "keys", "require_signature", "log"),
    )
):
    """The settings that have an option of their own."""


@command()
def serve_command(
    bundles: BundlesArgument,
    *,
    options: ServeOptions,
    config: ConfigOption = None,
    assignments: SettingOption = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print all settings as a TOML file and exit.")
    ] = False,
) -> None:
    """Serve bundles over HTTP: POST an image to /v1/classify.

    Settings come from flags or --setting name=value, from environment variables such as SOPDEPLOY_PORT, and
    from the --config file, in this order of priority.

    Example: sopdeploy serve bundles/photos-3f6c01d2a4b7 --port 8000

    Example: sopdeploy serve flowers=bundles/photos-3f6c01d2a4b7 birds=other/bundle
    """
    given = options.model_dump(exclude_defaults=True)
    settings = load_settings(config, **parse_assignments(assignments or (), **given))
    for name in unused_variables():
        note = f"environment variable {name} is not a setting and has no effect"
        err.print(Text.assemble(("note:", "yellow"), " ", plain_text(note)))
    if print_config:
        sys.stdout.write(to_toml(settings))
        return
    from sopdeploy_service.server.process import run_server

    raise typer.Exit(run_server(bundles, settings))


@command()
def key_command(
    name: Annotated[str, typer.Argument(help="Name of the client; it appears in the server's log.")],
    keys: Annotated[Path, typer.Option(help="API key file; created if it is missing.")],
    rate: Annotated[
        float | None, typer.Option(help="Largest number of images per second; by default no limit.")
    ] = None,
) -> None:
    """Create an API key, print it once and store its hash; servers read the file when they start.

    Example: sopdeploy key phone-app --keys keys.toml --rate 100
    """
    from sopdeploy_service.http.api_keys import new_key

    created = new_key(keys, name, rate)
    sys.stdout.write(created + "\n")
    err.print(plain_text(f"{keys} stores only a hash: keep the key, it is not shown again"))
