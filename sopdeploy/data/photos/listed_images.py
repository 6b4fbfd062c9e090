"""The images of a folder, found by the names that a table has for them."""

import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from sopdeploy.data.photos.spelling import normalize
from sopdeploy.errors import DataError
from sopdeploy.images.signatures import has_image_suffix, is_image

UPLOADED = re.compile(r"[0-9a-f]{8}-(.+)")  # what Label Studio makes of a name


class ListedImages:
    """The images of the folder *root*, with *paths* in it, that a table lists."""

    def __init__(self, root: Path, paths: list[bytes]) -> None:
        self.root = root
        # File systems encode one name in several ways.
        self.path_in_folder = {normalize(os.fsdecode(path)): path for path in paths}
        self.path_of_name = _index_names(paths)

    def find(self, name: str, where: str) -> tuple[PurePosixPath, bytes | None]:
        """Return the path that *name* is, and the path of the image that it means; None if there is none.

        Raises `DataError`, about the place *where*, unless *name* is a path in the folder, with
        the suffix of an image, or the name of one image.
        """
        has_windows_path = "\\" in name and not (self.root / name).is_file()
        file = PurePosixPath(name.replace("\\", "/") if has_windows_path else name)
        exists = (self.root / file).is_file()
        names_image = has_image_suffix(file.name)
        if exists:
            names_image = is_image(self.root / file)

        is_path_outside = file.is_absolute() or ".." in file.parts
        named_path = find_by_name(name, self.path_of_name)  # None: no image, or several
        is_missing = not exists and normalize(name) not in self.path_of_name
        may_be_id = is_missing and not file.suffix and not (self.root / file).exists()
        if named_path is None and (is_path_outside or not (names_image or may_be_id)):
            raise DataError(
                f"{where}: {name!r} is not the path of an image, relative to the "
                "folder, without .., or the name of one image in it"
            )

        if exists:
            return file, os.fsencode(file)
        # It may be there in another encoding, or elsewhere.
        return file, self.path_in_folder.get(normalize(str(file)), named_path)


def _index_names(image_paths: list[bytes]) -> dict[str, bytes | None]:
    """Map paths and names of images, with and without suffix, to their paths; None if several have the name."""
    path_of_name: dict[str, bytes | None] = {}
    for path in image_paths:
        file = PurePosixPath(normalize(os.fsdecode(path)))
        for name in {file.name, file.stem}:
            path_of_name[name] = None if name in path_of_name else path
    # A path in a folder means one image, even if others have its name.
    in_folders = (path for path in image_paths if b"/" in path)
    return path_of_name | {normalize(os.fsdecode(path)): path for path in in_folders}


def find_by_name(name: str, path_of_name: Mapping[str, bytes | None]) -> bytes | None:
    """Find the one image that *name* means; None if it is none, or several.

    *name* may be the name of a file, a path elsewhere, or an address: Label Studio writes
    `/data/upload/1/0a1b2c3d-photo.jpg` for an uploaded image, and
    `/data/local-files/?d=folder/photo.jpg` for one of a folder. *path_of_name* is the result of
    `_index_names`.
    """
    path = PurePosixPath(unquote(name.rpartition("?d=")[2]).replace("\\", "/"))
    names = [name]
    if ".." not in path.parts and len(path.parts) > 1:
        names.append(path.name)
    if uploaded := UPLOADED.fullmatch(path.name):
        names.append(uploaded[1])
    paths = (path_of_name.get(normalize(each)) for each in names)
    return next((each for each in paths if each is not None), None)
