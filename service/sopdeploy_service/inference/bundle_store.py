"""The bundles a server may serve: those named at its start and their siblings.

A source is a bundle, a folder of bundles (`sopdeploy.bundle.listing` says which of them are served), or
`NAME=BUNDLE`. Clients use NAME or, without it, the name of the project.
"""

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Iterable, Mapping
from pathlib import Path

from sopdeploy.bundle.folder import MANIFEST, Bundle, follow_link, read_manifest
from sopdeploy.bundle.listing import describe_projects, list_bundles, read_bundles
from sopdeploy.errors import BundleError, ConfigError, shorten

FOLLOW_SECONDS = 1.0

log = logging.getLogger("sopdeploy.models")


def _parse_source(source: str | Path) -> tuple[str, Path]:
    """Split *source* into a name, empty if it has none, and a path; raises `ConfigError`."""
    name, equals, text = str(source).partition("=")
    if not equals or Path(source).exists():
        return "", Path(source)
    if re.fullmatch(r"[\w.-]+", name) is None:
        raise ConfigError(f"{source}: a model name may contain only letters, digits, `-`, `_` and `.`")
    return name, Path(text)


def links_among(sources: Iterable[str | Path]) -> dict[Path, Path]:
    """Return where the links among *sources* lead now; raises `ConfigError` if there are none."""
    links = _targets(path for _, path in map(_parse_source, sources) if path.is_symlink())
    if not links:
        raise ConfigError("no BUNDLE is a link; name one, such as bundles/live", setting="follow")
    return links


def _targets(links: Iterable[Path]) -> dict[Path, Path]:
    return {link: follow_link(link) for link in links}


async def moves_of(links: Mapping[Path, Path]) -> AsyncIterator[None]:
    """Yield whenever one of *links* leads elsewhere than before, which is checked each second."""
    while True:
        await asyncio.sleep(FOLLOW_SECONDS)
        try:
            found = await asyncio.to_thread(_targets, links)
        except OSError:  # the folder cannot be read now
            continue
        if found != links:
            links = found
            yield


class BundleStore:
    """The bundles by name, and the folders that may hold later versions.

    `checked` has those bundles whose files were already compared with their hashes.
    """

    def __init__(self, sources: Iterable[str | Path]) -> None:
        """Find the bundles of *sources*, each `PATH` or `NAME=PATH`.

        For a folder, the log gets a line about each project, a warning if a bundle cannot be served.
        Raises `BundleError` for a path without a bundle and `ConfigError` for two bundles with one name.
        """
        self.bundles: dict[str, Path] = {}
        self.checked: dict[Path, Bundle] = {}
        self._folders: list[Path] = []
        for name, source in map(_parse_source, sources):
            path = follow_link(source)  # every process must serve the same bundle
            if name or not path.is_dir() or (path / MANIFEST).is_file():
                self._folders.append(path.resolve().parent)
                self._add(name or read_manifest(path).project, path)
            else:
                self._folders.append(path)
                self._add_folder(path)

    def _add_folder(self, folder: Path) -> None:
        listed = list_bundles(folder)
        if all(one.reason for one in listed):
            reason = "no bundle here or in a folder directly below; give the folder with a manifest.json"
            raise BundleError(f"{folder}: {listed[0].reason if listed else reason}")
        for line, failed in describe_projects(listed):
            log.log(logging.WARNING if failed else logging.INFO, line)
        for one in listed:
            if one.checked is not None:
                self._add(one.checked.manifest.project, one.path)
                self.checked[one.path] = one.checked

    def _add(self, name: str, bundle: Path) -> None:
        if name in self.bundles:
            raise ConfigError(
                f"{bundle}: the name {name} is already used by {self.bundles[name]}; "
                f"choose another one: NAME={bundle}"
            )
        self.bundles[name] = bundle

    def find(self, name: str, folder: str | None = None, *, serving: str | None = None) -> Path:
        """Find the bundle to load as *name*: the one in *folder*, or the only one that is not served yet.

        *folder* is a plain name, which is looked up in the folders of the sources; *serving* is the id of the
        bundle that is served now. Raises `BundleError` if no bundle, or more than one, matches.
        """
        candidates = [one for parent in dict.fromkeys(self._folders) for one in read_bundles(parent)]
        if folder is not None:
            # Names are compared, never joined to a path, so that none can leave the folders.
            matches = [one.path for one in candidates if one.path.name == folder][:1]
            name = repr(folder[:100])
        else:
            matches = [
                path
                for path, manifest, *_ in candidates
                if manifest is not None and manifest.project == name and manifest.id != serving
            ]
        if not matches and folder is None and serving is not None:
            raise BundleError(f"{name}: there is no bundle but the one being served; name another folder")
        if not matches:
            raise BundleError(f"{name}: no bundle of this name in the server's bundle folders")
        if len(matches) > 1:
            names = shorten([path.name for path in matches])
            raise BundleError(f"{name}: several bundles have this name ({names}); name the folder")
        return matches[0]
