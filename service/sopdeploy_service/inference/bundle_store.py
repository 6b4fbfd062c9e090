"""The bundles that a server serves.

A source is a bundle, a folder of bundles (`sopdeploy.bundle.folder` says which of them are
served), or `NAME=BUNDLE`. Clients use NAME or, without it, the name of the project.
"""

import logging
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeAlias

from sopdeploy.bundle.folder import (
    Bundle,
    describe_no_bundle,
    describe_projects,
    follow_link,
    list_bundles,
    note_meaning,
    read_manifest,
)
from sopdeploy.bundle.manifest import Manifest
from sopdeploy.errors import BundleError, ConfigError
from sopdeploy.files import has_manifest

# Name in the server, folder, its manifest
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
    served. Raises `BundleError` for a path without a bundle and `ConfigError` for different
    bundles with one name, and for a source that is one bundle whose project is not the one that
    *projects*, if given, has for its name: clients of the server rely on the classes.
    """
    bundles: dict[str, Bundle] = {}
    for given_name, source in map(_parse_source, sources):
        # Every process then serves the same bundle, even if the link changes.
        path = note_meaning(source)
        is_folder_of_bundles = not given_name and path.is_dir() and not has_manifest(path)

        # A folder of bundles: each project has its name, and the log tells which are served.
        if is_folder_of_bundles:
            listed = list_bundles(
                path, lambda folder, manifest: read(manifest.project, folder, manifest)
            )

            # None is served, or none is here
            if all(bundle.why_not_served for bundle in listed):
                reason = listed[0].why_not_served if listed else describe_no_bundle(path)
                raise BundleError(f"{path}: {reason}")

            for line, failed in describe_projects(listed):
                log.log(logging.WARNING if failed else logging.INFO, line)

            served = [bundle.bundle for bundle in listed if bundle.bundle is not None]
            found = [(bundle.manifest.project, bundle) for bundle in served]
        else:
            # One bundle, under its own name or the one of its source.
            manifest = read_manifest(path)
            name = given_name or manifest.project

            if projects is not None and projects.get(name) != manifest.project:
                present = projects.get(given_name, ", ".join(projects))
                raise ConfigError(
                    f"{source}: leads to {manifest.name}, of another project than the served {present}; "
                    "start the server again to serve it"
                )

            # The same bundle may be given twice, as by `bundles/*` with the link `latest`.
            is_known = name in bundles and bundles[name].manifest.has_content_of(manifest)
            found = [(name, bundles[name] if is_known else read(name, path, manifest))]

        # Each name stands for one bundle.
        for name, bundle in found:
            other = bundles.setdefault(name, bundle)
            if not other.manifest.has_content_of(bundle.manifest):
                reason = f"the name {name} is already used by {other.path}"
                raise ConfigError(
                    f"{bundle.path}: {reason}; choose another one: NAME={bundle.path}"
                )
    return bundles
