"""What images and children cost: light and large images, the plan of memory, and its limit."""

from io import BytesIO

import pytest
from PIL import Image

from sopdeploy.base import environment
from sopdeploy.images.cost import estimate_cost
from sopdeploy.images.limits import MAX_PIXELS
from sopdeploy.images.preprocess import Preprocess
from sopdeploy_service.inference.decoders import (
    LIGHT_BODY,
    LIGHT_MEMORY,
    LIGHT_PIXELS,
    OWN_MEMORY,
    PROPORTIONAL_BODY,
    light_seconds,
    plan_children,
)
from tests.support import hostile_images as hostile
from tests.support.service import picture_bytes

MIB = 1 << 20
# Budget and wanted children: light ones, large ones, memory of a large one
BUDGETS = {
    (500 * MIB, 2): (2, 1, 316 * MIB),  # a container of 1 GiB
    (1600 * MIB, 2): (2, 2, 704 * MIB),
    (10**11, 8): (8, 8, 1_400_000_000),
    (200 * MIB, 2): (1, 1, 104 * MIB),  # a second light child would take it from the large one
    (100 * MIB, 2): (1, 1, LIGHT_MEMORY),  # too little
}


def test_children_for_light_images_then_those_for_large_ones_share_the_budget(caplog) -> None:
    for (budget, wanted), expected in BUDGETS.items():
        light, large, memory = plan_children(budget, wanted, 70_000_000)
        assert (light, large, memory) == expected

        used = light * (LIGHT_MEMORY + OWN_MEMORY) + large * (memory + OWN_MEMORY)
        assert used <= budget or (light, large) == (1, 1)
        assert ("decoders" in caplog.text) == (light < wanted)


def photograph(**options: object) -> bytes:
    """Encode 12 megapixels of two colors, a small file."""
    file = BytesIO()
    Image.linear_gradient("L").convert("RGB").resize((4000, 3000)).save(file, "JPEG", **options)
    return file.getvalue()


def heic(width: int, height: int) -> bytes:
    """Write the start of a HEIC file that tells its size."""
    sizes = b"ispe" + bytes(4) + width.to_bytes(4) + height.to_bytes(4)
    return b"\0\0\0\x18ftypheic" + sizes


SCALED = Preprocess(decoding="scaled")
FULL = Preprocess()


# File, rules, length of the file if it had more metadata, whether it is light
LIGHT = {
    "a photograph at a quarter of its sides": (photograph, SCALED, LIGHT_BODY, True),
    "one that is decoded in full": (photograph, FULL, LIGHT_BODY, False),
    "one that needs its coefficients": (
        lambda: photograph(progressive=True),
        SCALED,
        LIGHT_BODY,
        False,
    ),
    "one of several scans": (
        lambda: hostile.jpeg(4000, 3000, scans=4),
        SCALED,
        LIGHT_BODY,
        False,
    ),
    "one of 70 megapixels": (lambda: hostile.jpeg(10_000, 7_000), SCALED, LIGHT_BODY, False),
    "a PNG": (lambda: picture_bytes(kind="PNG"), FULL, LIGHT_BODY, True),
    "a WebP of 24 megapixels": (
        lambda: hostile.webp_lossless(6000, 4000),
        FULL,
        LIGHT_BODY,
        False,
    ),
    "a HEIC": (lambda: heic(1024, 768), FULL, LIGHT_BODY, False),
    "one with more pixels than any decoder accepts": (
        lambda: heic(20_000, 10_000),
        FULL,
        LIGHT_BODY,
        True,
    ),
    "one that does not tell its size": (lambda: b"\0\0\0\x18ftypheic", FULL, LIGHT_BODY, True),
    "a JPEG with more pixels than any decoder accepts": (
        lambda: hostile.jpeg(20_000, 10_000),
        FULL,
        LIGHT_BODY,
        True,
    ),
}


@pytest.mark.parametrize("name", LIGHT)
def test_the_pixels_that_a_decoder_holds_decide_which_child_decodes(name) -> None:
    make, rules, length, is_light = LIGHT[name]
    cost = estimate_cost(make(), rules)

    assert (light_seconds(length, cost, MAX_PIXELS) > 0) == is_light


@pytest.mark.parametrize(
    "body",
    [picture_bytes(kind=kind) for kind in ("JPEG", "PNG", "GIF", "WEBP", "BMP")]
    + [b"\xff\xd8\xff\xc0\0\x11", b"\xff\xd8\xff\xda\0\x08"],
    ids=["JPEG", "PNG", "GIF", "WEBP", "BMP", "cut frame", "cut scan"],
)
def test_a_file_that_was_cut_anywhere_has_a_cost_or_none(body: bytes) -> None:
    head = body[:1000]
    for length in range(len(head) + 1):
        cost = estimate_cost(head[:length], SCALED)
        assert cost is None or cost.pixels > 0


SHORT_FILES = {
    "PNG": lambda: picture_bytes(kind="PNG"),
    "WebP": lambda: hostile.webp_codes(868, 868),
    "JPEG of many scans": lambda: hostile.jpeg(1000, 1000, scans=98),
}


@pytest.mark.parametrize("kind", SHORT_FILES)
def test_the_time_of_other_files_does_not_depend_on_their_length(kind: str) -> None:
    cost = estimate_cost(SHORT_FILES[kind](), SCALED)
    of_short, of_long = (light_seconds(size, cost, MAX_PIXELS) for size in (0, LIGHT_BODY))

    assert of_short == of_long < 0.16


def test_pixels_and_bytes_of_a_jpeg_limit_its_time() -> None:
    phone = estimate_cost(photograph(), SCALED)
    largest = phone._replace(pixels=LIGHT_PIXELS)
    many_scans = largest._replace(is_proportional=False)

    assert light_seconds(2_000_000, phone, MAX_PIXELS) == pytest.approx(0.1, abs=0.01)
    assert light_seconds(PROPORTIONAL_BODY, largest, MAX_PIXELS) == pytest.approx(0.27)
    assert light_seconds(LIGHT_BODY, many_scans, MAX_PIXELS) < 0.16


VERSION1 = "memory.limit_in_bytes"


# Groups of the process, files, limit
LIMITED = {
    "version 1": (
        "4:memory:/a/b\n0::/\n",
        {f"memory/a/{VERSION1}": 700, f"memory/a/b/{VERSION1}": 900},
        700,
    ),
    "version 1 in a container": ("4:memory:/host/path\n", {f"memory/{VERSION1}": 800}, 800),
    "version 2": ("0::/a/b\n", {"a/memory.max": 600, "a/b/memory.max": "max"}, 600),
    "version 2 in a container": ("0::/\n", {"memory.max": 500}, 500),
    "no limit": ("0::/\n", {}, 1000 * 1024),
}


@pytest.mark.parametrize(("groups", "files", "expected"), LIMITED.values(), ids=LIMITED)
def test_the_memory_limit_is_that_of_the_container(
    tmp_path, monkeypatch, groups, files, expected
) -> None:
    for name, value in files.items():
        (tmp_path / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fs" / name).write_text(str(value))
    (tmp_path / "cgroup").write_text(groups)
    (tmp_path / "meminfo").write_text("MemTotal:     1000 kB\nMemAvailable:  900 kB\n")
    monkeypatch.setattr(environment, "CGROUP", tmp_path / "fs")
    monkeypatch.setattr(environment, "PROCESS_CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(environment, "MEMINFO", tmp_path / "meminfo")

    assert environment.memory_limit() == expected
