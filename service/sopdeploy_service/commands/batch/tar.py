"""The images in a tar archive, found without unpacking it."""

import tarfile
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import IO, Any

from sopdeploy.data.folders import is_hidden, is_image
from sopdeploy.errors import DataError

TAR = ".tar"


def list_members(file: IO[bytes], end: int, prefix: str = "") -> Iterator[tuple[str, int, int]]:
    """Yield (name, offset, size) of the images of the archive from the position of *file* to *end*.

    A later member replaces an earlier one of the same name. An archive inside the archive is treated as a
    folder of its name, as in ImageNet's official file. *prefix* is the path of that folder.
    """
    ranges: dict[str, tuple[int, int]] = {}
    archive: Any  # its list of members is not part of the typed interface
    with tarfile.open(fileobj=file, mode="r:") as archive:
        while (member := archive.next()) is not None:
            archive.members.clear()  # tarfile would keep all members in memory
            if member.isreg() and member.offset_data + member.size > end:
                raise DataError(f"{member.name} is truncated; copy the archive again")
            name = _visible_name(prefix + member.name)
            if name is None:
                continue
            if name.endswith(TAR) and member.isreg() and not prefix:
                file.seek(member.offset_data)
                inner_end = member.offset_data + member.size
                yield from list_members(file, inner_end, name.removesuffix(TAR) + "/")
            elif not is_image(PurePosixPath(name).name):
                continue
            elif member.islnk() and (target := _visible_name(prefix + member.linkname)) in ranges:
                ranges[name] = ranges[target]
            elif member.isreg() and member.sparse is None:
                ranges[name] = (member.offset_data, member.size)
    for name, (offset, size) in ranges.items():
        yield name, offset, size


def _visible_name(name: str) -> str | None:
    """Remove `.` and empty parts from *name*; None if a part is hidden (`is_hidden`) or `..`."""
    parts = [part for part in PurePosixPath(name).parts if part not in {"/", "."}]
    if not parts or any(map(is_hidden, parts)):
        return None
    return "/".join(parts)
