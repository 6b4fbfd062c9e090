"""What a program calls an image has one answer, through `predict`, through the client, alone and in a list."""

import asyncio
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from sopdeploy.bundle.http_api import Classes
from sopdeploy.client import Client
from sopdeploy.errors import DataError, SopdeployError
from sopdeploy.images.encode import encode_image
from sopdeploy_commands.predict import predict
from tests.support.pictures import encoded

WIDE = np.zeros((40, 90, 3), np.uint8)  # what is cropped depends on whether it is turned
WIDE[:, :45] = (200, 30, 60)
WIDE[:, 45:] = (10, 90, 220)
WIDE[:12] = (90, 160, 30)
PICTURE = Image.fromarray(WIDE)
GRAY = PICTURE.convert("L")


def turned(kind: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(PICTURE, kind, exif=exif.tobytes())


def with_alpha() -> Image.Image:
    image = PICTURE.convert("RGBA")
    image.putalpha(GRAY.point(lambda level: 255 if level > 90 else 40))
    return image


def in_sixteen_bits() -> Image.Image:
    return Image.fromarray(np.asarray(GRAY).astype(np.uint16) * 200)


FILES: dict[str, bytes] = {
    "JPEG": encoded(PICTURE, "JPEG"),
    **{f"JPEG turned by {n}": turned("JPEG", n) for n in range(2, 9)},
    "PNG turned": turned("PNG", 6),
    "WebP turned": turned("WEBP", 8),
    "CMYK": encoded(PICTURE.convert("CMYK"), "JPEG"),
    "gray": encoded(GRAY),
    "one bit": encoded(PICTURE.convert("1")),
    "palette": encoded(PICTURE.quantize(8)),
    "palette with a transparent color": encoded(PICTURE.quantize(8), transparency=2),
    "RGB with a transparent color": encoded(PICTURE, transparency=(200, 30, 60)),
    "gray with a transparent level": encoded(GRAY, transparency=88),
    "alpha": encoded(with_alpha()),
    "gray with alpha": encoded(with_alpha().convert("LA")),
    "WebP with alpha": encoded(with_alpha(), "WEBP", lossless=True),
    "16 bits": encoded(in_sixteen_bits()),
    "16 bits with a transparent level": encoded(in_sixteen_bits(), transparency=88 * 200),
    "GIF": encoded(PICTURE, "GIF"),
    "GIF with a transparent color": encoded(PICTURE.quantize(8), "GIF", transparency=2),
    "BMP": encoded(PICTURE, "BMP"),
}
# How a program names the image in a file.
FORMS: dict[str, Callable[[Path], Any]] = {
    "bytes": Path.read_bytes,
    "a bytearray": lambda path: bytearray(path.read_bytes()),
    "an array of bytes": lambda path: np.fromfile(path, np.uint8),
    "a column of bytes, as OpenCV encodes": lambda path: np.fromfile(path, np.uint8)[:, None],
    "a view": lambda path: memoryview(path.read_bytes()),
    "a path": lambda path: path,
    "text": str,
    "a buffer at its end": lambda path: filled_buffer(path.read_bytes()),
    "a PIL image": lambda path: Image.open(io.BytesIO(path.read_bytes())),
    "a PIL image, loaded before": lambda path: loaded(
        Image.open(io.BytesIO(path.read_bytes()))
    ),
}


def filled_buffer(content: bytes) -> io.BytesIO:
    buffer = io.BytesIO()
    buffer.write(content)
    return buffer


def loaded(image: Image.Image) -> Image.Image:
    image.load()
    return image


# Values without a file: the first of a row is the picture, the others must have its answer.
VALUES: dict[str, tuple[Any, ...]] = {
    "RGB": (encoded(PICTURE), WIDE, PICTURE, WIDE[:, ::-1][:, ::-1], PICTURE.convert("RGBX")),
    "gray": (encoded(GRAY), np.asarray(GRAY), GRAY),
    "alpha": (encoded(with_alpha()), np.asarray(with_alpha()), with_alpha()),
    "premultiplied alpha": (
        encoded(with_alpha().convert("RGBa").convert("RGBA")),
        with_alpha().convert("RGBa"),
    ),
    "turned before": (
        encoded(PICTURE.transpose(Image.Transpose.ROTATE_270)),
        ImageOps.exif_transpose(Image.open(io.BytesIO(turned("PNG", 6)))),
    ),
    "16 bits as 32": (encoded(in_sixteen_bits()), in_sixteen_bits().convert("I")),
}  # fmt: skip


def essence(answer: Classes) -> tuple[object, ...]:
    return answer.classes, answer.warnings, answer.known, answer.score


@pytest.fixture(scope="module")
def answers(client: Any, bundle_path: Path) -> Iterator[Callable[[list[Any]], list[Any]]]:
    """Give the answers of every door to each of the images."""
    with Client(str(client.base_url)) as own:

        def of(images: list[Any]) -> list[Any]:
            singles = [own.classify(image, top_k=7) for image in images]
            lists = own.classify(images[:8], top_k=7) + own.classify(images[8:], top_k=7)
            predicted = predict(bundle_path, images, threads=1, top_k=7)
            return [list(map(essence, door)) for door in (singles, lists, predicted)]

        yield of


@pytest.mark.parametrize("file", FILES)
def test_an_image_has_the_answer_of_its_file_in_every_form(
    file: str, answers: Any, tmp_path: Path
) -> None:
    path = tmp_path / "photo.img"
    path.write_bytes(FILES[file])
    with path.open("rb") as opened:
        images = [form(path) for form in FORMS.values()]
        (expected, *others), *doors = answers([*images, opened])

    assert expected[0]
    for found in (others, *doors):
        assert dict.fromkeys(found) == {expected: None}


@pytest.mark.parametrize("row", VALUES)
def test_a_picture_in_memory_has_the_answer_of_its_file(row: str, answers: Any) -> None:
    doors = answers(list(VALUES[row]))
    assert len({found for door in doors for found in door}) == 1


TEXT = io.StringIO("text")
NO_IMAGES: dict[str, tuple[Any, str]] = {
    "nothing": (None, "NoneType; give a path"),
    "a number": (3, "int; give a path"),
    "a list": ([WIDE], "a list in a list"),
    "a text file": (TEXT, "opened as text"),
    "base64": ("/9j/4AAQSkZJRgABAQ" * 30, "looks like base64"),
    "a data URL": ("data:image/png;base64,iVBORw0KGgo=", "looks like base64"),
    "an address": ("https://host/photo.jpg", "looks like an address"),
    "no file": ("none.jpg", r"none\.jpg: .*No such file"),
    "a null byte": ("a\0b", "cannot be read"),
    "no pixels": (WIDE[:0], r"uint8 array \(0, 90, 3\)"),
    "PIL without pixels": (Image.new("RGB", (0, 4)), "without pixels"),
    "channels first": (WIDE.transpose(2, 0, 1), r"channels first"),
    "an axis more": (np.asarray(GRAY)[..., None], "an axis more"),
    "two channels": (WIDE[..., :2], "looks like no image"),
    "numbers as an array": (np.zeros(9), "looks like no image"),
    "0 to 1": (WIDE / 255, r"float64 .*from 0 to 1"),
    "0 to 255": (WIDE.astype(np.int64), "colors from 0 to 255"),
    "normalized": (WIDE / 100 - 1, "looks normalized"),
    "a mask": (WIDE[..., 0] > 99, "looks like a mask"),
    "16 bits": (np.asarray(in_sixteen_bits()), "looks like 16 bits"),
    "floats of PIL": (GRAY.convert("F"), "mode F"),
    "LAB": (Image.new("LAB", (4, 4)), "mode LAB"),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_IMAGES)
def test_every_door_says_in_one_line_what_looks_like_no_image(
    name: str, bundle_path: Path
) -> None:
    value, reason = NO_IMAGES[name]
    messages = []
    with Client("http://127.0.0.1:1") as client:
        doors: list[Callable[[], object]] = [
            lambda: client.classify([value]),
            lambda: client.embed([value]),
            lambda: predict(bundle_path, [value], threads=1),
        ]
        for door in doors:
            with pytest.raises(DataError, match=reason) as caught:
                door()
            messages.append(str(caught.value))

    assert len(set(messages)) == 1
    assert "\n" not in messages[0]


def test_what_must_be_awaited_and_a_batch_are_not_a_single_image() -> None:
    class Upload:
        async def read(self) -> bytes:
            return await asyncio.sleep(0, b"")

    for value, reason in ((Upload(), "must be awaited"), (WIDE[None], r"give list\(array\)")):
        with Client("http://127.0.0.1:1") as client, pytest.raises(DataError, match=reason):
            client.classify(value)  # type: ignore[call-overload]


def test_a_picture_that_is_cut_off_is_an_error_of_that_image(bundle_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (90, 90, 3), dtype=np.uint8)
    cut = encoded(Image.fromarray(noise), "JPEG")[:2000]
    answers = predict(bundle_path, [cut, Image.open(io.BytesIO(cut)), WIDE], threads=1)
    codes = [None if each.error is None else each.error.code for each in answers]

    assert codes == ["truncated_image", "truncated_image", None]
    with (
        Client("http://127.0.0.1:1") as client,
        pytest.raises(SopdeployError, match="truncated"),
    ):
        client.classify(Image.open(io.BytesIO(cut)))


def test_files_are_sent_unchanged(tmp_path: Path) -> None:
    body = FILES["JPEG turned by 6"]
    (tmp_path / "a.jpg").write_bytes(body)

    assert encode_image(tmp_path / "a.jpg") == encode_image(io.BytesIO(body)) == body
