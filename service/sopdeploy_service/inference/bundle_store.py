"""The bundles a server may serve: those named at its start and their siblings.

A source is a bundle, a folder of bundles, or `NAME=BUNDLE`. Clients use NAME or, without it, the name of the
network. In a folder of bundles, clients use the name of the bundle's folder, or the name of the network if
the folder has its default name. Of several bundles of one network there, the one is served to which the link
`latest` leads.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from sopdeploy.bundle.folder import MANIFEST, follow_link, read_manifest
from sopdeploy.errors import BundleError, ConfigError, shorten
from sopdeploy.files import LATEST


class BundleStore:
    """The bundles by name, and the folders that may hold later versions."""

    def __init__(self, sources: Iterable[str | Path]) -> None:
        """Find the bundles of *sources*, each `PATH` or `NAME=PATH`.

        Raises `BundleError` for a path without a bundle and `ConfigError` for two bundles with one name.
        """
        self.bundles: dict[str, Path] = {}
        self._folders: list[Path] = []
        for source in map(str, sources):
            name, equals, text = source.partition("=")
            if not equals or Path(source).exists():
                name, text = "", source
            elif re.fullmatch(r"[\w.-]+", name) is None:
                raise ConfigError(
                    f"{source}: a model name may contain only letters, digits, `-`, `_` and `.`"
                )
            path = follow_link(Path(text))  # every process must serve the same bundle
            if name or not path.is_dir() or (path / MANIFEST).is_file():
                self._folders.append(path.resolve().parent)
                self._add(name or _names(path)[0], path)
            else:
                self._folders.append(path)
                for bundle in _served_in(path):
                    self._add(_names(bundle)[1], bundle)

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
        candidates = sorted({path for parent in self._folders for path in _bundles_in(parent)})
        if folder is not None:
            # Names are compared, never joined to a path, so that none can leave the folders.
            matches = [path for path in candidates if path.name == folder][:1]
            name = repr(folder[:100])
        else:
            matches = [
                path for path in candidates if name in _names(path) and read_manifest(path).id != serving
            ]
        if not matches and folder is None and serving is not None:
            raise BundleError(f"{name}: there is no bundle but the one being served; name another folder")
        if not matches:
            raise BundleError(f"{name}: no bundle of this name in the server's bundle folders")
        if len(matches) > 1:
            names = shorten([path.name for path in matches])
            raise BundleError(f"{name}: several bundles have this name ({names}); name the folder")
        return matches[0]


def _served_in(folder: Path) -> list[Path]:
    """List the bundles in *folder*; of those with one name, only that to which the link `latest` leads."""
    bundles, link = _bundles_in(folder), folder / LATEST
    if not bundles:
        raise BundleError(
            f"{folder}: no bundle here or in a folder directly below; give the folder with a manifest.json"
        )
    newest = folder / link.readlink().name if link.is_symlink() else None
    if newest not in bundles:
        return bundles
    name = _names(newest)[1]
    return [bundle for bundle in bundles if bundle == newest or _names(bundle)[1] != name]


def _bundles_in(folder: Path) -> list[Path]:
    """List the bundles directly in *folder*, without the link `latest`; hidden ones are incomplete."""
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise BundleError(f"{folder}: cannot be read ({error.strerror}); check its permissions") from error
    return [
        path
        for path in entries
        if not path.name.startswith(".")
        and (path / MANIFEST).is_file()
        and not (path.name == LATEST and path.is_symlink())
    ]


def _names(bundle: Path) -> tuple[str, str]:
    """Return two names of *bundle* for clients: of its network, fit for a URL, and of its folder.

    For a folder with its default name, both are the name of the network.
    """
    manifest, folder = read_manifest(bundle), bundle.resolve().name
    network = manifest.model.replace(":", "-")
    if folder == manifest.name:
        return network, network
    return network, folder
