"""Lists of images: kinds of sources, their order, and their errors."""

import io
import os
import tarfile
from pathlib import Path

import fsspec
import pytest

from sopdeploy.errors import DataError, ImageError
from sopdeploy_service.commands.batch.listing import Listing, write_list
from sopdeploy_service.commands.batch.reader import ListedImage, Reader
from sopdeploy_service.commands.batch.sources import list_entries

BODIES = {"b/2.jpg": b"two", "a.png": b"one", "b/c/3.JPEG": b"three", "z.gif": b"four"}
MEMORY = "memory://sources"


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """The same four images as a folder, archives, lists, and in an object store."""
    folder = tmp_path / "folder"
    store = fsspec.filesystem("memory")
    for name, body in BODIES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(body)
        store.pipe(f"/sources/{name}", body)
    for name in (".hidden.jpg", "notes.md", ".b/4.jpg"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"no")
    (folder / "loop").symlink_to(folder)
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for inside, body in {**BODIES, "notes.md": b"no"}.items():
            member = tarfile.TarInfo(inside)
            member.size = len(body)
            archive.addfile(member, io.BytesIO(body))
    (tmp_path / "list.txt").write_text("".join(f"folder/{name}\n\n" for name in BODIES))
    windows = "\r\n".join(f"folder/{name}" for name in BODIES)
    (tmp_path / "windows.txt").write_text(windows, encoding="utf-8-sig", newline="")
    store.pipe("/sources/shards/x.tar", (tmp_path / "x.tar").read_bytes())
    yield tmp_path
    store.rm("/sources", recursive=True)


SORTED, STORED = ["a.png", "b/2.jpg", "b/c/3.JPEG", "z.gif"], list(BODIES)
LISTS = {  # source: (prefix of the names, names)
    "folder": ("folder/", SORTED),
    "folder/b/**/*.jp*g": ("folder/b/", ["2.jpg"]),
    "x.tar": ("x.tar/", STORED),
    "list.txt": ("folder/", STORED),
    "windows.txt": ("folder/", STORED),
    f"{MEMORY}/b": ("memory:///sources/b/", ["2.jpg", "c/3.JPEG"]),
    f"{MEMORY}/*.*": ("memory:///sources/", ["a.png", "z.gif"]),
    f"{MEMORY}/shards/x.tar": (f"{MEMORY}/shards/x.tar/", STORED),
}


def body_of(prefix: str, name: str) -> bytes:
    """Return the body of an image by its name below one of `sources`."""
    return next(body for path, body in BODIES.items() if f"{prefix}{name}".endswith(path))


@pytest.mark.parametrize("source", LISTS)
def test_a_source_lists_its_images_in_order_and_they_can_be_read(source, sources, tmp_path, monkeypatch):
    monkeypatch.chdir(sources)
    prefix, names = LISTS[source]
    entries = list(list_entries([source]))
    assert [entry.path for entry in entries] == [prefix + name for name in names]
    reader, short = Reader(max_bytes=100), Reader(max_bytes=2)
    expected = [body_of(prefix, name) for name in names]
    assert [reader.read(entry) for entry in entries] == expected
    assert [reader.read(entry) for entry in reversed(entries)] == expected[::-1]
    assert [short.read(entry) for entry in entries] == [body[:3] for body in expected]
    reader.close()
    short.close()


BAD_SOURCES = {
    "": "no source, or an empty one; name a folder",
    "nowhere": "nowhere: not found; name a folder",
    "~nobody-here/x": "~nobody-here/x: not found; name a folder",
    "shards": r"shards: has no images \(.*; name archives or parquet files in it",
    "damaged.tar": "damaged.tar: damaged or not a tar file",
    "memory://absent": "memory://absent: not found",
    "memory://no-keys": r"memory://no-keys: has no images",
    "no-keys.txt": r"no-keys.txt: has no images",
    "bundle": "bundle: a bundle, not images; name one bundle, then folders",
}


@pytest.mark.parametrize("source", BAD_SOURCES)
def test_a_source_without_images_is_a_one_line_error(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shards").mkdir()
    for name in ("shards/x.tar", "damaged.tar"):
        (tmp_path / name).write_bytes(b"nothing" * 100)
    fsspec.filesystem("memory").makedirs("/no-keys", exist_ok=True)
    (tmp_path / "no-keys.txt").touch()
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "golden-0.jpg").touch()
    (tmp_path / "bundle" / "manifest.json").write_text('{"format": "sopdeploy-bundle"}')
    with pytest.raises(DataError, match=BAD_SOURCES[source]):
        list(list_entries([source]))


def test_an_image_that_cannot_be_read_has_the_code_of_unusable_data(sources, monkeypatch):
    monkeypatch.chdir(sources)
    with pytest.raises(ImageError, match=r"cannot be read \(No such file or directory\)") as raised:
        Reader(max_bytes=9).read(ListedImage("x", "/nowhere/x.jpg"))
    assert raised.value.code == "unusable_data"


def test_the_list_is_read_in_parts_and_its_hash_changes_with_names_and_sizes(tmp_path):
    latin = os.fsdecode(b"/caf\xe9.jpg")
    entries = [
        ListedImage(latin, latin, size=3),
        ListedImage("b", "/b", 512, 7),
        ListedImage("c", "s3://x/c"),
    ]
    source, images = write_list(tmp_path / "list", iter(entries), 2)
    listing = Listing(tmp_path / "list")
    assert (images, listing.num_parts()) == (3, 2)
    assert [listing.images_of(part) for part in range(2)] == [2, 1]
    first, second, third = (entry for part in range(2) for entry in listing.read(part))
    assert (first.path, first.location) == ("/caf�.jpg", latin)
    assert [second, third] == entries[1:]
    assert write_list(tmp_path / "again", entries, 3)[0] == source
    changes = [entries[:2], entries[::-1], [*entries[:2], ListedImage("c", "s3://x/c", size=1)]]
    assert source not in [write_list(tmp_path / "changed", changed, 2)[0] for changed in changes]
