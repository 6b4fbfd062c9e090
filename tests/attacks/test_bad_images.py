"""Hostile images and files: the decoder returns pixels or an error, quickly and with little memory."""

import os
import socket
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from PIL import Image, ImageFile

from sopdeploy.data.folders.check import check_data
from sopdeploy.data.folders.folder import open_folder
from sopdeploy.errors import DataError, ImageError
from sopdeploy.images.decode import decode
from sopdeploy.images.encode import encode_image
from sopdeploy.images.limits import FORMATS
from sopdeploy.images.pixels import TILE
from sopdeploy.images.preprocess import Preprocess
from sopdeploy_commands.classify.sources import ListedImage, list_sources, read_listed
from sopdeploy_commands.predict import predict
from sopdeploy_export.lower.accuracy import calibration_images
from tests.support.counted import counted, record_images
from tests.support.pictures import chunk, encoded, png
from tests.support.small_data import jpeg, write_classes
from tests.support.strategies import image_files

RULES = Preprocess(resize=36, crop=32)

CODES = {
    "empty_body": 400, "not_an_image": 415, "unsupported_format": 415, "too_large": 413,
    "too_many_pixels": 413, "truncated_image": 422, "damaged_image": 422,
}  # fmt: skip


def attack(body: bytes, *, max_pixels: int = 50_000_000) -> str | None:
    """Decode *body*; return the code of its refusal, or None for an accepted image."""
    try:
        image = decode(body, RULES, max_bytes=20_000_000, max_pixels=max_pixels).pixels
    except ImageError as caught:
        problem = caught
    else:
        assert (image.shape, image.dtype) == ((32, 32, 3), np.uint8)
        return None
    assert CODES[problem.code] == problem.status
    return problem.code


@settings(max_examples=300)
@given(body=image_files)
def test_a_damaged_image_is_refused_or_read(body: bytes) -> None:
    attack(body, max_pixels=1_000_000)


def gif(canvas: tuple[int, int], frame: tuple[int, int]) -> bytes:
    """Make a GIF whose only frame can be larger than its canvas."""
    head = b"GIF89a" + struct.pack("<HHBBB", *canvas, 0x80, 0, 0) + bytes(6)
    return head + b"," + struct.pack("<HHHHB", 0, 0, *frame, 0) + b"\x02\x02\x44\x01\x00;"


BOMBS = {
    "PNG of 100 megapixels": png(10_000, 10_000, data=bytes(12_510_000)),
    "PNG of the largest size there is": png(2**31 - 1, 2**31 - 1),
    "GIF with a frame larger than its canvas": gif((10, 10), (65_535, 65_535)),
    "GIF with a canvas of 4 gigapixels": gif((65_535, 65_535), (10, 10)),
    "BMP of 4 gigapixels": b"BM"
    + struct.pack("<IHHI", 100, 0, 0, 54)
    + struct.pack("<IiiHHIIiiII", 40, 65_000, 65_000, 1, 24, 0, 0, 0, 0, 0, 0),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_pixel_bomb_is_refused_by_its_header(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("was decoded"))
    assert attack(BOMBS[name]) in {"too_many_pixels", "damaged_image"}


@pytest.mark.parametrize("kind", FORMATS.values())
def test_an_image_of_exactly_the_limit_is_read(kind: str) -> None:
    body = encoded(Image.new("RGB", (64, 64)), kind)  # HEIC codes sides of 64 pixels
    assert attack(body, max_pixels=64 * 64) is None
    assert attack(body, max_pixels=64 * 64 - 1) == "too_many_pixels"


def test_a_side_has_a_limit_of_its_own() -> None:
    longest, longer = (png(side, 1, data=bytes(1 + side // 8 + 1)) for side in (65_535, 65_536))
    assert attack(longest) is None
    assert attack(longer) == "too_many_pixels"


@pytest.mark.parametrize("options", [{}, {"lossless": True}, {"exif": b"Exif\0\0"}], ids=str)
def test_a_webp_is_measured_before_pillow_allocates_its_pixels(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    body = encoded(Image.new("RGB", (40, 30)), "WEBP", **options)
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("was opened"))
    assert attack(body, max_pixels=40 * 30 - 1) == "too_many_pixels"


@pytest.mark.parametrize("kind", ["HEIF", "AVIF"])
def test_each_image_in_a_file_is_measured(kind: str) -> None:
    body = encoded(Image.new("RGB", (64, 64)), kind)
    for width, code in ((64, None), (65, "too_many_pixels")):
        size = struct.pack(">I4sIII", 20, b"ispe", 0, width, 64)
        other_image = struct.pack(">I4s", 8 + len(size), b"free") + size
        assert attack(body + other_image, max_pixels=64 * 64) == code


def test_a_large_transparent_image_is_converted_in_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rgba = encoded(Image.new("RGBA", (4000, 4000)))
    sizes = record_images(monkeypatch)
    decode(rgba, Preprocess(), max_bytes=10**6, max_pixels=10**8)
    large = [size for size in sizes if size[0] * size[1] > TILE]

    assert large == [(4000, 4000)]  # the RGB image


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"iCCP"])
def test_a_compressed_text_bomb_costs_no_memory(kind: bytes) -> None:
    squeezed = zlib.compress(bytes(100_000_000), 9)
    start = {b"zTXt": b"a\0\0", b"iTXt": b"a\0\1\0\0\0", b"iCCP": b"a\0\0"}[kind]
    bomb = png(8, 8, data=bytes(16), extra=chunk(kind, start + squeezed))
    assert counted(lambda: attack(bomb)).bytes < 20_000_000  # of 100 MB


def test_ten_thousand_frames_cost_as_much_as_the_first() -> None:
    frame = gif((31, 24), (31, 24))
    head, body = frame[:19], frame[19:-1]
    one, many = (
        counted(lambda count=count: attack(head + body * count + b";")) for count in (1, 10_000)
    )

    assert many.calls < one.calls + 50
    assert many.bytes < 1_000_000


SMALL_RULES = Preprocess(
    resize=8, crop=8, interpolation="bilinear", mean=(0.0,) * 3, std=(1.0,) * 3
)
pytestmark = pytest.mark.timeout(60)  # a reader that waits for a FIFO waits forever


def bind_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(os.path.relpath(path))  # the limit of an address is 107 bytes


KINDS: dict[str, Callable[[Path], Any]] = {
    "fifo": os.mkfifo,
    "socket": bind_socket,
    "device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.fixture(params=KINDS)
def special(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """A file of each kind, named like the first image of a class in a folder of images."""
    monkeypatch.chdir(tmp_path)
    folder = write_classes(tmp_path / "photos", ("cat", "dog"), each=8)
    path = folder / "cat" / "00.jpg"
    KINDS[request.param](path)
    return path


def fails(call: Callable[[], object], error: type[Exception] = DataError) -> str:
    with pytest.raises(error) as raised:
        call()
    return str(raised.value)


def test_every_reader_of_a_folder_names_the_file(special: Path) -> None:
    root, listed = special.parents[1], f"{special}: "
    split = open_folder(root)
    parts = split.train, split.held_out

    assert f"{listed}cannot be read" in fails(
        lambda: [
            part.preprocess(index, Preprocess()) for part in parts for index in range(len(part))
        ]
    )
    assert [error.startswith(listed) for error in check_data(root).unreadable] == [True]
    assert fails(lambda: calibration_images(root, SMALL_RULES)).startswith(
        f"{listed}cannot be read"
    )
    assert fails(lambda: predict(root, special)).startswith(f"{listed}cannot be read")


def test_classify_gives_a_special_file_a_row_with_an_error(
    special: Path,
) -> None:
    images = list(list_sources([str(special.parents[1])]))
    assert str(special) in [image.path for image in images]
    message = fails(
        lambda: read_listed(ListedImage(str(special), str(special)), 1000), ImageError
    )

    assert "not a regular file" in message
    for suffix in (".tar", ".txt"):
        source = special.rename(special.with_suffix(suffix))
        assert "not a regular file" in fails(
            lambda source=source: list(list_sources([str(source)]))
        )
        source.rename(special)


def test_an_image_may_still_come_from_a_pipe_without_an_image_suffix() -> None:
    reading, writing = os.pipe()
    with os.fdopen(writing, "wb") as file:
        file.write(jpeg(0))

    assert encode_image(Path(f"/dev/fd/{reading}")) == jpeg(0)

    os.close(reading)
