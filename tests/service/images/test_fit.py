"""`preprocess.fit`: the same pixels in training, probes, `predict`, service and client."""

from dataclasses import replace

import numpy as np
import pytest
from fake_runtime import FakeRuntime
from PIL import Image

from sopdeploy.data.augment import AugmentedDataset, CenterCrop, RandomResizedCrop, RandomSide
from sopdeploy.data.base import PreprocessedDataset
from sopdeploy.data.datasets.layouts import open_evaluation_images
from sopdeploy.images.pixels import preprocess_image, visible_box
from sopdeploy.images.preprocess import Preprocess
from sopdeploy_export.precision.accuracy_gate import calibration_images
from sopdeploy_service.commands import predict as predict_command
from sopdeploy_service.inference.loader import LoadedModel
from sopdeploy_service.settings import Settings
from tests.pictures import encoded
from tests.service.conftest import running

BACKGROUND = (10, 200, 30)
FITS = ("crop", "pad", "squash")


def rules_for(fit):
    return Preprocess(resize=36, crop=32, fit=fit, background=BACKGROUND)


def picture(size=(90, 60), kind="JPEG", mode="RGB", orientation=1):
    values = np.random.default_rng(sum(size)).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(values).resize(size, Image.Resampling.BICUBIC)
    if mode == "I;16":
        image = Image.fromarray(values[..., 0].astype(np.uint16) * 250)
    elif mode == "RGBA":
        image.putalpha(Image.fromarray(values[..., 1]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(image, kind, **({"exif": exif.tobytes()} if orientation > 1 else {}))


IMAGES = {
    "portrait.jpg": picture((61, 93)),
    "square.png": picture((32, 32), "PNG"),
    "strip.png": picture((1, 900), "PNG"),
    "rotated.jpg": picture((91, 60), orientation=6),
    "sixteen bit.png": picture((70, 41), "PNG", "I;16"),
    "transparent.png": picture((50, 80), "PNG", "RGBA"),
    "large.jpg": picture((700, 500)),
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
    rules, settings = rules_for(fit), Settings(threads=1)
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    images = open_evaluation_images(folder, ("a", "b"))
    names = [images.path(index).name for index in range(len(images))]
    evaluation = PreprocessedDataset(images, rules)
    training = AugmentedDataset(images, CenterCrop(kind="center"), rules, 0, 0)
    expected = {name: evaluation[index][0] for index, name in enumerate(names)}
    found = {"training": [training[names.index(path.name)][0] for path in paths]}
    found["calibration"] = list(calibration_images(folder, rules))
    changed = replace(bundle, manifest=bundle.manifest.model_copy(update={"preprocess": rules}))
    recorder = Recorder()
    loaded = LoadedModel(bundle=changed, runtime=recorder, replays={})
    monkeypatch.setattr(predict_command, "load_model", lambda *_: loaded)
    predict_command.predict_files(bundle.path, paths, settings)
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
            assert client.post("/v2/models/tiny/infer", json={"inputs": [tensor]}).status_code == 200
        found["client"] = recorder.seen
    for where, pixels in found.items():
        assert len(pixels) == len(paths) == len(IMAGES), where
        for path, values in zip(paths, pixels, strict=True):
            assert np.array_equal(values, expected[path.name]), (where, path.name)


@pytest.mark.parametrize(
    ("size", "inside"),
    [
        ((64, 32), (0, 8, 32, 16)),
        ((32, 64), (8, 0, 16, 32)),
        ((5, 5), (0, 0, 32, 32)),
        ((1, 900), (16, 0, 1, 32)),
    ],
)
def test_pad_shows_the_whole_image_centered_on_the_background(size, inside):
    pixels = preprocess_image(Image.new("RGB", size, (200, 100, 50)), rules_for("pad"))
    left, top, width, height = inside
    expected = np.full((32, 32, 3), BACKGROUND, np.uint8)
    expected[top : top + height, left : left + width] = (200, 100, 50)
    assert np.array_equal(pixels, expected)


@pytest.mark.parametrize(
    ("fit", "size", "box"),
    [
        ("crop", (72, 36), (20, 2, 52, 34)),
        ("crop", (36, 144), (2, 56, 34, 88)),
        ("pad", (64, 32), (0, -16, 64, 48)),
        ("pad", (8, 16), (-4, 0, 12, 16)),
        ("squash", (100, 40), (0, 0, 100, 40)),
    ],
)
def test_the_box_is_the_part_of_the_image_that_the_network_sees(fit, size, box):
    assert visible_box(size, rules_for(fit)) == pytest.approx(box)


@pytest.mark.parametrize("fit", ["pad", "squash"])
def test_boxes_of_the_augmentation_are_drawn_in_the_square_that_evaluation_sees(folder, fit):
    rules = rules_for(fit)
    whole = RandomResizedCrop(kind="random-resized-crop", scale=(1.0, 1.0), ratio=(1.0, 1.0))
    kept = RandomSide(kind="random-side", sides=(32, 32))
    images = open_evaluation_images(folder, ("a", "b"))
    for augmentation in (whole, kept, whole.model_copy(update={"draft": True})):
        training = AugmentedDataset(images, augmentation, rules, seed=0, epoch=0)
        for index in range(len(images)):
            pixels, expected = (
                training[index][0].astype(int),
                preprocess_image(images[index][0], rules).astype(int),
            )
            allowed = 8 if augmentation.draft else 0
            assert np.median(np.abs(pixels - expected)) <= allowed, images.path(index).name
