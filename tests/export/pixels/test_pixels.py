"""The pixels of a training, compared with those of a server: every usual transform, and every usual mistake."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torchvision import transforms
from torchvision.transforms import v2

from sopdeploy.errors import ConfigError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy_export.pixels.compare import PixelCheck, TrainedPixels
from sopdeploy_export.pixels.photos import KINDS, draw_photo
from sopdeploy_export.pixels.transform import Transform

SIDE = 32
COLORS: Any = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF: Any = ((0.5,) * 3, (0.5,) * 3)
BICUBIC = transforms.InterpolationMode.BICUBIC
RULES = Preprocess(resize=36, crop=SIDE)


def compose(*steps: Any, colors: Any = COLORS) -> Any:
    return transforms.Compose(
        [*steps, transforms.ToTensor(), *([transforms.Normalize(*colors)] if colors else [])]
    )


def center(side: int = 36, **options: Any) -> list[Any]:
    return [transforms.Resize(side, **options), transforms.CenterCrop(SIDE)]


def normalized(pixels: Any, colors: Any = COLORS) -> Tensor:
    tensor = torch.as_tensor(np.array(pixels)).permute(2, 0, 1).float() / 255
    return transforms.functional.normalize(tensor, *colors)


def sampled(array: Any) -> Tensor:
    """Resize like OpenCV's `resize`."""
    tensor = torch.as_tensor(np.array(array)).permute(2, 0, 1)[None].float()
    return interpolate(tensor, (SIDE, SIDE), mode="bilinear", align_corners=False)[0] / 255


def of_array(image: np.ndarray) -> Tensor:
    assert isinstance(image, np.ndarray)
    return transforms.functional.normalize(sampled(image), *COLORS)


def of_array_in_bgr(image: np.ndarray) -> Tensor:
    assert isinstance(image, np.ndarray)
    return transforms.functional.normalize(sampled(image).flip(0), *COLORS)


def of_path(path: str) -> Tensor:
    image = ImageOps.exif_transpose(Image.open(path))
    return compose(*center())(image.convert("RGB"))


def of_path_without_exif(path: str) -> Tensor:
    return compose(*center())(Image.open(path).convert("RGB"))


def of_albumentations(image: Any) -> dict[str, Tensor]:
    return {"image": of_array(image)}


class Processor:
    """Like an image processor of Transformers."""

    def __call__(self, images: Image.Image, return_tensors: str) -> dict[str, Tensor]:
        assert return_tensors == "pt"
        return {"pixel_values": compose(*center())(images)[None]}


Processor.__module__ = "transformers.models.vit"
TIMM: Any = {"input_size": (3, SIDE, SIDE), "interpolation": "bicubic"}
TRANSFORMS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "torchvision": (compose(*center()), {}),
    "torchvision, bicubic": (
        compose(*center(interpolation=BICUBIC)),
        {"interpolation": "bicubic"},
    ),
    "torchvision, squashed": (
        compose(transforms.Resize((SIDE, SIDE)), colors=HALF),
        {"fit": "squash", "mean": (0.5,), "std": (0.5,)},
    ),
    "torchvision, values from 0 to 1": (
        compose(*center(), colors=None),
        {"mean": (0.0,), "std": (1.0,)},
    ),
    "torchvision v2, tensors": (
        v2.Compose(
            [
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                *center(),
                v2.Normalize(*COLORS),
            ]
        ),
        {},
    ),
    "torchvision v2, not antialiased": (
        v2.Compose(
            [
                v2.ToImage(),
                v2.Resize((SIDE, SIDE), antialias=False),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(*COLORS),
            ]
        ),
        {"fit": "squash", "antialias": False},
    ),
    "torchvision, gray": (
        compose(transforms.Grayscale(1), *center(), colors=((0.5,), (0.25,))),
        {"channels": 1, "mean": (0.5,), "std": (0.25,)},
    ),
    "timm": (
        timm.data.create_transform(**TIMM, crop_pct=0.9),
        {"resize": 35, "interpolation": "bicubic"},
    ),
    "timm, a size that is found with its filter": (
        timm.data.create_transform((3, 96, 96), interpolation="bicubic", crop_pct=0.95),
        {"crop": 96, "resize": 101, "interpolation": "bicubic"},
    ),
    "a function of an unusual size": (
        lambda image: compose(transforms.Resize(43, BICUBIC), transforms.CenterCrop(SIDE))(
            image
        ),
        {"resize": 43, "interpolation": "bicubic"},
    ),
    "timm, squashed": (
        timm.data.create_transform(**TIMM, crop_pct=1.0, crop_mode="squash"),
        {"fit": "squash", "interpolation": "bicubic"},
    ),
    "timm, with a border": (
        timm.data.create_transform(**TIMM, crop_pct=1.0, crop_mode="border"),
        {"fit": "pad", "interpolation": "bicubic", "background": (124, 116, 104)},
    ),
    "an array": (of_array, {"fit": "squash", "antialias": False}),
    "an array, blue first": (
        of_array_in_bgr,
        {"fit": "squash", "antialias": False, "color_order": "BGR"},
    ),
    "an array of levels": (
        lambda image: 255 * sampled(np.array(image)),
        {"fit": "squash", "antialias": False, "mean": (0.0,), "std": (1 / 255,)},
    ),
    "a dict": (of_albumentations, {"fit": "squash", "antialias": False}),
    "a processor": (Processor(), {}),
    "a path": (of_path, {}),
    "a path, not turned": (of_path_without_exif, {"exif_orientation": False}),
    "a function that builds it": (lambda: compose(*center()), {}),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_rules_are_read_from_the_transform(name: str) -> None:
    call, fields = TRANSFORMS[name]
    expected = Preprocess(**{**RULES.model_dump(), **fields})
    trained = TrainedPixels(Transform(call))
    assert trained.describe(expected) == ()

    read = trained.read_rules()
    used = {"resize"} if "crop" not in expected.fit else set()
    for field in (
        "fit",
        "interpolation",
        "antialias",
        "color_order",
        "exif_orientation",
        "crop",
    ):
        assert getattr(read, field) == getattr(expected, field)
    assert read.channels == expected.channels
    assert read.mean == pytest.approx(expected.mean)
    assert read.std == pytest.approx(expected.std)
    assert used or read.resize == expected.resize


# A wrong rule, and the word by which the cause is told
MISTAKES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "mean": ("torchvision, squashed", {"fit": "squash"}, ("mean 0.5", "deviation 0.5")),
    "values": ("torchvision, values from 0 to 1", {}, ("mean 0", "deviation 1")),
    "levels": ("an array of levels", {"fit": "squash", "antialias": False}, ("mean 0", "255")),
    "squash": ("torchvision", {"fit": "squash"}, ("crops", "squashes")),
    "size before the crop": ("torchvision", {"resize": 40}, ("36", "40")),
    "size": ("torchvision", {"crop": 30}, ("32 x 32",)),
    "interpolation": ("torchvision, bicubic", {}, ("bicubic",)),
    "antialiasing": ("an array", {"fit": "squash"}, ("antialias",)),
    "order of colors": (
        "an array, blue first",
        {"fit": "squash", "antialias": False},
        ("BGR",),
    ),
    "turning": ("a path, not turned", {}, ("EXIF",)),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_the_cause_of_other_pixels_is_told(name: str) -> None:
    transform, fields, words = MISTAKES[name]
    rules = Preprocess(**{**RULES.model_dump(), **fields})
    told = TrainedPixels(Transform(TRANSFORMS[transform][0])).describe(rules)
    assert all(any(word in sentence for sentence in told) for word in words)
    assert len(told) == (2 if name in ("mean", "values", "levels") else 1)


def blurred(image: Image.Image) -> Tensor:
    return compose(*center(), transforms.GaussianBlur(9, 4.0))(image)


def standardized(image: Image.Image) -> Tensor:
    tensor = compose(*center(), colors=None)(image)
    return (tensor - tensor.mean()) / (tensor.std() + 1e-6)


def failing(image: Any) -> Tensor:
    raise ValueError(f"no {type(image).__name__}")


@pytest.mark.parametrize(
    "call",
    [
        failing,
        standardized,
        compose(transforms.RandomResizedCrop(SIDE)),
        compose(*center(), transforms.RandomHorizontalFlip()),
        compose(transforms.Resize(36)),  # no square
        compose(*center(), transforms.Grayscale(3)),
        lambda image: image.size,
        lambda image: torch.zeros(4, SIDE, SIDE),
        "timm",
    ],
)
def test_a_transform_that_no_rules_can_replace_is_refused(call: Any) -> None:
    with pytest.raises(ConfigError):
        TrainedPixels(Transform(call)).read_rules()


def test_a_step_that_rules_cannot_say_is_named() -> None:
    trained = TrainedPixels(Transform(compose(*center(), transforms.GaussianBlur(9, 4.0))))
    assert "GaussianBlur" in " ".join(trained.describe(RULES))
    with pytest.raises(ConfigError, match="GaussianBlur"):
        trained.read_rules()
    # A function cannot be looked into.
    assert len(TrainedPixels(Transform(blurred)).describe(RULES)) == 1


def test_the_order_of_an_array_follows_the_code_or_the_option() -> None:
    def converts(image: np.ndarray) -> Tensor:
        COLOR_BGR2RGB = slice(None, None, -1)  # as code with OpenCV names it
        return of_array(np.ascontiguousarray(image[..., COLOR_BGR2RGB]))

    assert Transform(of_array).takes == "rgb"
    assert TrainedPixels(Transform(of_array, takes="bgr")).colors.order == "BGR"
    assert TrainedPixels(Transform(converts, takes="bgr")).colors.order == "RGB"


@pytest.mark.parametrize(
    ("kind", "size"), [("a large photo", (160, 80)), ("a photo turned by EXIF", (80, 40))]
)
def test_drawn_photos_are_always_the_same(kind: str, size: tuple[int, int]) -> None:
    draw_photo.cache_clear()
    first = draw_photo(kind, SIDE)
    draw_photo.cache_clear()
    assert draw_photo(kind, SIDE) == first
    assert Image.open(io.BytesIO(first)).size == size
    assert {Image.open(io.BytesIO(draw_photo(each, SIDE))).mode for each in KINDS} == {
        *("RGB", "L", "RGBA", "CMYK")
    }


class Brightness(nn.Module):
    """A network that tells bright images from dark ones."""

    def forward(self, images: Tensor) -> Tensor:
        mean = images.mean((1, 2, 3))
        return torch.stack([mean, -mean], 1)


def plain_photos(*levels: int) -> Callable[[int], Iterator[bytes]]:
    files = []
    for level in levels:
        file = io.BytesIO()
        Image.new("RGB", (50, 40), (level,) * 3).save(file, "PNG")
        files.append(file.getvalue())
    return lambda most: iter(files[:most])


def test_changed_classes_are_counted() -> None:
    trained = TrainedPixels(Transform(compose(*center(), colors=HALF)))
    photos = plain_photos(0, 100, 120, 255)  # 120 is dark beside 0.5 and bright beside 0.45
    check = PixelCheck(trained, photos, allowed=True)
    compared = check.run(Brightness(), RULES, several_classes=False)
    assert (compared.num_images, compared.num_changed) == (4, 1)
    assert compared.differences
    assert compared.transform == "torchvision.transforms.transforms:Compose"

    with pytest.raises(ConfigError) as refused:
        PixelCheck(trained, photos, allowed=False).run(
            Brightness(), RULES, several_classes=False
        )
    assert refused.value.setting == "transform"
    assert refused.value.remedies == {"allow_other_pixels": True}

    right = trained.read_rules()
    compared = PixelCheck(trained, None, allowed=False).run(
        Brightness(), right, several_classes=True
    )
    assert (compared.num_images, compared.num_changed, compared.differences) == (4, 0, ())
    assert compared.largest_difference <= 1


def test_a_size_is_compared_before_the_network_runs() -> None:
    trained = TrainedPixels(Transform(compose(*center())))
    PixelCheck(trained, None, allowed=False).check_size(RULES)
    PixelCheck(trained, None, allowed=True).check_size(Preprocess(crop=30))
    with pytest.raises(ConfigError):
        PixelCheck(trained, None, allowed=False).check_size(Preprocess(crop=30))


def test_kinds_of_files_that_are_converted_otherwise_are_warned_of() -> None:
    def drops_transparency(path: str) -> Tensor:
        return compose(*center())(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))

    warnings = TrainedPixels(Transform(drops_transparency)).warn_of_kinds(RULES)
    assert len(warnings) == 1
    assert "transparency" in warnings[0]
    assert TrainedPixels(Transform(compose(*center()))).warn_of_kinds(RULES) == ()


def test_fast_decoding_is_no_other_transform(tmp_path: Path) -> None:
    trained = TrainedPixels(Transform(compose(*center())))
    fast = Preprocess(**{**RULES.model_dump(), "decoding": "fast"})
    assert trained.describe(fast) == ()
    assert max(trained.measure(fast, as_served=True).values()).mean < 20


def test_few_photos_are_enough_where_only_rounding_differs() -> None:
    photos = plain_photos(*range(0, 250, 10))
    trained = TrainedPixels(Transform(compose(*center())))
    for rules, count in ((RULES, 4), (Preprocess(resize=40, crop=SIDE), 25)):
        check = PixelCheck(trained, photos, allowed=True)
        assert check.run(Brightness(), rules, several_classes=False).num_images == count
