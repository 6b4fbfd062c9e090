"""What is said of files that are not images: each cause has its own advice."""

import os
from pathlib import Path

import pytest

from sopdeploy.base.files import POINTER, POINTER_ADVICE
from sopdeploy.data.folders.folder import open_folder
from sopdeploy.data.photos.file_checks import find_unreadable
from sopdeploy.errors import DataError
from sopdeploy.images.signatures import (
    BRANDS,
    CONVERTERS,
    REJECTED_SIGNATURES,
    has_image_suffix,
)
from tests.support.small_data import jpeg

LFS = POINTER + b"v1\noid sha256:4665a5ea\nsize 12345\n"
PHOTO = jpeg(0, (32, 24))


def write(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


TWO_CLASSES = {f"{label}/{number}.jpg": PHOTO for label in "ab" for number in range(4)}
# The files of a folder that cannot be trained on, and what to do
REFUSED: dict[str, tuple[dict[str, bytes], str]] = {
    "nothing": ({}, "one subfolder per class"),
    "an archive": ({"data.zip": b"PK"}, "unpack data.zip"),
    "two archives": ({"train.tar.gz": b"", "test.zip": b""}, "unpack test.zip, train.tar.gz"),
    "an archive as a class": (
        TWO_CLASSES | {"c/c.zip": b"PK"},
        "unpack c/c.zip",
    ),
    "arrays": ({"x.npy": b"", "readme.md": b""}, "images of x.npy"),
    "another format": (
        {"a/1.tif": b"II*\0", "b/1.tif": b"II*\0"},
        "mogrify -format png {root}/*/*.tif",
    ),
    "another format below one folder": (
        {f"photos/{label}/1.ppm": b"P6" for label in "ab"},
        "mogrify -format png {root}/*/*/*.ppm",
    ),
    "a format of single files": (
        TWO_CLASSES | {"c d/1.svg": b"<svg"},
        """for f in '{root}/c d'/*.svg; do rsvg-convert "$f" -o "$f.png"; done""",
    ),
    "raw files of a camera": (
        TWO_CLASSES | {"c/1.NEF": b"MM\0*"},
        "program of the camera",
    ),
    "an archive beside the only folder with images": (
        {f"report/{name}.jpg": PHOTO for name in ("1", "2", "out/x/3")} | {"raw/data.zip": b"PK"},
        "unpack raw/data.zip",
    ),
    "a compressed table": (
        {"images/1.jpg": PHOTO, "images/2.jpg": PHOTO, "labels.csv.gz": b""}, "unpack labels.csv.gz"
    ),
    "an archive in the folder of the images": (
        {"cats/1.jpg": PHOTO, "cats/2.jpg": PHOTO, "cats/raw/backup.zip": b"PK"},
        "one subfolder per class",
    ),
    "a pointer to an archive": ({"data.zip": LFS}, "{root}/data.zip is " + POINTER_ADVICE),
    "pointers as a class": (TWO_CLASSES | {"c/1.tif": LFS}, "; {root}/c/1.tif is " + POINTER_ADVICE),
    "a pointer to a table": (
        {"images/1.jpg": PHOTO, "images/2.jpg": PHOTO, "train.csv": LFS},
        "{root}/train.csv is " + POINTER_ADVICE,
    ),
    "a pointer to labels.csv": (
        {"1.jpg": PHOTO, "2.jpg": PHOTO, "labels.csv": LFS}, "{root}/labels.csv: " + POINTER_ADVICE
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_folder_without_images_is_refused_with_its_cause(tmp_path, name) -> None:
    files, said = REFUSED[name]
    root = write(tmp_path / "photos", files)
    root.mkdir(exist_ok=True)

    with pytest.raises(DataError) as caught:
        open_folder(root)

    assert said.replace("{root}", str(root)) in str(caught.value)


def test_a_report_beside_programs_is_not_a_photo_to_convert(tmp_path) -> None:
    root = write(tmp_path, {"a.py": b"", "b.py": b"", "report.pdf": b"%PDF"})

    with pytest.raises(DataError, match=r"one subfolder"):
        open_folder(root)


def test_folders_of_programs_are_not_training_parts(tmp_path) -> None:
    programs = {"training/fit.py": b"", "training/x/net.py": b""}
    parts = {f"train/{name}": content for name, content in TWO_CLASSES.items()}

    assert open_folder(write(tmp_path, programs | parts)).train.labels == ("a", "b")


def test_a_compressed_file_that_is_not_an_archive_makes_no_class(tmp_path) -> None:
    root = write(tmp_path, TWO_CLASSES | {"logs/1/trace.json.gz": b"", "logs/events": b""})

    assert open_folder(root).train.labels == ("a", "b")


def test_a_pointer_to_weights_is_not_advice_about_images(tmp_path) -> None:
    root = write(tmp_path, {"images/1.jpg": PHOTO, "models/net.tflite": LFS})

    with pytest.raises(DataError, match="one subfolder") as caught:
        open_folder(root)
    assert POINTER_ADVICE not in str(caught.value)


# The content of an image file, and the end of what is said about it
UNUSABLE = {
    "a pointer": (LFS, f"/1.jpg: {POINTER_ADVICE}"),
    "no byte": (b"", "it is empty; repair, convert or delete it"),
    "another format": (b"II*\0", "use {formats}; ImageMagick converts TIFF files"),
    "half a photo": (PHOTO[:300], "the image is truncated; repair, convert or delete it"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_an_unusable_image_is_named_with_its_cause(tmp_path, name) -> None:
    content, said = UNUSABLE[name]
    images = open_folder(write(tmp_path, TWO_CLASSES | {"a/1.jpg": content})).train

    (error,) = find_unreadable(images).values()

    assert error.endswith(said.partition("{formats}")[2])
    assert error.startswith(f"{tmp_path / 'a/1.jpg'}: ")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_an_image_without_permission_is_not_to_be_deleted(tmp_path) -> None:
    images = open_folder(write(tmp_path, TWO_CLASSES)).train
    (tmp_path / "a/1.jpg").chmod(0)

    (error,) = find_unreadable(images).values()

    assert error.endswith("permissions")


def test_every_format_that_has_a_converter_is_one_that_is_refused() -> None:
    kinds = {kind for _, *kinds in CONVERTERS.values() for kind in kinds}
    formats = {kind for kind in kinds if not kind.startswith(".")}

    assert formats <= {*REJECTED_SIGNATURES.values(), *BRANDS.values()}
    assert not {kind for kind in kinds if has_image_suffix(f"x{kind}")}
