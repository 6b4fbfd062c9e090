"""The bundles that a server serves.

A source is a bundle, a folder of bundles (`sopdeploy.bundle.listing` says which of them are
served), or `NAME=BUNDLE`. Clients use NAME or, without it, the name of the project.
"""

import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeAlias

from sopdeploy.base.files import LATEST, has_manifest
from sopdeploy.bundle.folder import Bundle, follow_link, read_manifest
from sopdeploy.bundle.listing import describe_projects, list_bundles
from sopdeploy.bundle.live import read_live
from sopdeploy.bundle.manifest import Manifest
from sopdeploy.errors import BundleError, ConfigError
from sopdeploy.paths import describe_wrong

# Reads a bundle: its name in the server, its folder, its manifest
ReadNamed: TypeAlias = Callable[[str, Path, Manifest], Bundle]

log = logging.getLogger("sopdeploy.models")


def _parse_source(source: str | Path) -> tuple[str, Path]:
    """Split *source* into a name, empty if it has none, and a path; raises `ConfigError`."""
    name, equals, text = str(source).partition("=")
    if not equals or Path(source).exists():  # a path may contain `=`
        return "", Path(source)

    if re.fullmatch(r"[\w.-]+", name) is None:
        raise ConfigError(
            f"{source}: a model name may contain only letters, digits, `-`, `_` and `.`"
        )
    return name, Path(text)


def links_among(sources: Iterable[str | Path]) -> dict[Path, Path]:
    """Return where the links among *sources* lead now; raises `ConfigError` if there are none."""
    target_of_link = read_links(
        path for _, path in map(_parse_source, sources) if path.is_symlink()
    )

    if not target_of_link:
        raise ConfigError(
            "no BUNDLE is a link; name one, such as bundles/live", setting="follow"
        )
    return target_of_link


def read_links(links: Iterable[Path]) -> dict[Path, Path]:
    """Return where *links* lead now."""
    return {link: follow_link(link) for link in links}


def find_bundles(
    sources: Iterable[str | Path],
    read: ReadNamed,
    projects: Mapping[str, str] | None = None,
) -> dict[str, Bundle]:
    """Find the bundles of *sources*, each `PATH` or `NAME=PATH`, by name; *read* reads each, once.

    For a folder, the log gets a line about each project, a warning if a bundle cannot be
    served. *projects*, if given, are those that the server serves now, by name. A bundle that a
    source names must have the same project, because clients rely on its classes.

    Raises `BundleError` for a path without a bundle. Raises `ConfigError` for different bundles
    with one name, and for a bundle of another project.
    """
    bundles: dict[str, Bundle] = {}
    for chosen_name, source in map(_parse_source, sources):
        # A link is followed once: manifest and files are then those of one bundle, even if it moves.
        path = follow_link(source)
        _warn_if_not_live(source, path)

        # In a folder of bundles, each project is a name.
        if not chosen_name and path.is_dir() and not has_manifest(path):
            for bundle in _read_served(path, read):
                _add(bundles, bundle.manifest.project, bundle)
            continue

        manifest = read_manifest(path)
        name = chosen_name or manifest.project
        if projects is not None and projects.get(name) != manifest.project:
            present = projects.get(chosen_name, ", ".join(projects))
            raise ConfigError(
                f"{source}: leads to {manifest.name}, of another project than the served {present}; "
                "start the server again to serve it"
            )

        # A bundle may come twice, as by `bundles/*` with the link `latest`, and is read once.
        if name not in bundles or not bundles[name].manifest.has_content_of(manifest):
            _add(bundles, name, read(name, path, manifest))
    return bundles


def _warn_if_not_live(source: Path, bundle: Path) -> None:
    """Log a warning if *source* is the link `latest` to a *bundle*, and others beside it are live."""
    if source.name != LATEST or not source.is_symlink():
        return
    live = read_live(source.parent).live
    if live and os.path.realpath(bundle) not in live:
        log.warning("%s: leads to the newest bundle, %s, which is not live", source, bundle)


def _read_served(folder: Path, read: ReadNamed) -> list[Bundle]:
    """Read the bundles that a *folder* of bundles serves, one of each project; log a line about each.

    Raises `BundleError` if none can be served.
    """

    def read_as_project(path: Path, manifest: Manifest) -> Bundle:
        return read(manifest.project, path, manifest)

    # Each entry has its bundle, if that is served and can be read, else the reason.
    entries = list_bundles(folder, read_as_project)
    if not entries:
        raise BundleError(f"{folder}: {describe_wrong(folder, 'bundle')}")
    if all(entry.why_not_served for entry in entries):
        raise BundleError(f"{folder}: {entries[0].why_not_served}")

    for line, failed in describe_projects(entries):
        log.log(logging.WARNING if failed else logging.INFO, line)
    return [entry.bundle for entry in entries if entry.bundle is not None]


def _add(bundles: dict[str, Bundle], name: str, bundle: Bundle) -> None:
    """Add *bundle* under *name*; raises `ConfigError` if *bundles* has another one with this name."""
    other = bundles.setdefault(name, bundle)
    if not other.manifest.has_content_of(bundle.manifest):
        raise ConfigError(
            f"{bundle.path}: the name {name} is already used by {other.path}; "
            f"choose another one: NAME={bundle.path}"
        )
