"""List and read the images of `sopdeploy classify`: in folders, tar archives and lists of paths (`.txt`).

A source is a path or an address that fsspec opens, such as `s3://bucket/photos`. Order: sources
as given, names sorted in a folder, members of archives and lines of lists as stored.
"""

import io
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, cast

from sopdeploy.base.environment import import_optional, missing_store_error
from sopdeploy.base.files import open_regular, read_at_most
from sopdeploy.data.photos.files import is_hidden, walk
from sopdeploy.errors import DataError, ImageError, MissingPackageError, SopdeployError
from sopdeploy.images.limits import describe_formats
from sopdeploy.images.signatures import (
    HEAD_BYTES,
    counts_as_image,
    is_image,
    read_head,
    suffix_of,
)
from sopdeploy.paths import describe_wrong, is_output

_TAR_SUFFIX = ".tar"
_LIST_SUFFIX = ".txt"
MAX_HEADER_BYTES = 1 << 20  # of an entry of an archive, such as a long name
MAX_LINE = 65_536  # characters of a list
# Objects of a store, with the same suffix, that may turn out to be no images by their first bytes
MAX_OPENED = 100
MAX_REASON = 500  # characters of an error of a store
UNKNOWN = -1  # size of an image that is not known before it is read


class ListedImage(NamedTuple):
    """One image of a list.

    *path* is its name in the output, *location* the address or the absolute path of the file
    with its bytes, which may be an archive. *offset* is its position there, otherwise 0. *size*
    is in bytes, or `UNKNOWN`.
    """

    path: str
    location: str
    offset: int = 0
    size: int = UNKNOWN


def list_sources(
    sources: Sequence[str], skipped: Counter[str] | None = None
) -> Iterator[ListedImage]:
    """Yield the images of *sources*; raise `DataError` for one that is missing, damaged or has no images.

    *skipped* counts the other visible files of folders and archives, by suffix. Raises
    `MissingPackageError` for an address whose client is not installed.
    """
    skipped = Counter() if skipped is None else skipped
    if not sources or "" in sources:
        raise DataError("no source, or an empty one; name a folder, or . for this one")

    for source in sources:
        empty = True
        with _naming(source):
            for image in _list_source(source, skipped):
                empty = False
                image.location.encode()  # raises an error for bytes that are not UTF-8
                yield image

        if empty:
            raise DataError(
                f"{source}: has no images ({describe_formats()}); name archives in it, if any"
            )


def read_listed(image: ListedImage, limit: int) -> bytes:
    """Read *image*, at most *limit* bytes; raise `ImageError` with the code `unusable_data` if that fails."""
    size = limit if image.size == UNKNOWN else min(limit, image.size)

    try:
        if _is_address(image.location):
            store, path = _open_store(image.location)
            return bytes(store.cat_file(path, image.offset, image.offset + size))
        with open_regular(image.location, buffering=0) as file:
            file.seek(image.offset)
            return read_at_most(file, size)
    except SopdeployError:
        raise
    except ImportError as error:
        raise missing_store_error(image.location, error) from error
    except Exception as error:  # every store raises types of its own
        problem = f"cannot be read ({_reason(error, image.location)})"
        raise ImageError(problem, code="unusable_data", status=422) from error


@contextmanager
def _naming(source: str) -> Iterator[None]:
    """Raise errors of other packages as a `DataError` or `MissingPackageError` that names *source*."""
    try:
        yield
    except SopdeployError:
        raise
    except ImportError as error:
        raise missing_store_error(source, error) from error
    except Exception as error:  # every store raises types of its own
        message = f"cannot be listed ({_reason(error, source)}); check the name, the file and the credentials"
        raise DataError(f"{source}: {message}") from error


def _list_source(source: str, skipped: Counter[str]) -> Iterator[ListedImage]:
    """Yield the images of *source*: an archive, a list, an address, a folder or a file; else `DataError`."""
    # Archives and lists, here or in a store, by their suffix; then the rest of a store.
    if source.lower().endswith(_TAR_SUFFIX):
        yield from _list_tar(source, skipped)
        return
    if source.lower().endswith(_LIST_SUFFIX):
        yield from _list_lines(source, skipped)
        return
    if _is_address(source):
        yield from _list_store(source, skipped)
        return

    # Otherwise what the file system has at the path.
    path = Path(source)
    if is_output(path):
        advice = "name one bundle, then folders or files of images"
        raise DataError(f"{source}: {describe_wrong(path, 'photographs', advice)}")
    if path.is_dir():
        for file in walk(path):
            if _is_used(file.name, skipped, partial(read_head, file)):
                yield _describe_file(str(file))
    elif path.exists() and is_image(path):
        yield _describe_file(source)
    else:
        advice = "name a folder, an uncompressed .tar or a list (.txt)"
        problem = "no image" if path.exists() else "not found"
        raise DataError(f"{source}: {problem}; {advice}")


def _list_store(address: str, skipped: Counter[str]) -> Iterator[ListedImage]:
    """Yield the images at or below *address* by name, without hidden ones, as `walk` does for a folder."""
    store, root = _open_store(address)

    for name, metadata in sorted(store.find(root, detail=True).items()):
        if any(map(is_hidden, name.removeprefix(root).split("/"))):
            continue

        # Some stores report 0 or None if they do not know the size.
        size = metadata.get("size") or UNKNOWN
        if _is_used(name, skipped, partial(_read_object_head, store, name, skipped)):
            location = store.unstrip_protocol(name)
            yield ListedImage(path=location, location=location, size=size)


def _is_used(name: str, skipped: Counter[str], read: Callable[[], bytes]) -> bool:
    """Check whether the visible file *name*, whose first bytes *read* reads, is an image; else count it."""
    if counts_as_image(name, read):
        return True
    skipped[suffix_of(name)] += 1
    return False


def _read_object_head(store: Any, name: str, skipped: Counter[str]) -> bytes:
    """Read the first bytes of an object; none, if `MAX_OPENED` objects with its suffix were not images."""
    return (
        b""
        if skipped[suffix_of(name)] >= MAX_OPENED
        else bytes(store.cat_file(name, 0, HEAD_BYTES))
    )


def _describe_file(path: str) -> ListedImage:
    """Look up size and location of the image file *path*; a missing one is not an error yet."""
    size = UNKNOWN
    # The file may not exist, and a line of a list may have null bytes.
    with suppress(OSError, ValueError):
        size = os.stat(path).st_size  # noqa: PTH116 - `Path` would change the text of a line
    return ListedImage(path=path, location=os.path.abspath(path), size=size)  # noqa: PTH100


def _list_tar(name: str, skipped: Counter[str]) -> Iterator[ListedImage]:
    """Yield the images of the archive *name* as if it were a folder with this name.

    Symbolic links and files with holes are left out. Raises `DataError` for hard links.
    """
    location = name if _is_address(name) else os.path.abspath(name)  # noqa: PTH100

    archive: Any  # its list of members is not part of the typed interface
    with (
        _open_for_reading(name) as file,
        tarfile.open(
            fileobj=cast(Any, _BoundedReads(file)), mode="r:", errors="replace"
        ) as archive,
    ):
        while (member := archive.next()) is not None:
            archive.members.clear()  # tarfile would keep all members in memory
            # A damaged entry leads back to an earlier one; tarfile would read the same ones without
            # an end.
            if archive.offset <= member.offset:
                raise ValueError(f"an entry of {member.size} bytes")

            parts = [part for part in PurePosixPath(member.name).parts if part != "/"]

            # Folders, hidden entries and files of other formats are passed over. Links and files
            # with holes do not have their bytes in one place; their names decide.
            if not parts or any(map(is_hidden, parts)) or member.isdir():
                continue
            is_whole = member.isreg() and member.sparse is None
            read_head_of = partial(_read_member_head, file, member if is_whole else None)
            if not _is_used(parts[-1], skipped, read_head_of):
                continue
            if member.islnk():
                raise DataError(
                    f"{name}: {member.name} is a hard link; pack with `tar --hard-dereference`"
                )

            if is_whole:
                path = "/".join((name, *parts))
                yield ListedImage(path, location, offset=member.offset_data, size=member.size)


def _read_member_head(file: Any, member: tarfile.TarInfo | None) -> bytes:
    """Read the first bytes of *member* of the archive *file*, none without one; tarfile seeks the next one itself."""
    if member is None:
        return b""
    file.seek(member.offset_data)
    return bytes(file.read(min(member.size, HEAD_BYTES)))


def _list_lines(location: str, skipped: Counter[str]) -> Iterator[ListedImage]:
    """Yield the images of the list *location*: one image or archive per line, relative to its folder."""
    folder = location[: location.rfind("/") + 1]  # "lists/" of "lists/a.txt", "/" of "/a.txt"
    with io.TextIOWrapper(_open_for_reading(location), "utf-8-sig") as lines:
        while line := lines.readline(MAX_LINE):
            if len(line) == MAX_LINE:
                raise ValueError(
                    f"a line of {MAX_LINE} characters or more; give one name per line"
                )

            line = line.strip()
            if not line:
                continue
            name = line if _is_address(line) else os.path.join(folder, line)  # noqa: PTH118

            if name.lower().endswith(_TAR_SUFFIX):
                with _naming(name):  # the archive, not the list
                    yield from _list_tar(name, skipped)
            elif _is_address(name):
                yield ListedImage(name, name)
            else:
                yield _describe_file(name)


class _BoundedReads:
    """A file in which `tarfile` reads at most `MAX_HEADER_BYTES` at once, such as a long name."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.seek = file.seek
        self.tell = file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise ValueError(f"a header of {size} bytes; the limit is {MAX_HEADER_BYTES}")
        content: bytes = self._file.read(size)
        return content


def _open_for_reading(location: str) -> Any:
    """Open a regular file or an object for reading."""
    if not _is_address(location):
        return open_regular(location)
    store, path = _open_store(location)
    return store.open(path, "rb")


def _open_store(address: str) -> tuple[Any, str]:
    """Return the fsspec file system of *address* and the path in it."""
    fsspec = import_optional("fsspec", "fsspec", ".[batch]", MissingPackageError)
    scheme = address.partition("://")[0].rpartition("::")[2]
    if scheme not in fsspec.available_protocols():
        raise ValueError(f"{scheme}:// is not a kind of address that fsspec opens")
    # The clients of other stores read the proxy of the environment by themselves.
    options = {"client_kwargs": {"trust_env": True}} if scheme in {"http", "https"} else {}
    store, path = fsspec.core.url_to_fs(address, **options)
    return store, path


def _is_address(name: str) -> bool:
    return "://" in name


def _reason(error: Exception, source: str) -> str:
    """Describe *error* about *source* in one line, for a store with its type: its text may be only a name."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    line = " ".join(text.split())[:MAX_REASON]
    if _is_address(source) and not isinstance(error, ValueError | tarfile.TarError):
        return f"{type(error).__name__}: {line}"
    return line or type(error).__name__
