"""Photographs that have decided about a bundle: the next one may learn from them."""

from pathlib import Path

from sopdeploy.photos.files import (
    HELD_OUT_SUFFIX,
    LABELLED_NAME,
    list_subfolders,
    sampled_name,
)

KEEP_DECIDING = 60  # newest photographs, which decide again (docs/decisions.md)


def train_on_decided(held_out: Path) -> int:
    """Move photographs of a server from *held_out* to the folder that is trained on; return how many.

    The newest `KEEP_DECIDING` stay. `label` puts them into PHOTOS-held-out, and PHOTOS must be
    beside it. Other photographs and folders of other names stay as they are.

    What decides is of the uniform sample, or shows what one of the sample shows. 0.2.0 did not
    say so in the names, and `train` would not count them as typical, so all get a name that does.
    """
    name = held_out.name.removesuffix(HELD_OUT_SUFFIX)
    photos = held_out.with_name(name) if name else held_out
    if photos == held_out or not photos.is_dir():
        return 0

    kept = [
        path
        for label in list_subfolders(held_out)
        for path in (held_out / label).iterdir()
        if LABELLED_NAME.fullmatch(path.name)
    ]
    kept.sort(key=lambda path: path.stat().st_mtime, reverse=True)

    moved = 0
    for path in kept[KEEP_DECIDING:]:
        target = photos / path.parent.name / sampled_name(path)
        if not target.exists():
            target.parent.mkdir(exist_ok=True)
            path.rename(target)
            moved += 1
    return moved
