"""List the bundles of a folder, and say which one of each project is served.

The live one is served, if `promote` has recorded one there (`live`); otherwise the one that was
exported last and was not refused; of equal times, the one with the greater id. The times are
those of the exporting machines. Neither the names of the folders nor the link `latest` have an
effect, because copies of a folder may lack or change them. Does not import torch.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from sopdeploy.base.files import MANIFEST
from sopdeploy.bundle.folder import REQUIRED, Bundle, read_files, read_manifest
from sopdeploy.bundle.live import read_live
from sopdeploy.bundle.manifest import Manifest
from sopdeploy.errors import BundleError


class ListedBundle(NamedTuple):
    """A bundle of a folder of bundles; an unreadable `manifest` is None.

    `why_not_served` is empty for a bundle that is served; then `bundle` has its files.
    `is_replaced` is true if another bundle of the project is served instead, or if `promote` has
    refused this one. `is_live` is true if `promote` has recorded it as live.
    """

    path: Path
    manifest: Manifest | None
    why_not_served: str = ""
    is_replaced: bool = False
    is_live: bool = False
    bundle: Bundle | None = None

    @property
    def is_served(self) -> bool:
        """Whether requests for its project are answered by this bundle."""
        return not self.why_not_served

    @property
    def is_damaged(self) -> bool:
        """Whether its files cannot be read, or are not complete."""
        return not self.is_served and not self.is_replaced

    @property
    def rank(self) -> tuple[str, str, bool, Path]:
        """The key by which the bundle to serve is the greatest; of copies, one with its own name."""
        if self.manifest is None:
            return "", "", False, self.path
        has_own_name = self.path.name == self.manifest.name
        return self.manifest.exported_at, self.manifest.id, has_own_name, self.path


def read_bundles(folder: Path) -> Iterator[ListedBundle]:
    """Yield the bundles directly in *folder*, by name; `why_not_served` says why a manifest cannot be read.

    Hidden folders, which are incomplete, and links to folders in *folder* do not count. Raises
    `BundleError` if *folder* exists but cannot be read.
    """
    try:
        paths = sorted(folder.iterdir()) if folder.is_dir() else []
    except OSError as error:
        raise BundleError(
            f"{folder}: cannot be read ({error.strerror}); check its permissions"
        ) from error

    # Folders, and links to folders elsewhere. A link to a folder here, such as `latest`, is a
    # second name of it.
    for path in paths:
        try:
            is_link_to_sibling = path.is_symlink() and path.resolve().parent == folder.resolve()
            if path.name.startswith(".") or is_link_to_sibling or not path.is_dir():
                continue
            if any((path / name).exists() for name in (MANIFEST, *REQUIRED)):
                yield ListedBundle(path, read_manifest(path))  # raises without a valid manifest
        # A link that leads to itself raises a `RuntimeError`.
        except (BundleError, OSError, RuntimeError) as error:
            yield ListedBundle(path, manifest=None, why_not_served=str(error))


BundleReader = Callable[[Path, Manifest], Bundle]


def list_bundles(folder: Path, read: BundleReader | None = None) -> list[ListedBundle]:
    """List the bundles in *folder*, the last export first, and say which one of each project is served.

    The live bundle of a project is served or, without one, its first complete bundle that was not
    refused; nothing takes the place of a live bundle that is damaged. Every manifest is read once.
    *read* reads all files of the bundles to serve, by default `read_files` without the graph.
    Raises `ConfigError` for a log of promotions that cannot be read, and `BundleError` if
    *folder* cannot be.
    """
    read = read or partial(read_files, with_graph=False)
    live, refused = read_live(folder)
    bundles = sorted(read_bundles(folder), key=lambda bundle: bundle.rank, reverse=True)

    # Of the bundles of a project that were promoted, the last one is live.
    real_paths = [os.path.realpath(bundle.path) for bundle in bundles]
    live_by_project: dict[str, Manifest] = {}
    for real in live:  # the last promoted first
        if real not in real_paths:  # deleted, or in another folder
            continue
        place = real_paths.index(real)
        manifest = bundles[place].manifest
        if manifest is not None and manifest.project not in live_by_project:
            live_by_project[manifest.project] = manifest
            bundles[place] = bundles[place]._replace(is_live=True)

    # Every bundle in order. Without a live one, the first of a project that is complete is served.
    listed = []
    served_by_project = dict(live_by_project)
    for bundle, real in zip(bundles, real_paths, strict=True):
        manifest = bundle.manifest
        if manifest is None:  # `read_bundles` has set `why_not_served`
            listed.append(bundle)
            continue

        reason = ""
        served = served_by_project.get(manifest.project)
        if real in refused:
            reason = "refused by promote"
        elif served is not None and not bundle.is_live:
            reason = _why_not_served(manifest, served)
        if reason:
            listed.append(bundle._replace(why_not_served=reason, is_replaced=True))
            continue

        try:  # it is served if its files are complete
            listed.append(bundle._replace(bundle=read(bundle.path, manifest)))
            served_by_project[manifest.project] = manifest
        except (BundleError, OSError) as error:
            listed.append(bundle._replace(why_not_served=str(error)))
    return listed


def _why_not_served(manifest: Manifest, served: Manifest) -> str:
    """Say why a bundle with *manifest* is not served, but the bundle with the manifest *served*."""
    if manifest.id == served.id:
        return f"a copy of {served.name}"
    if manifest.exported_at == served.exported_at:
        return "exported at the same time"

    if manifest.exported_at > served.exported_at:
        return f"not promoted, {served.name} is live"
    return f"exported earlier, {manifest.exported_at[:19]}Z"


def describe_projects(listed: Iterable[ListedBundle]) -> Iterator[tuple[str, bool]]:
    """Yield a line for each project, the served bundle first, and whether one of its bundles is damaged."""
    texts_by_project: dict[str, list[str]] = {}
    damaged_projects = set()
    for bundle in listed:
        project = bundle.path.name if bundle.manifest is None else bundle.manifest.project
        texts = texts_by_project.setdefault(project, [])
        if bundle.is_served and bundle.manifest is not None:
            state = "live, " if bundle.is_live else ""
            texts.insert(
                0,
                f"serves {bundle.path} ({state}exported {bundle.manifest.exported_at[:19]}Z)",
            )
        else:
            texts.append(f"not {bundle.path.name}, {bundle.why_not_served}")

        if bundle.is_damaged:
            damaged_projects.add(project)

    for project, texts in texts_by_project.items():
        yield f"{project}: {'; '.join(texts)}", project in damaged_projects
