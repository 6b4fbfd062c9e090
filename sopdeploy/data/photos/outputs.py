"""Bundles and runs beside photographs: which subfolders are some, and where new ones may be written."""

import os
from pathlib import Path

from sopdeploy.base.files import expand_user, has_manifest, holds_output
from sopdeploy.data.photos.files import holds_images, is_folder, list_folder, list_subfolders
from sopdeploy.data.photos.parts import part_kind
from sopdeploy.errors import ConfigError


def list_outputs(folder: Path) -> list[str]:
    """List the subfolders of *folder* that are bundles or runs, or hold some; raises `DataError`."""
    return [
        entry.name
        for entry in list_folder(folder)
        if is_folder(entry) and holds_output(folder / entry.name)
    ]


def check_takes_output(folder: Path, setting: str | None, images: Path | None = None) -> None:
    """Raise `ConfigError` if *folder*, where bundles or runs are to be written, is a bundle or has photographs.

    It has photographs if it is the folder *images* or below it, or if it holds images or class
    folders of images. A folder that already holds bundles or runs is not searched for these.
    *setting* names *folder* unless it is an argument.
    """
    if has_manifest(folder):
        raise ConfigError(f"{folder} is a bundle; choose another folder", setting=setting)

    advice = "choose a folder outside of them"
    # `realpath`, because `resolve` raises an error for a link that leads to itself.
    real_folder = Path(os.path.realpath(folder))
    if images is not None and real_folder.is_relative_to(os.path.realpath(expand_user(images))):
        raise ConfigError(
            f"{folder} is inside the photos of {images}; {advice}", setting=setting
        )

    waiting = [folder] if folder.is_dir() and not holds_output(folder) else []
    while waiting:
        inner = waiting.pop()
        if holds_images(inner):
            raise ConfigError(f"{folder} holds photos; {advice}", setting=setting)
        # Search its class folders, and those in train/ and val/.
        if inner == folder or part_kind(inner.name):
            waiting += [inner / name for name in list_subfolders(inner)]
