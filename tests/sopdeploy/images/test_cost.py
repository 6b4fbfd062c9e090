"""The estimated cost of an image bounds the memory that decoding takes; costly files are refused early."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import hostile_images as hostile
import pytest
from PIL import features

from sopdeploy.errors import ImageError
from sopdeploy.images.cost import decode_cost
from sopdeploy.images.formats import open_image
from sopdeploy.images.limits import FORMATS

ROOT = Path(__file__).parents[3]
SIZE = (2400, 2000)
FILES = {
    "JPEG": lambda: hostile.jpeg(*SIZE),
    "JPEG gray": lambda: hostile.jpeg(*SIZE, components=1),
    "JPEG CMYK progressive": lambda: hostile.jpeg(*SIZE, components=4, scans=4),
    "JPEG progressive": lambda: hostile.jpeg(*SIZE, sampling=0x22, scans=9),
    "PNG": lambda: hostile.png(*SIZE),
    "PNG palette interlaced": lambda: hostile.png(*SIZE, color=3, interlaced=True),
    "PNG 16 bit RGBA": lambda: hostile.png(*SIZE, depth=16, color=6),
    "PNG 16 bit gray": lambda: hostile.png(*SIZE, depth=16, color=0),
    "WebP lossless": lambda: hostile.webp_lossless(*SIZE),
    "WebP lossy with alpha": lambda: hostile.webp_alpha(*SIZE),
    "PPM": lambda: b"P6 2400 2000 255\n" + bytes(3 * 2400 * 2000),
}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak of the memory")
def test_the_estimate_bounds_the_memory_of_every_format(tmp_path: Path) -> None:
    for name, make in FILES.items():
        (tmp_path / name).write_bytes(make())
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "benchmarks/decode_cost.py", "--json", "--folder", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        check=True,
    )
    rows = [row for row in json.loads(done.stdout)["results"] if row["unit"] == "MB"]
    assert {row["case"] for row in rows} == set(FILES)
    for row in rows:
        assert row["ours"] - 1 <= row["other"] <= 1.6 * row["ours"], row


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


def film_grain() -> bytes:
    options = {"speed": 10, "codec": "aom", "advanced": {"film-grain-test": "1"}}
    return hostile.encoded("AVIF", "RGB", 64, 64, **options)


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
def test_a_file_that_costs_more_than_its_pixels_is_refused_at_once(name: str) -> None:
    make, code = REFUSED[name]
    body = make()
    seconds = []
    for _ in range(5):  # the least is that without other processes
        started = time.thread_time()
        with pytest.raises(ImageError) as caught:
            open_image(body)
        seconds.append(time.thread_time() - started)
        assert caught.value.code == code
    assert min(seconds) < 0.1


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow does not read AVIF")
def test_film_grain_is_refused() -> None:
    plain = hostile.encoded("AVIF", "RGB", 64, 64, speed=10)
    assert open_image(plain).size == (64, 64)
    with pytest.raises(ImageError, match="film grain"):
        open_image(film_grain())


@pytest.mark.parametrize("sampling", [0x11, 0x22], ids=["4:4:4", "4:2:0"])
def test_an_ordinary_progressive_file_of_64_megapixels_is_accepted(sampling: int) -> None:
    body = hostile.jpeg(9248, 6936, sampling=sampling, scans=9, refine=True)
    assert open_image(body).size == (9248, 6936)
