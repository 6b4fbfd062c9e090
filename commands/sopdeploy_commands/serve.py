"""`sopdeploy serve` and `key`: a server, and the keys of its clients."""

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.text import Text

from sopdeploy.cli.command import SettingOptions, command
from sopdeploy.cli.console import err, plain_text
from sopdeploy.errors import ConfigError
from sopdeploy_service.settings import (
    Settings,
    describe_unused_variables,
    load_settings,
    parse_assignments,
    to_toml,
)


def setting_flags(*names: str) -> dict[str, tuple[Any, str]]:
    """Describe an option for each of the settings *names*; `Settings` validates its value."""
    flags: dict[str, tuple[Any, str]] = {}
    for name in names:
        field = Settings.model_fields[name]
        default = "" if field.default in {None, ()} else f"; default: {field.default}"
        value_type = int if field.annotation is int else str
        flags[name] = (value_type | None, f"{field.description}{default}.")

    return flags


@command(
    settings=SettingOptions(
        parse_assignments,
        setting_flags(
            "host",
            "port",
            "max_batch",
            "runtime",
            "devices",
            "keys",
            "log",
        ),
    ),
    examples=(
        "sopdeploy serve bundles/photos-3f6c01d2a4b7 --port 8000",
        "sopdeploy serve bundles/live --set keep=kept --set follow=true",
        "sopdeploy serve flowers=bundles/photos-3f6c01d2a4b7 birds=other/bundle",
    ),
)
def serve(
    bundles: str | Path | Sequence[str | Path],
    *,
    config: str | Path | None = None,
    print_config: bool = False,
    **settings: Any,
) -> int:
    """Serve bundles over HTTP: POST an image to /v1/classify.

    Settings come from options or keywords, from environment variables such as SOPDEPLOY_PORT,
    and from the file *config*, in this order of priority. The most frequent ones of --set are:
    `keep=FOLDER` keeps photos to label, `follow=true` reloads a bundle when its link
    moves, `examples=FOLDER` has photos that the web page offers, and `allowed_origins=https://shop.example` lets
    pages of another server use this one.

    Args:
        bundles: One or several of: a bundle, a folder of bundles, or NAME=BUNDLE.
        config: TOML file with settings.
        print_config: Print all settings as a TOML file and exit.
        **settings: Settings, for example `port=8000` (0 selects a free port), `host`, `threads`.

    Returns:
        The exit code: 0 after a drain, 70 if a runtime died, 2 if one of several processes cannot start.

    Raises:
        ConfigError: Invalid settings, or some that have left; the port is in use; an event loop runs.
        BundleError: A bundle is damaged.
        SopdeployError: No runtime can run a bundle, or its outputs differ from its probes.

    Examples:
        It returns after Ctrl-C or SIGTERM, when all requests have their responses.

        >>> sopdeploy.serve("bundles/photos-3f6c01d2a4b7", port=8000)
        ready: http://127.0.0.1:8000  photos-3f6c01d2a4b7
        web page: http://127.0.0.1:8000/
        API docs: http://127.0.0.1:8000/docs
        0
    """
    sources = [bundles] if isinstance(bundles, str | Path) else list(bundles)

    # Who upgrades learns of all settings and variables that have left in one message.
    loaded = load_settings(None if config is None else Path(config), **settings)
    for note in describe_unused_variables():
        err.print(Text.assemble(("note:", "yellow"), " ", plain_text(note)))

    if print_config:
        sys.stdout.write(to_toml(loaded))
        return 0
    from sopdeploy_service.server.process import run_server

    # The server runs an event loop of its own in this thread, which must not have one.
    try:
        asyncio.get_running_loop()
    except RuntimeError:  # none runs
        return run_server(sources, loaded)
    reason = "an event loop runs in this thread, as in a notebook"
    raise ConfigError(f"serve: {reason}; run the command in another process")


@command(examples=("sopdeploy key phone-app --keys keys.toml --rate 100",))
def key(name: str, *, keys: Path, rate: float | None = None) -> None:
    """Create an API key, print it once and store its hash; servers read the file at their start and at a reload.

    Args:
        name: Name of the client; it appears in the server's log.
        keys: API key file; created if it is missing.
        rate: Largest number of images per second; by default no limit.
    """
    from sopdeploy_service.http.api_keys import new_key

    created = new_key(keys, name, rate)
    sys.stdout.write(created + "\n")
    err.print(plain_text(f"{keys} stores only a hash: keep the key, it is not shown again"))
