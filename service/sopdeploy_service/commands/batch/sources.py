"""List the images of the sources of `sopdeploy classify`, in an order that does not change between runs.

A source is a folder, a pattern such as `photos/**/*.jpg`, an image, a tar archive, a parquet file, a list of
paths (`.txt`), or the URL of any of them in an object store. Folders are walked one by one, so that a list of
any length needs little memory. Order: sources as given, names sorted in a folder, members and rows as stored.
"""

import glob
import io
import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from sopdeploy.bundle.folder import is_bundle
from sopdeploy.data.folders import is_hidden, is_image, walk
from sopdeploy.errors import DataError
from sopdeploy.files import expand_user
from sopdeploy.images.limits import SUFFIXES
from sopdeploy_service.commands.batch.parquet import ParquetImages
from sopdeploy_service.commands.batch.reader import (
    UNKNOWN,
    ListedImage,
    is_parquet,
    is_url,
    open_location,
    open_store,
)

LIST, TAR = ".txt", ".tar"
COMPRESSED = (".tar.gz", ".tgz", ".tar.xz")
PATTERN = "*?["


def list_entries(sources: Sequence[str]) -> Iterator[ListedImage]:
    """Yield the images of *sources*.

    Raises `DataError` for a source that does not exist, is damaged or has no images.
    """
    if not sources or "" in sources:
        raise DataError("no source, or an empty one; name a folder, or . for this one")
    for source in sources:
        empty = True
        try:
            for entry in _list_source(source):
                empty = False
                yield entry
        except OSError as error:
            raise DataError(f"{source}: cannot be read ({error.strerror}); check its permissions") from error
        if empty:
            suffixes = ", ".join(SUFFIXES)
            raise DataError(
                f"{source}: has no images ({suffixes}); name archives or parquet files in it, if any"
            )


def _list_source(source: str) -> Iterator[ListedImage]:
    if is_url(source):
        yield from _list_url(source)
        return
    path = expand_user(source)
    if is_bundle(path):
        raise DataError(f"{source}: a bundle, not images; name one bundle, then folders or files of images")
    if path.is_dir():
        yield from (_file_entry(file) for file in walk(path) if is_image(file.name))
    elif path.exists():
        yield from _list_file(_file_entry(path))
    elif any(sign in source for sign in PATTERN):
        names = glob.glob(str(path), recursive=True)  # noqa: PTH207 - pathlib takes no absolute patterns
        for file in map(Path, sorted(names)):
            if not file.is_dir():
                yield from _list_file(_file_entry(file))
    else:
        raise DataError(f"{source}: not found; name a folder, a pattern, images, archives or lists of paths")


def _file_entry(path: Path) -> ListedImage:
    """Describe an image file; a missing file gets an error row later."""
    try:
        size = path.stat().st_size
    except (OSError, ValueError):  # a name of a list may have null bytes
        size = UNKNOWN
    return ListedImage(str(path), str(path.absolute()), size=size)


def _list_file(file: ListedImage) -> Iterator[ListedImage]:
    """Yield the images in *file*: an archive, a parquet file, a list or an image, by its name."""
    if file.location.lower().endswith(TAR):
        yield from _list_tar(file.path, file.location)
    elif is_parquet(file.location):
        yield from _list_parquet(file.path, file.location)
    elif file.location.lower().endswith(COMPRESSED):
        raise DataError(f"{file.path}: is compressed; unpack it, or pack it as an uncompressed .tar")
    elif file.location.lower().endswith(LIST):
        yield from _list_lines(file.path)
    else:
        yield file


def _list_url(url: str) -> Iterator[ListedImage]:
    """Yield the images at *url*: below a folder, of a pattern, or in one object."""
    store, path = open_store(url)
    try:
        if any(sign in path for sign in PATTERN):
            for name, facts in sorted(store.glob(path, detail=True).items()):
                if facts["type"] == "file":
                    yield from _list_file(_object_entry(store.unstrip_protocol(name), facts))
        elif store.isfile(path):
            yield from _list_file(_object_entry(url, store.info(path)))
        else:
            yield from _walk_url(store, path)
    except FileNotFoundError as error:
        raise DataError(f"{url}: not found; check the name and the credentials") from error
    except DataError:
        raise
    except Exception as error:  # every store raises types of its own
        reason = " ".join(str(error).split())
        raise DataError(
            f"{url}: cannot be listed ({type(error).__name__}: {reason})"
            "; check the address and the credentials"
        ) from error


def _walk_url(store: Any, folder: str) -> Iterator[ListedImage]:
    """Yield the images below *folder* of *store*, without hidden ones, the files of a folder first."""
    for _, folders, files in store.walk(folder, detail=True, on_error="raise"):
        for name in sorted(folders):  # `walk` visits them in the order of this dict
            facts = folders.pop(name)
            if not is_hidden(name):
                folders[name] = facts
        for name in sorted(filter(is_image, files)):
            yield _object_entry(store.unstrip_protocol(files[name]["name"]), files[name])


def _object_entry(url: str, facts: Any) -> ListedImage:
    """Describe the object *url* of a store."""
    size = facts.get("size")
    return ListedImage(url, url, size=UNKNOWN if size is None else int(size))


def _list_tar(name: str, location: str) -> Iterator[ListedImage]:
    """Yield the images of the tar archive *location* as if it were a folder with this *name*."""
    archive: Any  # its list of members is not part of the typed interface
    try:
        with open_location(location) as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:") as archive:
                while (member := archive.next()) is not None:
                    archive.members.clear()  # tarfile would keep all members in memory
                    parts = [part for part in PurePosixPath(member.name).parts if part != "/"]
                    if not parts or any(map(is_hidden, parts)) or not is_image(parts[-1]):
                        continue
                    if member.islnk():
                        raise DataError(f"{member.name} is a hard link; pack with `tar --hard-dereference`")
                    if not member.isreg() or member.sparse is not None:
                        continue
                    if member.offset_data + member.size > end:
                        raise DataError(f"{member.name} is truncated; copy the archive again")
                    yield ListedImage("/".join((name, *parts)), location, member.offset_data, member.size)
    except DataError as error:
        raise DataError(f"{name}: {error}") from error
    except (tarfile.TarError, OSError, ValueError, EOFError, RecursionError) as error:
        reason = f"damaged or not a tar file ({error}); copy or unpack it again"
        raise DataError(f"{name}: {reason}") from error


def _list_parquet(name: str, location: str) -> Iterator[ListedImage]:
    """Yield the rows of the parquet file *location*, whose metadata alone are read."""
    try:
        with open_location(location) as file:
            for row, size in enumerate(ParquetImages(file).sizes()):
                yield ListedImage(f"{name}/{row}", location, row, size)
    except (OSError, ValueError, MemoryError) as error:  # pyarrow's own error is a ValueError
        reason = " ".join(str(error).split())
        raise DataError(f"{name}: no parquet file with images ({reason}); write it again") from error


def _list_lines(location: str) -> Iterator[ListedImage]:
    """Yield the images that the text file *location* lists, one path or URL per line.

    Paths are relative to the folder of the list.
    """
    file = io.BufferedReader(open_location(location))
    with io.TextIOWrapper(file, "utf-8-sig", "surrogateescape") as lines:
        for name in filter(None, map(str.strip, lines)):
            if is_url(name):
                yield ListedImage(name, name)
            elif is_url(location):
                url = f"{location.rpartition('/')[0]}/{name}"
                yield ListedImage(url, url)
            else:
                yield _file_entry(Path(location).parent / name)
