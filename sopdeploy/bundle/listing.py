"""The bundles in a folder, and which of them a server of this folder serves.

Of the bundles of one project, the one that was exported last is served; of equal times, the one with the
greater id. The times are those of the exporting machines. Neither the names of the folders nor the link
`latest` have an effect, because copies of a folder may lack or change them.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sopdeploy.bundle.folder import MANIFEST, REQUIRED, open_bundle, read_manifest
from sopdeploy.bundle.manifest import Manifest
from sopdeploy.errors import BundleError
from sopdeploy.project import short_time


@dataclass(frozen=True, kw_only=True, slots=True)
class Listed:
    """A bundle, complete or not; `reason` says why it is not served and is empty for one that is.

    `manifest` is None if it cannot be read.
    """

    path: Path
    manifest: Manifest | None
    reason: str = ""


def read_bundles(folder: Path) -> Iterator[tuple[Path, Manifest | BundleError]]:
    """Yield the path and the manifest, or its error, of every bundle directly in *folder*, by name.

    Hidden folders are incomplete and links to folders in *folder* repeat them; both are left out. A *folder*
    that does not exist has no bundles. Raises `BundleError` if *folder* cannot be read.
    """
    try:
        entries = sorted(folder.iterdir()) if folder.is_dir() else []
    except OSError as error:
        raise BundleError(f"{folder}: cannot be read ({error.strerror}); check its permissions") from error
    for path in entries:
        repeated = path.is_symlink() and path.resolve().parent == folder.resolve()
        try:
            if path.name.startswith(".") or repeated or not path.is_dir():
                continue
            if any((path / name).exists() for name in (MANIFEST, *REQUIRED)):
                yield path, read_manifest(path)
        except BundleError as error:
            yield path, error
        except OSError as error:
            yield path, BundleError(f"{path}: cannot be read ({error.strerror}); check its permissions")


def list_bundles(folder: Path) -> list[Listed]:
    """List the bundles in *folder*; of each project, the last complete bundle is served.

    Reads all manifests, and every file of the bundles that are served. Calls do not depend on earlier ones.
    """
    listed, readable = [], []
    for path, manifest in read_bundles(folder):
        if isinstance(manifest, Manifest):
            readable.append((manifest.exported_at, manifest.id, path.name == manifest.name, path, manifest))
        else:
            listed.append(Listed(path=path, manifest=None, reason=str(manifest)))
    served: dict[str, Manifest] = {}
    for time, _, _, path, manifest in sorted(readable, key=lambda entry: entry[:4], reverse=True):
        newer, reason = served.get(manifest.project), ""
        if newer is None:
            try:
                open_bundle(path)
                served[manifest.project] = manifest
            except (BundleError, OSError) as error:
                reason = str(error)
        elif newer.id == manifest.id:
            reason = f"a copy of {newer.name}"
        else:
            earlier = "at the same time" if time == newer.exported_at else f"earlier, {short_time(time)}"
            reason = f"exported {earlier}"
        listed.append(Listed(path=path, manifest=manifest, reason=reason))
    return listed


def describe(listed: Iterable[Listed]) -> Iterator[str]:
    """Describe in one line per project which bundle is served, and the others with their reasons."""
    by_project: dict[str, list[Listed]] = {}
    for one in listed:
        by_project.setdefault(one.path.name if one.manifest is None else one.manifest.project, []).append(one)
    for project, bundles in by_project.items():
        texts = [
            f"not {one.path.name}, {one.reason}"
            if one.manifest is None or one.reason
            else f"serves {one.path} (exported {short_time(one.manifest.exported_at)} UTC)"
            for one in bundles
        ]
        yield f"{project}: {'; '.join(sorted(texts, reverse=True))}"
