"""Which images are accepted and the right pixels; `preprocess.fit` from training to the client."""

import socket
import time
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from sopdeploy.data.augment import AugmentedDataset, CenterCrop, RandomResizedCrop, RandomSide
from sopdeploy.data.folders.evaluation_images import open_evaluation_images
from sopdeploy.data.photos.network_inputs import PreprocessedDataset
from sopdeploy.data.photos.photo import ArrayImages
from sopdeploy.errors import ImageError
from sopdeploy.images.decode import decode
from sopdeploy.images.limits import FORMATS
from sopdeploy.images.pixels import preprocess_image
from sopdeploy.images.preprocess import Fit, Preprocess
from sopdeploy_commands import predict as predict_command
from sopdeploy_export.lower.accuracy import calibration_images
from sopdeploy_service.decoding.child import receive
from sopdeploy_service.inference.loader import LoadedModel
from sopdeploy_service.settings import Settings
from tests.support import hostile_images as hostile
from tests.support.fake_runtime import FakeRuntime
from tests.support.pictures import encoded
from tests.support.service import running

RULES = Preprocess(resize=36, crop=32)
ROWS, COLUMNS = np.mgrid[0:60, 0:90]

# Every pixel has another color.
GRADIENT = Image.fromarray(
    np.stack([ROWS * 4, COLUMNS * 2, 255 - ROWS - COLUMNS], axis=-1).astype(np.uint8)
)


def pixels_of(body: bytes) -> NDArray[np.uint8]:
    return decode(body, RULES, max_bytes=1_000_000, max_pixels=1_000_000).pixels


def test_every_accepted_format_gives_the_same_image() -> None:
    for kind in FORMATS.values():
        found = pixels_of(encoded(GRADIENT, kind, quality=95)).astype(int)
        difference = np.abs(found - preprocess_image(GRADIENT, RULES)).mean()

        assert difference <= (0 if kind in {"PNG", "BMP"} else 8), kind


FAR_EXIF = b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12\0\3\xff\xff\xff\xff"  # points nowhere
DAMAGED = [{"exif": b"Exif\0\0garbage"}, {"exif": FAR_EXIF}, {"icc_profile": b"garbage" * 20}]


@pytest.mark.filterwarnings("ignore:Corrupt EXIF:UserWarning")
@pytest.mark.parametrize("options", DAMAGED)
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_damaged_metadata_and_trailing_bytes_are_ignored(
    kind: str, options: dict[str, bytes]
) -> None:
    found = pixels_of(encoded(GRADIENT, kind, quality=95, **options) + bytes(1000))
    np.testing.assert_array_equal(found, pixels_of(encoded(GRADIENT, kind, quality=95)))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation_is_decoded(kind: str) -> None:
    frames = [Image.new("RGB", (40, 40), color) for color in [(250, 0, 0), (0, 0, 250)]]
    found = pixels_of(encoded(frames[0], kind, save_all=True, append_images=frames[1:]))

    assert found[..., 0].mean() > 200
    assert found[..., 2].mean() < 50


LIMITS = {"max_bytes": 10**6, "max_pixels": 10**6}

VARIANTS = {
    "baseline": ("RGB", {}),
    "progressive": ("RGB", {"progressive": True}),
    "restart markers per block": ("RGB", {"restart_marker_blocks": 1}),
    "gray": ("L", {}),
    "CMYK": ("CMYK", {}),
}


def encode_jpeg(image: Image.Image, variant: str, quality: int = 80) -> bytes:
    mode, options = VARIANTS[variant]
    return encoded(image.convert(mode), "JPEG", quality=quality, **options)


def noise_image(size: tuple[int, int] = (160, 96)) -> Image.Image:
    grid = np.random.default_rng(0).normal(128, 90, (24, 40)).clip(0, 255).astype(np.uint8)
    noise = Image.fromarray(grid).resize(size, Image.Resampling.BICUBIC)
    return Image.merge(
        "RGB",
        [noise, noise.transpose(Image.Transpose.ROTATE_180), noise.point(lambda v: 255 - v)],
    )


def test_a_jpeg_with_the_arithmetic_code_is_read_unless_it_is_cut() -> None:
    body = (
        b"\xff\xd8"
        + hostile.segment(0xDB, bytes(1) + b"\1" * 64)
        + hostile.segment(0xC9, b"\x08\0\x08\0\x08\1\1\x11\0")  # gray, 8 x 8 pixels
        + hostile.segment(0xCC, b"\0\x10\x10\x05")
        + hostile.segment(0xDA, b"\1\1\0\0?\0")
        + b"\xff\0\xc5\xd7\xf14[\xfa+O\xcaZ\t\x96i\xcb\xff\xd9"
    )
    decode(body, RULES, **LIMITS)

    with pytest.raises(ImageError, match="damaged"):
        decode(body[:-6], RULES, **LIMITS)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_jpeg_that_was_cut_is_truncated(variant: str) -> None:
    body = encode_jpeg(noise_image(), variant)
    decode(body, RULES, **LIMITS)

    for end in (len(body) // 2, len(body) * 9 // 10, len(body) - 3):
        with pytest.raises(ImageError, match="truncated") as caught:
            decode(body[:end], RULES, **LIMITS)
        assert (caught.value.code, caught.value.status) == ("truncated_image", 422)


BACKGROUND = (10, 200, 30)
FITS = get_args(Fit)


def rules_for(fit):
    return Preprocess(resize=36, crop=32, fit=fit, background=BACKGROUND)


def noise(width, height, channels=3):
    values = np.random.default_rng(width + height).integers(
        0, 256, (height, width, channels), dtype=np.uint8
    )
    return Image.fromarray(values)


TURNED = Image.Exif()
TURNED[0x0112] = 6
IMAGES = {
    "portrait.jpg": encoded(noise(61, 93), "JPEG"),
    "square.png": encoded(noise(32, 32)),
    "strip.png": encoded(noise(1, 900)),
    "rotated.jpg": encoded(noise(91, 60), "JPEG", exif=TURNED),
    "sixteen bit.png": encoded(
        Image.fromarray(np.asarray(noise(70, 41))[..., 0].astype(np.uint16) * 250)
    ),
    "transparent.png": encoded(noise(50, 80, 4)),
    "large.jpg": encoded(noise(700, 500), "JPEG"),
}


class Recorder(FakeRuntime):
    """Keeps every image that it runs."""

    def __init__(self):
        super().__init__(num_classes=7)
        self.seen = []

    def run(self, images):
        self.seen += list(images.copy())
        return super().run(images)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for number, (name, body) in enumerate(sorted(IMAGES.items())):
        path = folder / "ab"[number % 2] / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(body)
    return folder


@pytest.mark.parametrize("fit", FITS)
def test_training_calibration_predict_service_and_client_see_the_same_pixels(
    bundle, folder, monkeypatch, fit
):
    rules = rules_for(fit)
    settings = Settings(threads=1)
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    images = open_evaluation_images(folder, ("a", "b"))
    names = [images.path(index).name for index in range(len(images))]
    evaluation = PreprocessedDataset(images, rules)
    training = AugmentedDataset(images, CenterCrop(kind="center"), rules, 0, 0)
    expected = dict(zip(names, evaluation.pixels(range(len(names))), strict=True))
    found = {"training": list(training.pixels([names.index(path.name) for path in paths]))}
    found["calibration"] = list(calibration_images(folder, rules))
    changed = replace(bundle, manifest=bundle.manifest.model_copy(update={"preprocess": rules}))
    recorder = Recorder()
    loaded = LoadedModel(bundle=changed, runtime=recorder, replays={})
    monkeypatch.setattr(predict_command, "load_model", lambda *_: loaded)
    predict_command.predict(bundle.path, paths, threads=1)
    found["predict"], recorder.seen = recorder.seen, []

    with running(recorder, changed, settings) as client:
        shown = client.get("/info").json()["models"][0]["preprocess"]
        for path in paths:
            assert client.post("/v1/classify", content=path.read_bytes()).status_code == 200
        found["service"], recorder.seen = recorder.seen, []
        at_client = Preprocess(**shown)

        for path in paths:
            with Image.open(path) as image:
                pixels = preprocess_image(image, at_client)
            tensor = {"name": "images", "shape": [1, 32, 32, 3], "datatype": "UINT8"}
            tensor["data"] = pixels.ravel().tolist()
            assert (
                client.post("/v2/models/tiny/infer", json={"inputs": [tensor]}).status_code
                == 200
            )

        found["client"] = recorder.seen

    for where, pixels in found.items():
        assert len(pixels) == len(paths) == len(IMAGES), where
        for path, values in zip(paths, pixels, strict=True):
            assert np.array_equal(values, expected[path.name]), (where, path.name)


# Size of the image: its box in the padded one
PADDED = {
    (64, 32): (0, 8, 32, 16), (32, 64): (8, 0, 16, 32), (5, 5): (0, 0, 32, 32), (1, 900): (16, 0, 1, 32),
}  # fmt: skip


def test_pad_centers_the_whole_image_on_the_background():
    for size, (left, top, width, height) in PADDED.items():
        pixels = preprocess_image(Image.new("RGB", size, (200, 100, 50)), rules_for("pad"))
        expected = np.full((32, 32, 3), BACKGROUND, np.uint8)
        expected[top : top + height, left : left + width] = (200, 100, 50)

        assert np.array_equal(pixels, expected)


@pytest.mark.parametrize("fit", [fit for fit in FITS if fit != "crop"])
def test_boxes_of_the_augmentation_are_drawn_in_the_square_that_evaluation_sees(fit):
    rules = rules_for(fit)
    whole = RandomResizedCrop(kind="random-resized-crop", scale=(1.0, 1.0), ratio=(1.0, 1.0))
    kept = RandomSide(kind="random-side", sides=(32, 32))
    images = ArrayImages(("a",), np.asarray(GRADIENT)[None], np.zeros(1, np.int64))
    expected = preprocess_image(GRADIENT, rules).astype(int)

    for augmentation in (whole, kept):
        (pixels,) = AugmentedDataset(images, augmentation, rules, seed=0, epoch=0).pixels([0])
        assert np.median(np.abs(pixels - expected)) <= 2  # a box is resized twice


def test_a_process_that_sends_slowly_is_left_at_the_deadline() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"reply")
        assert receive(ours, 2, time.monotonic() + 60) == b"re"
        with pytest.raises(TimeoutError):
            receive(ours, 3, time.monotonic() - 1)
