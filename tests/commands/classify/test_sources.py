"""Lists of images: kinds of sources, their order, hostile names and archives, and their errors."""

import io
import tarfile
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from itertools import islice
from pathlib import Path

import fsspec
import pytest
from typer.testing import CliRunner

from sopdeploy.bundle.folder import MANIFEST, REQUIRED
from sopdeploy.errors import DataError, ImageError
from sopdeploy.images.signatures import describe_skipped
from sopdeploy_commands.app import app
from sopdeploy_commands.classify import classifier
from sopdeploy_commands.classify.sources import ListedImage, list_sources, read_listed
from tests.commands.classify.conftest import OPTIONS, SETTINGS, classify, rows_of
from tests.support.service import picture_bytes

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
    (tmp_path / "archives.txt").write_text("x.tar")
    store.pipe("/sources/list.txt", "\n".join(BODIES).encode())
    store.pipe("/list.txt", "\n".join(f"sources/{name}" for name in BODIES).encode())
    store.pipe("/sources/.trash/a.png", b"no")
    store.pipe("/sources/shards/x.tar", (tmp_path / "x.tar").read_bytes())
    yield tmp_path
    store.rm(["/sources", "/list.txt"], recursive=True)


SORTED = ["a.png", "b/2.jpg", "b/c/3.JPEG", "z.gif"]
STORED = list(BODIES)
# Source: (prefix of the names, names)
LISTS = {
    "folder": ("folder/", SORTED),
    "folder/z.gif": ("folder/", ["z.gif"]),
    "x.tar": ("x.tar/", STORED),
    "list.txt": ("folder/", STORED),
    "windows.txt": ("folder/", STORED),
    "archives.txt": ("x.tar/", STORED),
    f"{MEMORY}/b": ("memory:///sources/b/", ["2.jpg", "c/3.JPEG"]),
    f"{MEMORY}/z.gif": ("memory:///sources/", ["z.gif"]),
    f"{MEMORY}/list.txt": (f"{MEMORY}/", STORED),
    "memory://list.txt": (f"{MEMORY}/", STORED),
    f"{MEMORY}/shards/x.tar": (f"{MEMORY}/shards/x.tar/", STORED),
    f"simplecache::{MEMORY}/b": ("memory:///sources/b/", ["2.jpg", "c/3.JPEG"]),
}


def body_of(prefix: str, name: str) -> bytes:
    """Return the body of an image by its name below one of `sources`."""
    return next(body for path, body in BODIES.items() if f"{prefix}{name}".endswith(path))


@pytest.mark.parametrize("source", LISTS)
def test_a_source_lists_its_images_in_order_and_they_can_be_read(
    source, sources, tmp_path, monkeypatch
):
    monkeypatch.chdir(sources)
    prefix, names = LISTS[source]
    images = list(list_sources([source]))

    assert [image.path for image in images] == [prefix + name for name in names]

    expected = [body_of(prefix, name) for name in names]
    assert [read_listed(image, 100) for image in images] == expected
    assert [read_listed(image, 3) for image in images] == [body[:3] for body in expected]


BAD_SOURCES = {
    "": "no source",
    "nowhere": "nowhere: ",
    "photos.tar.gz": r"photos.tar.gz: .*uncompressed",
    "shards": r"shards: .*name archives",
    "damaged.tar": r"damaged.tar: ",
    "absent.tar": r"absent.tar: .*No such file",
    "memory://absent": r"memory://absent: ",
    "nothing://x": r"nothing://x: ",
    "memory://no-keys": r"memory://no-keys: ",
    "no-keys.txt": r"no-keys.txt: ",
    "latin.txt": r"latin.txt: .*byte 0xe9",
    "latin\udce9.jpg": r"latin.*: .*utf-8",
    "bundle": "bundle: a bundle",
}


def test_a_source_without_images_is_a_one_line_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shards").mkdir()
    for name in ("shards/x.tar", "damaged.tar", "photos.tar.gz"):
        (tmp_path / name).write_bytes(b"nothing" * 100)
    fsspec.filesystem("memory").makedirs("/no-keys", exist_ok=True)
    (tmp_path / "no-keys.txt").touch()
    (tmp_path / "latin.txt").write_bytes(b"a.jpg\ncaf\xe9.jpg")
    (tmp_path / "latin\udce9.jpg").touch()
    (tmp_path / "bundle").mkdir()
    for name in ("golden-0.jpg", MANIFEST, *REQUIRED):
        (tmp_path / "bundle" / name).touch()
    for source, message in BAD_SOURCES.items():
        with pytest.raises(DataError, match=message):
            list(list_sources([source]))

    with pytest.raises(ImageError, match=r"No such file") as raised:
        read_listed(ListedImage("x", "/nowhere/x.jpg"), 9)

    assert raised.value.code == "unusable_data"


BODY = picture_bytes()
MISSING = "cannot be read (No such file or directory)"
# The error of each name
HOSTILE = ("escape\x1b[31m.jpg", "new\nline.jpg")
LISTED = b"\r\nnew.jpg\r\n/etc/passwd\n.\nnull\0.jpg\n/dev/zero"


def test_hostile_names_have_rows_and_circles_of_links_are_not_followed(bundle_path, tmp_path):
    folder = tmp_path / "hostile"
    folder.mkdir()
    for name in HOSTILE:
        (folder / name).write_bytes(BODY)
    (folder / "broken.jpg").symlink_to("nowhere.jpg")
    (folder / "again.jpg").symlink_to(folder)
    (folder / "folder.jpg").mkdir()
    listing = folder / "list.txt"
    listing.write_bytes(LISTED)
    sources = [str(folder), str(listing)]

    found = classify(bundle_path, sources, tmp_path / "out", SETTINGS, OPTIONS)
    rows = rows_of(tmp_path / "out")

    assert (found.num_images, found.num_errors) == (8, 6)
    names = [row["path"].removeprefix(f"{folder}/") for row in rows]
    assert names[:3] == ["broken.jpg", *HOSTILE]
    # Of the folder, only the broken link has an error; of the list, every line.
    assert [row["error"] is None for row in rows] == [False, True, True, *5 * [False]]


def test_members_of_an_archive_stay_below_its_name(tmp_path):
    archive = tmp_path / "x.tar"
    names = (
        "/abs.jpg",
        "../up.jpg",
        "x/../../y.jpg",
        "a.jpg",
        "a.jpg",
        "./b.jpg",
        ".hidden.jpg",
    )
    names += ("c\udce9.jpg",)

    with tarfile.open(archive, "w") as tar:
        for number, name in enumerate(names):
            member = tarfile.TarInfo(name)
            member.size = number
            tar.addfile(member, io.BytesIO(bytes(number)))
        for kind in (tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
            special = tarfile.TarInfo("special.jpg")
            special.type = kind
            special.linkname = "/etc/passwd"
            tar.addfile(special)

    found = {entry.path: entry.size for entry in list_sources([str(archive)])}
    assert found == {f"{archive}/{name}": size for name, size in
                     {"abs.jpg": 0, "a.jpg": 4, "b.jpg": 5, "c�.jpg": 7}.items()}  # fmt: skip

    with tarfile.open(archive, "a") as tar:
        link = tarfile.TarInfo("twin.jpg")
        link.type = tarfile.LNKTYPE
        link.linkname = "a.jpg"
        tar.addfile(link)

    with pytest.raises(DataError, match=r"twin\.jpg"):
        list(list_sources([str(archive)]))


def test_ctrl_c_says_in_one_line_how_to_continue(bundle_path, photos, tmp_path, monkeypatch):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(classifier.BatchClassifier, "classify_parts", interrupted)
    found = CliRunner().invoke(
        app, ["classify", str(bundle_path), str(photos), "--out", str(tmp_path)]
    )
    assert (found.exit_code, found.stderr.count("\n")) == (130, 1)
    assert found.stdout == ""


def extended(kind: bytes) -> bytes:
    """The header of an entry of 3 GB with the name or the attributes of the next one."""
    entry = tarfile.TarInfo("x")
    entry.size = 3 << 30
    entry.type = kind
    return entry.tobuf(tarfile.USTAR_FORMAT)


@pytest.mark.parametrize("kind", [b"x", b"g", b"L", b"K", b"X"], ids=lambda kind: kind.decode())
def test_a_header_that_says_it_has_gigabytes_is_not_read(kind: bytes, tmp_path: Path) -> None:
    archive = tmp_path / "x.tar"
    with archive.open("wb") as file:
        file.write(extended(kind))
        file.truncate((3 << 30) + 4096)  # a file with a hole

    with pytest.raises(DataError, match=r"x\.tar: .*3221225472 bytes"):
        list(list_sources([str(archive)]))


def test_an_entry_with_a_negative_size_does_not_repeat_those_before_it(tmp_path: Path) -> None:
    first, second = (
        bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
        for name in ("a.jpg", "b.jpg")
    )
    second[124:136] = b"\xff" + (-tarfile.BLOCKSIZE).to_bytes(11, "big", signed=True)
    second[148:156] = b" " * 8
    second[148:156] = b"%06o\0 " % sum(second)
    (tmp_path / "x.tar").write_bytes(first + second + bytes(1024))
    found = []
    with suppress(DataError):  # later versions of Python take it for the end
        found.extend(islice(list_sources([str(tmp_path / "x.tar")]), 9))

    assert len(found) <= 1


def test_a_line_that_never_ends_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "list.txt").open("wb") as file:
        file.truncate(3 << 30)
    with pytest.raises(DataError, match=r"list\.txt: .*65536 characters"):
        list(list_sources([str(tmp_path / "list.txt")]))


def no_image(folder: Path) -> str:
    (folder / "empty").mkdir()
    return str(folder / "empty")


def no_archive(folder: Path) -> str:
    (folder / "a.tar").write_bytes(b"no archive" * 1000)
    return str(folder / "a.tar")


def no_member(folder: Path) -> str:
    (folder / "list.txt").write_text("missing.tar")
    return str(folder / "list.txt")


def one_good(folder: Path) -> str:
    (folder / "1.jpg").write_bytes(picture_bytes())
    return str(folder / "1.jpg")


WRONG: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "a missing folder": (lambda folder: [str(folder / "missing")], "missing: "),
    "a missing folder after images": (
        lambda folder: [one_good(folder), str(folder / "missing")],
        "missing: ",
    ),
    "an empty folder": (lambda folder: [no_image(folder)], "empty: "),
    "no archive": (lambda folder: [no_archive(folder)], r"a\.tar: "),
    "a list of a missing archive": (lambda folder: [no_member(folder)], r"missing\.tar: "),
    "an empty name": (lambda folder: [""], "no source"),
    "no source": (lambda folder: [], "no source"),
    "an unknown store": (lambda folder: ["nowhere://x"], "nowhere://x: "),
}


@pytest.mark.parametrize(("sources", "message"), WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("new", ["out", "new/deep/out"])
def test_a_run_that_cannot_begin_leaves_no_folder(
    bundle_path: Path,
    tmp_path: Path,
    sources: Callable[[Path], list[str]],
    message: str,
    new: str,
) -> None:
    given = sources(tmp_path)
    before = set(tmp_path.rglob("*"))
    with pytest.raises(DataError, match=message):
        classify(bundle_path, given, tmp_path / new)

    assert set(tmp_path.rglob("*")) == before
    (tmp_path / "mine").mkdir()
    with pytest.raises(DataError, match=message):
        classify(bundle_path, given, tmp_path / "mine")

    assert list((tmp_path / "mine").iterdir()) == []


@pytest.mark.parametrize("is_packed", [False, True])
def test_what_is_not_used_is_counted_and_shown_in_one_line(tmp_path, is_packed) -> None:
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.jpg", "b.CR2", "sub/c.cr2", "notes", ".hidden"):
        (folder / name).write_bytes(b"x")
    source = folder

    if is_packed:
        source = tmp_path / "photos.tar"
        with tarfile.open(source, "w") as archive:
            archive.add(folder, "photos")
    skipped = Counter[str]()

    assert len(list(list_sources([str(source)], skipped))) == 1
    assert skipped == {".cr2": 2, "without an ending": 1}
    assert describe_skipped(skipped).startswith("3 files ")
