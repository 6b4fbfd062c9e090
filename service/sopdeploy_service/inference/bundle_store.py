"""The bundles a server may serve: those named at its start, and those beside them in the same folders.

A path is a bundle, or a folder of bundles. A bundle's name for clients is what stands before `=` in
`NAME=PATH`, else the name of its network; in a folder of bundles it is the name of the bundle's own
folder where somebody chose one.
"""

from collections.abc import Iterable
from pathlib import Path

from sopdeploy.bundle.folder import MANIFEST, read_manifest
from sopdeploy.errors import BundleError, ConfigError


class BundleStore:
    """The bundles by name, and the folders in which a later version may be found."""

    def __init__(self, sources: Iterable[str | Path]) -> None:
        """Look at every one of *sources*, `PATH` or `NAME=PATH`.

        Raises `BundleError` where there is no bundle and `ConfigError` where two have one name.
        """
        self.bundles: dict[str, Path] = {}
        self._folders: list[Path] = []
        for source in sources:
            self._add(*split(str(source)))

    def find(self, name: str, folder: str | None = None, *, serving: str | None = None) -> Path:
        """Return the bundle to load under *name*: the one in *folder*, or the only new one of that name.

        *folder* is a plain name, looked up where the bundles of the start lie; *serving* is the id that is
        served now. Raises `BundleError` where no bundle, or more than one, is meant.
        """
        if folder is not None:
            return self._named(folder)
        found = [
            path
            for path in self._all()
            if name in {name_of(path), network_of(path)} and id_of(path) != serving
        ]
        if not found and serving is not None:
            raise BundleError(
                f"{name}: no bundle other than the one that is served; name another one's folder"
            )
        if not found:
            raise BundleError(f"{name}: no bundle of this name lies where the server's bundles lie")
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise BundleError(f"{name}: several bundles have this name ({names}); name the folder")
        return found[0]

    def _named(self, folder: str) -> Path:
        for path in self._all():
            if path.name == folder:  # compared, never joined: no name leads out of the folders
                return path
        raise BundleError(f"{folder[:100]!r}: no bundle of this name lies where the server's bundles lie")

    def _all(self) -> list[Path]:
        return sorted({path for folder in self._folders for path in bundles_in(folder)})

    def _add(self, name: str | None, path: Path) -> None:
        single = not path.is_dir() or (path / MANIFEST).is_file() or name is not None
        found = [path] if single else bundles_in(path)
        if not found:
            raise BundleError(f"{path}: no bundle here, nor in a folder below it")
        self._folders.append(path.resolve().parent if single else path)
        for bundle in found:
            known = name or (network_of(bundle) if single else name_of(bundle))
            if known in self.bundles:
                raise ConfigError(
                    f"{bundle}: a bundle named {known} is there already ({self.bundles[known]}); "
                    f"give them names: NAME={bundle}"
                )
            self.bundles[known] = bundle


def split(source: str) -> tuple[str | None, Path]:
    """Return the name, where there is one, and the path of `NAME=PATH`."""
    name, equals, path = source.partition("=")
    if not equals or Path(source).exists():
        return None, Path(source)
    if not name or not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
        raise ConfigError(f"{source}: a model's name has letters, digits, `-`, `_` and `.` only")
    return name, Path(path)


def bundles_in(folder: Path) -> list[Path]:
    """Return the bundles directly in *folder*, sorted; hidden folders are bundles still being written."""
    try:
        entries = sorted(folder.iterdir())
    except OSError as problem:
        raise BundleError(f"{folder}: cannot be read ({problem.strerror})") from problem
    return [path for path in entries if not path.name.startswith(".") and (path / MANIFEST).is_file()]


def name_of(bundle: Path) -> str:
    """Return the name of *bundle* in a folder of bundles."""
    folder = bundle.resolve().name
    return network_of(bundle) if folder == read_manifest(bundle).name else folder


def network_of(bundle: Path) -> str:
    """Return the name of the network in *bundle*, fit for a URL."""
    return read_manifest(bundle).model.replace(":", "-")


def id_of(bundle: Path) -> str:
    """Return the id of *bundle*."""
    return read_manifest(bundle).id
