"""Photographs that have decided about a bundle: the next one may learn from them."""

from pathlib import Path

from sopdeploy.photos.files import HELD_OUT_SUFFIX, KEPT_NAME, list_subfolders


def train_on_decided(held_out: Path) -> int:
    """Move the photographs of a server from *held_out* to the folder that is trained on; return how many.

    `label` puts them into PHOTOS-held-out, so that they decide about one bundle. PHOTOS must be
    beside it. Other photographs and folders of other names stay as they are.
    """
    name = held_out.name.removesuffix(HELD_OUT_SUFFIX)
    photos = held_out.with_name(name) if name else held_out
    if photos == held_out or not photos.is_dir():
        return 0

    moved = 0
    for label in list_subfolders(held_out):
        for path in sorted((held_out / label).iterdir()):
            target = photos / label / path.name
            if KEPT_NAME.fullmatch(path.name) and not target.exists():
                target.parent.mkdir(exist_ok=True)
                path.rename(target)
                moved += 1
    return moved
