"""The estimated cost of an image counts what decoding allocates; costly files are refused early."""

import hostile_images as hostile
import pytest

from sopdeploy.errors import ImageError
from sopdeploy.images.cost import decode_cost
from sopdeploy.images.formats import open_image
from sopdeploy.images.limits import FORMATS
from tests.counted import counted

SIZE = (2400, 2000)
# Bytes per pixel that decoding allocates at once: Pillow's image, and the larger of its copy in RGB and the
# decoder's own buffers, such as 2 bytes per coefficient of a progressive JPEG. libwebp keeps RGBA twice.
BYTES_PER_PIXEL = {
    "JPEG": (lambda: hostile.jpeg(*SIZE), 4),
    "JPEG gray": (lambda: hostile.jpeg(*SIZE, components=1), 1 + 4),
    "JPEG CMYK progressive": (lambda: hostile.jpeg(*SIZE, components=4, scans=4), 4 + 4 * 2),
    "JPEG progressive": (lambda: hostile.jpeg(*SIZE, sampling=0x22, scans=9), 4 + 1.5 * 2),
    "PNG": (lambda: hostile.png(*SIZE), 4),
    "PNG palette interlaced": (lambda: hostile.png(*SIZE, color=3, interlaced=True), 1 + 4),
    "PNG 16 bit RGBA": (lambda: hostile.png(*SIZE, depth=16, color=6), 4 + 4),
    "PNG 16 bit gray": (lambda: hostile.png(*SIZE, depth=16, color=0), 2 + 4),
    "WebP lossless": (lambda: hostile.webp_lossless(*SIZE), 4 + 2 * 4),
    "WebP lossy with alpha": (lambda: hostile.webp_alpha(*SIZE), 4 + 2 * 4),
}


@pytest.mark.parametrize("name", BYTES_PER_PIXEL)
def test_the_estimate_of_memory_has_every_buffer_and_little_more(name: str) -> None:
    make, expected = BYTES_PER_PIXEL[name]
    body = make()
    per_pixel = decode_cost(open_image(body), body).memory / (SIZE[0] * SIZE[1])
    assert expected <= per_pixel <= 1.6 * expected


def test_every_format_has_factors() -> None:
    from sopdeploy.images.cost import FACTORS

    assert set(FACTORS) == set(FORMATS.values())


@pytest.mark.parametrize(
    ("body", "least_ms", "most_ms"),
    [
        (hostile.jpeg(500, 375), 0, 10),
        (hostile.jpeg(4000, 3000, sampling=0x22), 80, 350),  # as a photograph of a phone
        (hostile.jpeg(3000, 2000, sampling=0x22, scans=98), 100, 1000),
        (hostile.jpeg(4000, 3000, sampling=0x22, scans=98, refine=True), 1000, 5000),
    ],
    ids=["small", "photograph", "98 scans", "98 refining scans"],
)
def test_scans_count_as_work(body: bytes, least_ms: float, most_ms: float) -> None:
    assert least_ms <= decode_cost(open_image(body), body).ms <= most_ms


EXIF_BOMB = (
    b"Exif\0\0II*\0\x08\0\0\0"
    + b"\x88\x13"
    + b"".join(
        number.to_bytes(2, "little") + b"\x07\0" + (60_000).to_bytes(4, "little") + b"\x08\0\0\0"
        for number in range(5000)
    )
)
REFUSED = {
    "a PNG of one column": (lambda: hostile.png(1, 1_000_000, color=0), "too_many_pixels"),
    "scans of 11 seconds": (lambda: hostile.jpeg(8000, 8000, scans=98, refine=True), "damaged_image"),
    "19 MB of EXIF": (lambda: hostile.jpeg(64, 64, extra=hostile.exif(19)), "too_large"),
    "64 kB of EXIF that need 300 MB": (
        lambda: hostile.jpeg(64, 64, extra=hostile.segment(0xE1, EXIF_BOMB)),
        "too_large",
    ),
    "19 MB of empty segments": (
        lambda: hostile.jpeg(64, 64, extra=hostile.segment(0xE5, bytes(1900)) * 9_900),
        "damaged_image",
    ),
    "a PNG with 15 MB of text": (
        lambda: hostile.png(64, 64, extra=hostile.chunk(b"tEXt", b"a\0" + bytes(15_000_000))),
        "too_large",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_costs_more_than_its_pixels_is_refused_after_few_steps(name: str) -> None:
    make, code = REFUSED[name]
    body = make()

    def refuse() -> None:
        with pytest.raises(ImageError) as caught:
            open_image(body)
        assert caught.value.code == code

    cost = counted(refuse)
    assert cost.calls < 10_000
    assert cost.bytes < 2_000_000


@pytest.mark.parametrize("sampling", [0x11, 0x22], ids=["4:4:4", "4:2:0"])
def test_an_ordinary_progressive_file_of_64_megapixels_is_accepted(sampling: int) -> None:
    body = hostile.jpeg(9248, 6936, sampling=sampling, scans=9, refine=True)
    assert open_image(body).size == (9248, 6936)
