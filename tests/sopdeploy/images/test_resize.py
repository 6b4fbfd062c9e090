"""Resizing without antialiasing, against torch's `interpolate`; the order of colors."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn.functional import interpolate

from sopdeploy.images.occlusion import occlude
from sopdeploy.images.pixels import preprocess_image
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.images.resize import resize_by_rules
from sopdeploy.layers.normalize import Normalize


def scene(width: int, height: int) -> Image.Image:
    random = np.random.default_rng(width + height)
    cells = random.integers(0, 256, (height // 5 + 2, width // 5 + 2, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC)


def sampled(
    image: Image.Image, size: tuple[int, int], interpolation: str
) -> NDArray[np.float32]:
    """Resize with torch, without antialiasing; (height, width, 3) in float32."""
    images = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    resized = interpolate(images, size[::-1], mode=interpolation, align_corners=False)
    return resized[0].permute(1, 2, 0).clamp(0, 255).numpy()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ((90, 61), (24, 24)),
        ((48, 48), (24, 24)),
        ((24, 24), (24, 24)),
        ((23, 25), (24, 24)),
        ((9, 200), (24, 40)),
        ((1, 1), (3, 2)),
    ],
)
def test_resizing_without_antialiasing_is_that_of_torch(
    old: tuple[int, int], new: tuple[int, int], interpolation: str
) -> None:
    image = scene(*old)
    rules = Preprocess(crop=24, interpolation=interpolation, antialias=False)
    resized = np.asarray(resize_by_rules(image, new, rules), np.float32)
    assert np.abs(resized - sampled(image, new, interpolation)).max() <= 0.51


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_box_gives_the_pixels_of_the_whole_image(interpolation: str) -> None:
    image = scene(120, 80)
    rules = Preprocess(crop=24, interpolation=interpolation, antialias=False)
    whole = np.asarray(resize_by_rules(image, (30, 20), rules))
    part = np.asarray(resize_by_rules(image, (10, 10), rules, (40, 20, 80, 60)))
    assert np.array_equal(part, whole[5:15, 10:20])


@pytest.mark.parametrize("fit", ["crop", "pad", "squash", "squash-crop"])
def test_every_fit_can_do_without_antialiasing(fit: str) -> None:
    image = scene(300, 200)
    rules = Preprocess(fit=fit, resize=28, crop=24)
    smooth = preprocess_image(image, rules)
    sharp = preprocess_image(image, rules.model_copy(update={"antialias": False}))
    assert sharp.shape == smooth.shape == (24, 24, 3)
    assert not np.array_equal(sharp, smooth)


def test_the_network_gets_blue_first() -> None:
    colors = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)}
    pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
    images = torch.from_numpy(pixels)
    rgb, bgr = (
        Normalize(Preprocess(crop=4, color_order=order, **colors), torch.contiguous_format)
        for order in ("RGB", "BGR")
    )
    assert torch.equal(bgr(images), rgb(images.flip(3)))
    assert "order" not in dict(rgb.named_buffers())  # the graphs of other networks stay


def test_a_covered_part_has_the_mean_color() -> None:
    rules = Preprocess(crop=7, mean=(0, 0.5, 1), color_order="BGR")
    covered = occlude(np.zeros((7, 7, 3), np.uint8), rules)
    assert covered[0, 0, 0].tolist() == [255, 128, 0]


@pytest.mark.parametrize(
    "fields",
    [
        {"antialias": False, "decoding": "fast"},
        {"antialias": False, "decoding": "scaled"},
        {"color_order": "BGR", "channels": 1, "mean": 0.5, "std": 0.5},
        {"color_order": "GRB"},
    ],
)
def test_rules_that_contradict_each_other_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"antialias|channels|color_order"):
        Preprocess(**fields)


def test_rules_without_the_new_keys_are_written_as_before() -> None:
    assert not {"antialias", "color_order"} & set(Preprocess().model_dump())
    for fields in ({"antialias": False}, {"color_order": "BGR"}):
        rules = Preprocess(**fields)
        assert Preprocess(**rules.model_dump()) == rules
        assert fields.items() <= rules.model_dump().items()
