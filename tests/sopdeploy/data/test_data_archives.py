"""Tar archives as folders of images."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest

from sopdeploy.data.datasets.folder import FolderConfig, open_folder
from sopdeploy.data.tar import open_tars
from sopdeploy.errors import DataError
from tests.sopdeploy.data.small_data import jpeg, tar_of, write_classes, write_photos


def open_at(path: Path, **settings: object):
    return open_folder(FolderConfig(kind="folder", path=path, **settings))


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def assert_same_images(split, expected) -> None:
    """Compare the images and classes of both parts and their order."""
    for part, other in ((split.train, expected.train), (split.held_out, expected.held_out)):
        assert part.labels == other.labels
        assert part.paths.tolist() == other.paths.tolist()
        for (image, target), (expected_image, expected_target) in zip(part, other, strict=True):
            assert np.array_equal(np.asarray(image), np.asarray(expected_image))
            assert target == expected_target


@pytest.mark.parametrize("name", [".", "photos", "a/b"])
@pytest.mark.parametrize("parts", [True, False])
def test_an_archive_equals_the_folder_it_was_made_of(tmp_path, name, parts) -> None:
    root = tmp_path / "photos"
    photos = write_photos(root) if parts else write_classes(root, ("a", "b"), 9)
    assert_same_images(open_at(tar_of(photos, tmp_path / "p.tar", name)), open_at(photos))


def test_archives_of_shards_classes_or_parts_equal_their_folder(tmp_path) -> None:
    photos = write_photos(tmp_path / "photos")
    expected = open_at(photos)
    shards, classes, parts = (tmp_path / name for name in ("shards", "classes", "parts"))
    for folder in (shards / "train", shards / "val", classes / "train", parts):
        folder.mkdir(parents=True)
    for part in ("train", "val"):
        tar_of(photos / part, parts / f"{part}.tar")
        files = sorted((photos / part).rglob("*.jpg"))
        for number in range(3):
            with tarfile.open(shards / part / f"{number}.tar", "w") as archive:
                for file in files[number::3]:
                    archive.add(file, arcname=str(file.relative_to(photos / part)))
    (classes / "val").symlink_to(photos / "val")
    with tarfile.open(tmp_path / "all.tar", "w") as archive:  # an archive of archives is read in place
        for label in ("cat", "dog"):
            packed = tar_of(photos / "train" / label, classes / "train" / f"{label}.tar")
            add(archive, packed.name, packed.read_bytes())
    for path in (shards, classes, parts):
        assert_same_images(open_at(path), expected)
    store = open_tars(tmp_path / "all.tar", [tmp_path / "all.tar"])
    assert store.folders() == ["cat", "dog"]
    assert store.read(b"dog/3.jpg") == (photos / "train" / "dog" / "3.jpg").read_bytes()


def test_hidden_members_symlinks_and_other_files_are_ignored(tmp_path) -> None:
    with tarfile.open(tmp_path / "p.tar", "w") as archive:
        for name in ("a/1.jpg", "a/.hidden.jpg", ".trash/x/1.jpg", "a/notes.txt", "../up/1.jpg", "b/1.png"):
            add(archive, name, jpeg(1))
        add(archive, "a/1.jpg", jpeg(2))  # written again: the later one counts
        twin, pointer = tarfile.TarInfo("b/twin.jpg"), tarfile.TarInfo("b/pointer.jpg")
        twin.type, twin.linkname = tarfile.LNKTYPE, "a/1.jpg"
        pointer.type, pointer.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(twin)
        archive.addfile(pointer)
    store = open_tars(tmp_path / "p.tar", [tmp_path / "p.tar"])
    assert [store.list_files(label)[0] for label in ("a", "b")] == [[b"a/1.jpg"], [b"b/1.png", b"b/twin.jpg"]]
    assert store.read(b"a/1.jpg") == store.read(b"b/twin.jpg") == jpeg(2)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda _: b"no archive at all" * 100, "not a tar file"),
        (lambda data: data[:3000], "truncated|not a tar file"),
        (lambda _: b"", "not a tar file|holds no class folders"),
    ],
    ids=["text", "cut", "empty"],
)
def test_a_damaged_archive_is_named(tmp_path, spoil, message) -> None:
    data = tar_of(write_photos(tmp_path / "photos"), tmp_path / "whole.tar").read_bytes()
    (tmp_path / "p.tar").write_bytes(spoil(data))
    with pytest.raises(DataError, match=message) as problem:
        open_at(tmp_path / "p.tar")
    assert str(tmp_path / "p.tar") in str(problem.value)
    assert "\n" not in str(problem.value)


def test_one_name_in_two_shards_is_an_error(tmp_path) -> None:
    photos = write_classes(tmp_path / "photos", ("a", "b"))
    (tmp_path / "shards").mkdir()
    for number in (1, 2):
        tar_of(photos, tmp_path / "shards" / f"{number}.tar")
    with pytest.raises(DataError, match=r"a/0\.jpg: is both in .*1\.tar and in .*2\.tar"):
        open_at(tmp_path / "shards")
