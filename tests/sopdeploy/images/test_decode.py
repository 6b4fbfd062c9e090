"""The one way from bytes to pixels: who uses it, at which scale it decodes, and what old rules give."""

import ast
import hashlib
import io
from random import Random
from typing import get_args

import numpy as np
import pytest
from PIL import Image

from sopdeploy.base.seeds import derive_seed
from sopdeploy.bundle.golden import draw_jpegs
from sopdeploy.data.augment import AugmentedDataset, RandomResizedCrop
from sopdeploy.data.photos.photo import ImageFiles, Photo
from sopdeploy.errors import DataError, ImageError
from sopdeploy.images import decode as module
from sopdeploy.images.decode import decode
from sopdeploy.images.metadata import copy_without_metadata
from sopdeploy.images.pixels import TURNS, center_view, preprocess_image
from sopdeploy.images.preprocess import Decoding, Fit, Preprocess
from tests.support.pictures import chunk
from tests.support.rooms import ROOT

FULL, SCALED, FAST = (Preprocess(decoding=name) for name in get_args(Decoding))
OPENS = {"open_image", "load_pixels", "draft"}  # and `Image.open`
# What opens a file, and why: for a network, only `decode` does.
ALLOWED = {
    "sopdeploy/images/decode.py": "the one way",
    "sopdeploy/images/formats.py": "opens for it",
    "sopdeploy/images/metadata.py": "copies a file without its metadata",
    "sopdeploy/data/photos/photo.py": "reads the header",
    "export/sopdeploy_export/pixels/transform.py": "gives a transform what its training read",
}
FITS = {"preprocess_image"}
FITS_ALLOWED = {
    "sopdeploy/images/decode.py": "the one way",
    "sopdeploy/data/photos/photo.py": "arrays, which are not files",
}


def calls(names: set[str]) -> dict[str, set[str]]:
    """Return the files of the rooms that call one of *names*, or `Image.open`, and what they call."""
    found: dict[str, set[str]] = {}
    for room in ("sopdeploy", "export", "service", "commands", "plugins"):
        for path in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if not isinstance(node, ast.Call):
                    continue
                text = ast.unparse(node.func)
                name = "Image.open" if text == "Image.open" else text.rpartition(".")[2]
                if name in names:
                    found.setdefault(path.relative_to(ROOT).as_posix(), set()).add(name)
    return found


def test_nothing_else_opens_a_file_for_a_network() -> None:
    assert calls(OPENS | {"Image.open"}).keys() == ALLOWED.keys()
    assert calls(FITS).keys() == FITS_ALLOWED.keys()


def photograph(width: int = 640, height: int = 480, **options: object) -> bytes:
    noise = np.random.default_rng(0).integers(
        0, 256, (height // 16, width // 16, 3), dtype=np.uint8
    )
    file = io.BytesIO()
    image = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
    image.convert(options.pop("mode", "RGB")).save(file, options.pop("kind", "JPEG"), **options)
    return file.getvalue()


def code_of(call) -> str:
    try:
        call()
    except (DataError, ImageError) as error:
        return (
            getattr(error.__cause__, "code", error.code)
            if isinstance(error, DataError)
            else error.code
        )
    return ""


BODIES = {
    "baseline": photograph(),
    "progressive": photograph(progressive=True),
    "gray": photograph(mode="L"),
}
BODIES |= {"cmyk": photograph(mode="CMYK"), "restarts": photograph(restart_marker_rows=1)}
BODIES |= {kind: photograph(kind=kind) for kind in ("PNG", "WEBP", "BMP")}


@pytest.mark.parametrize(
    "rules", [FULL, SCALED, FAST, Preprocess(crop=32, decoding="fast")], ids=str
)
@pytest.mark.parametrize("name", BODIES)
def test_what_one_refuses_of_a_cut_file_all_refuse(name: str, rules: Preprocess) -> None:
    body = BODIES[name]
    for part in (0.5, 0.9, 0.99, 1):
        for end in (b"", b"\xff\xd9"):
            cut = body[: int(len(body) * part)] + end
            expected = code_of(lambda cut=cut: decode(cut, FULL))
            assert code_of(lambda cut=cut: decode(cut, rules)) == expected
            assert code_of(lambda cut=cut: Photo("a", cut).preprocess(rules)) == expected
            assert code_of(lambda cut=cut: Photo("a", cut).check()) == expected
            assert code_of(lambda cut=cut: Photo("a", cut).pixels) == expected


def test_a_check_changes_nothing_that_others_read() -> None:
    photo = Photo("a", photograph(1300, 1100))
    expected = Photo("a", photo.content)
    photo.check()

    assert photo.image.size == expected.image.size == (1300, 1100)
    assert photo.pixels.size == expected.pixels.size == (650, 550)
    assert np.array_equal(photo.preprocess(FULL), expected.preprocess(FULL))


# Size, rules, scale
SCALES = {
    "a phone": ((4032, 3024), SCALED, 4),
    "48 megapixels": ((8064, 6048), SCALED, 8),
    "both sides have exactly twice the pixels": ((1024, 1024), SCALED, 2),
    "one side has one less": ((1024, 1023), SCALED, 1),
    "a usual photograph": ((500, 375), SCALED, 1),
    "a small network": ((500, 375), Preprocess(crop=32, decoding="scaled"), 4),
    "a strip": ((20_000, 100), SCALED, 1),
    "padded": ((4032, 3024), Preprocess(fit="pad", decoding="scaled"), 8),
    "squashed": ((4032, 1100), Preprocess(fit="squash", decoding="scaled"), 2),
}


@pytest.mark.parametrize(("size", "rules", "scale"), SCALES.values(), ids=SCALES)
def test_the_smallest_scale_keeps_twice_the_resized_sides(size, rules, scale) -> None:
    for sides in (size, size[::-1]):
        assert center_view(sides, rules).scale == scale


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("fit", get_args(Fit))
@pytest.mark.parametrize("decoding", ["scaled", "fast"])
def test_a_scaled_photograph_of_any_orientation_shows_what_the_full_one_does(
    fit, orientation, decoding
) -> None:
    exif = Image.Exif()
    exif[0x112] = orientation
    body = photograph(643, 487, exif=exif, quality=95)
    rules = Preprocess(resize=50, crop=40, fit=fit)
    scaled = decode(body, rules.model_copy(update={"decoding": decoding}))
    full = decode(body, rules)

    assert scaled.warnings == full.warnings

    difference = np.abs(scaled.pixels.astype(int) - full.pixels)
    assert difference.mean() < 2  # a box that is off by a pixel differs by more than 4
    assert difference.max() < 12


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_without_a_smaller_scale_the_box_has_all_pixels(kind: str) -> None:
    body = photograph(90, 70, kind=kind)
    rules = Preprocess(resize=60, crop=40)
    scaled = decode(body, rules.model_copy(update={"decoding": "scaled"})).pixels

    assert np.abs(scaled.astype(int) - decode(body, rules).pixels).max() <= 1


def test_a_scaled_decoder_allocates_a_sixteenth(monkeypatch) -> None:
    sizes = []
    fit = module.preprocess_image

    def record(image: Image.Image, *more: object) -> object:
        sizes.append(image.size)
        return fit(image, *more)

    monkeypatch.setattr(module, "preprocess_image", record)
    for rules in (SCALED, FULL):
        decode(photograph(2560, 2049), rules)

    assert sizes == [(640, 513), (2560, 2049)]


@pytest.mark.parametrize("decoding", get_args(Decoding))
def test_random_boxes_come_from_the_size_in_the_header(tmp_path, decoding) -> None:
    exif = Image.Exif()
    exif[0x112] = 6
    (tmp_path / "a.jpg").write_bytes(photograph(800, 600, exif=exif))
    images = ImageFiles(tmp_path, ("a", "b"), np.asarray([b"a.jpg"]), np.zeros(1, np.int64))
    augmentation = RandomResizedCrop(kind="random-resized-crop")
    rules = Preprocess(crop=40, decoding=decoding)
    upright = Image.open(tmp_path / "a.jpg").convert("RGB").transpose(TURNS[6])

    for epoch in range(3):
        data = AugmentedDataset(
            images, augmentation=augmentation, preprocess=rules, seed=0, epoch=epoch
        )
        random = Random(derive_seed(0, "augment", epoch, 0))
        box = augmentation.box(upright.size, 40, random)
        expected = np.asarray(
            upright.resize((40, 40), Image.Resampling.BILINEAR, box=box)
        ).astype(int)
        difference = np.abs(data.pixels([0])[0] - expected)
        assert difference.max() <= (0 if decoding == "full" else 20)
        assert difference.mean() < 2


def test_rules_that_are_full_are_written_as_before() -> None:
    assert "decoding" not in FULL.model_dump_json()
    assert Preprocess.model_validate_json(FULL.model_dump_json()) == FULL
    assert '"decoding":"scaled"' in SCALED.model_dump_json()
    assert Preprocess.model_validate_json(SCALED.model_dump_json()) == SCALED


# sha256 of the pixels of golden examples: of 9d5a1106 for "full", of 0.3.0 for "scaled"
OLD_PIXELS = {
    ("full", "crop"): "98d60c00fe3ad5a9",
    ("full", "pad"): "f69f33c477dfdc20",
    ("full", "squash"): "1f8854cdf12524d0",
    ("full", "squash-crop"): "42a9afed6f83c494",
    ("scaled", "crop"): "1cae6fd6ee613e61",
    ("scaled", "pad"): "1a639ec40c22b36b",
    ("scaled", "squash"): "602c0dcfdacab7d5",
    ("scaled", "squash-crop"): "0131646d64caaf02",
}


@pytest.mark.parametrize(("decoding", "fit"), OLD_PIXELS)
def test_old_rules_keep_every_pixel(decoding: str, fit: str) -> None:
    rules = Preprocess(resize=36, crop=32, fit=fit, decoding=decoding)
    bodies = draw_jpegs(rules)
    digest = hashlib.sha256(
        b"".join(decode(body, rules).pixels.tobytes() for body in bodies)
    ).hexdigest()

    assert digest[:16] == OLD_PIXELS[decoding, fit]


def test_a_golden_example_notices_a_wrong_scale() -> None:
    rules = Preprocess(resize=36, crop=32, decoding="scaled")
    *_, large = draw_jpegs(rules)
    full = decode(large, rules.model_copy(update={"decoding": "full"})).pixels

    assert np.abs(decode(large, rules).pixels.astype(int) - full).max() > 1
    assert "exif_rotated" in decode(large, rules).warnings


def test_an_image_in_memory_is_cropped_as_a_file_is() -> None:
    body = photograph(90, 70, kind="PNG")
    rules = Preprocess(resize=60, crop=40, decoding="scaled")

    assert np.array_equal(
        preprocess_image(Image.open(io.BytesIO(body)), rules), decode(body, rules).pixels
    )


def test_a_copy_without_metadata_has_the_pixels_of_its_original() -> None:
    body = photograph(1300, 1100)
    copy, _ = copy_without_metadata(body)

    assert np.array_equal(decode(copy, SCALED).pixels, decode(body, SCALED).pixels)


def animation(kind: str) -> bytes:
    frames = [
        Image.radial_gradient("L").convert("RGB"),
        Image.linear_gradient("L").convert("RGB"),
    ]
    file = io.BytesIO()
    frames[0].save(file, kind, save_all=True, append_images=frames[1:], duration=50)
    return file.getvalue()


def with_chunk(name: bytes, data: bytes) -> bytes:
    """Replace the first chunk *name* of an animated PNG."""
    body = animation("PNG")
    begin = body.index(name) - 4
    return (
        body[:begin]
        + chunk(name, data)
        + body[begin + 12 + int.from_bytes(body[begin : begin + 4]) :]
    )


def with_control(content: bytes) -> bytes:
    """Replace the first graphic control block of an animated GIF."""
    body = animation("GIF")
    begin = body.index(b"!\xf9\x04")
    return body[:begin] + b"!\xf9" + content + body[begin + 8 :]


MORE_FRAMES = {
    "PNG": ("PNG", lambda: animation("PNG")),
    "PNG, billions of frames": ("PNG", lambda: with_chunk(b"acTL", b"\x7f\xff\xff\xff" * 2)),
    "PNG, frame without data": ("PNG", lambda: with_chunk(b"fdAT", b"\0")),
    "GIF": ("GIF", lambda: animation("GIF")),
    "GIF, long control": ("GIF", lambda: with_control(b"\7" + bytes(8))),
}


@pytest.mark.parametrize("name", MORE_FRAMES)
def test_of_an_animation_the_first_frame_is_read_with_a_warning(name: str) -> None:
    kind, make = MORE_FRAMES[name]
    decoded = decode(make(), FULL)
    intact = decode(animation(kind), FULL)

    assert np.array_equal(decoded.pixels, intact.pixels)
    assert "first_frame_only" in decoded.warnings


@pytest.mark.parametrize("decoding", ["full", "scaled"])
def test_an_image_is_turned_only_if_the_rules_say_so(decoding: str) -> None:
    exif = Image.Exif()
    exif[0x112] = 6
    turned = Preprocess(decoding=decoding)
    as_stored = turned.model_copy(update={"exif_orientation": False})
    plain = decode(photograph(), turned).pixels

    assert np.array_equal(decode(photograph(exif=exif), as_stored).pixels, plain)
    assert not np.array_equal(decode(photograph(exif=exif), turned).pixels, plain)
