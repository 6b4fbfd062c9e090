"""Photographs that have a label, of this session or an earlier one, so that a wrong label can be corrected."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from sopdeploy.images.signatures import is_image
from sopdeploy.photos.files import list_folder, name_id

MAX_LABELLED = 200  # photographs that the page lists


class Labelled(NamedTuple):
    """The path of a photograph, and its class `name`; None is "not one of ours"."""

    path: Path
    name: str | None
    is_held_out: bool


def list_labelled(parts: Iterable[tuple[str | None, Path, bool]]) -> dict[str, Labelled]:
    """List the photographs in the folders *parts*, by ID; at most `MAX_LABELLED`, the last label first.

    A part is the name of a class, its folder and whether it is held out. Raises `DataError` for
    a folder that cannot be listed, and `OSError`.
    """
    # The move into the folder has set the time of the change.
    dated: list[tuple[int, Labelled]] = []
    for name, folder, is_held_out in parts:
        entries = list_folder(folder) if folder.is_dir() else ()
        for entry in entries:
            path = folder / entry.name
            if entry.is_file(follow_symlinks=False) and is_image(path):
                changed_at = entry.stat(follow_symlinks=False).st_ctime_ns
                dated.append((changed_at, Labelled(path, name, is_held_out)))

    dated.sort(key=lambda item: (-item[0], item[1].path))
    return {name_id(photo.path): photo for _, photo in dated[:MAX_LABELLED]}
