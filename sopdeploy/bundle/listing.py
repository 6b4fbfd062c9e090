"""The bundles in a folder, and which of them a server of this folder serves.

Of the bundles of one project, the one that was exported last is served; of equal times, the one with the
greater id. The times are those of the exporting machines. Neither the names of the folders nor the link
`latest` have an effect, because copies of a folder may lack or change them.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from sopdeploy.bundle.folder import MANIFEST, REQUIRED, Bundle, open_bundle, read_manifest
from sopdeploy.bundle.manifest import Manifest
from sopdeploy.errors import BundleError


class Listed(NamedTuple):
    """A bundle; `reason` says why it is not served, empty if it is. An unreadable `manifest` is None.

    `checked` is the bundle to serve, after a check of all files. `replaced` is true if a later export, or the
    bundle of which this is a copy, is served instead.
    """

    path: Path
    manifest: Manifest | None
    reason: str = ""
    checked: Bundle | None = None
    replaced: bool = False


def read_bundles(folder: Path) -> Iterator[Listed]:
    """Yield every bundle directly in *folder*, by name, with the reason if its manifest cannot be read.

    Hidden folders are incomplete and links to folders in *folder* repeat them; both are left out. A *folder*
    that does not exist has no bundles. Raises `BundleError` if *folder* cannot be read.
    """
    try:
        entries = sorted(folder.iterdir()) if folder.is_dir() else []
    except OSError as error:
        raise BundleError(f"{folder}: cannot be read ({error.strerror}); check its permissions") from error
    for path in entries:
        try:
            repeated = path.is_symlink() and path.resolve().parent == folder.resolve()
            if path.name.startswith(".") or repeated or not path.is_dir():
                continue
            if any((path / name).exists() for name in (MANIFEST, *REQUIRED)):
                yield Listed(path, read_manifest(path))
        except (BundleError, OSError) as error:
            yield Listed(path, None, str(error))


def list_bundles(folder: Path) -> list[Listed]:
    """List the bundles in *folder*; of each project, the last complete bundle is served.

    Reads all manifests, and every file of the bundles that are served. Calls do not depend on earlier ones.
    """
    listed, served = [], dict[str, Manifest]()
    for path, manifest, reason, *_ in sorted(read_bundles(folder), key=_age, reverse=True):
        checked, newer = None, None
        if manifest is not None and (newer := served.get(manifest.project)) is not None:
            reason = f"exported earlier, {manifest.exported_at[:19]}Z"
            if manifest.id == newer.id:
                reason = f"a copy of {newer.name}"
            elif manifest.exported_at == newer.exported_at:
                reason = "exported at the same time"
        elif manifest is not None:
            try:
                checked = open_bundle(path)
                served[manifest.project] = manifest
            except (BundleError, OSError) as error:
                reason = str(error)
        listed.append(Listed(path, manifest, reason, checked, replaced=newer is not None))
    return listed


def _age(bundle: Listed) -> tuple[str, str, bool, Path]:
    """Return the key by which the bundle to serve is the greatest; of copies, one with its own name."""
    path, manifest, *_ = bundle
    return ("", "", False, path) if manifest is None else (
        manifest.exported_at, manifest.id, path.name == manifest.name, path
    )  # fmt: skip


def describe_projects(listed: Iterable[Listed]) -> Iterator[tuple[str, bool]]:
    """Describe in one line per project which bundle is served, and the others with their reasons.

    Also yields whether one of them cannot be served.
    """
    lines: dict[str, list[str]] = {}
    failed = set()
    for path, manifest, reason, _, replaced in listed:
        project = path.name if manifest is None else manifest.project
        texts = lines.setdefault(project, [])
        if reason and not replaced:
            failed.add(project)
        if manifest is None or reason:
            texts.append(f"not {path.name}, {reason}")
        else:
            texts.insert(0, f"serves {path} (exported {manifest.exported_at[:19]}Z)")
    return ((f"{project}: {'; '.join(texts)}", project in failed) for project, texts in lines.items())
