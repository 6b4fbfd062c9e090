"""Resize an image with fast_image_resize, by the instructions of the processor for several numbers at once.

The package `cykooz-resizer` brings it. Its pixels are the same bits with SSE4.1, AVX2 and without both. There
is no wheel for Linux on ARM; there, Pillow resizes, and pixels differ as `MAX_LEVELS` says.

The package reads Pillow's memory by a copy of the structure of its images, and chooses the copy by the major
version of Pillow. So it resizes a few pixels when it is imported; if it gives others than Pillow, Pillow resizes.

Pillow also enlarges with "bicubic". There, fast_image_resize 6.1 ends the process for some boxes: it leaves out
leading weights that are about zero, takes the first pixel of the first sum for the first pixel of all, and reads
in front of it (`do_convolution` in its `resizer.rs`). The weights of "bilinear" fall from the center to the
sides, so no later sum begins earlier, and neither does one of an image that is not enlarged.
"""

import numpy as np
from PIL import Image

from sopdeploy.images.preprocess import Box

try:
    import cykooz_resizer
except ImportError:
    cykooz_resizer = None

# The largest difference between the two on photos, of 255 levels, and the largest mean difference of a photo.
# On 776 photos and ten rules, pixels differed by at most 2 and 20, and the mean of a photo by 0.35; on 401 others
# by 2, 20 and 0.30. Both round in each direction, and bicubic can leave the range in between, where Pillow
# clips: of 1,000 values, one differs by more than 1. On random noise, more do.
MAX_LEVELS: dict[str, int] = {"bilinear": 3, "bicubic": 32}
MAX_MEAN_LEVELS = 0.4
PILLOW_FILTERS: dict[str, Image.Resampling] = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
# Both are bicubic with a = -0.5.
FILTERS: dict[str, str] = {"bilinear": "bilinear", "bicubic": "catmull_rom"}


def fast_resize(
    image: Image.Image, size: tuple[int, int], interpolation: str, box: Box
) -> Image.Image:
    """Resize *box* of the RGB *image* to *size*, (width, height).

    *interpolation* is "bilinear" or "bicubic", with a support that grows with the reduction, as in Pillow.
    """
    left, top, right, bottom = box
    is_enlarged = right - left < size[0]
    if cykooz_resizer is None or (interpolation == "bicubic" and is_enlarged):
        return image.resize(size, PILLOW_FILTERS[interpolation], box)

    options = cykooz_resizer.ResizeOptions(
        resize_alg=cykooz_resizer.ResizeAlg.convolution(
            cykooz_resizer.FilterType[FILTERS[interpolation]]
        ),
        crop_box=cykooz_resizer.CropBox(left, top, right - left, bottom - top),
        use_alpha=False,
    )
    resized = Image.new("RGB", size)
    cykooz_resizer.Resizer().resize_pil(image, resized, options)
    return resized


def resizes_as_pillow() -> bool:
    """Resize 4 x 4 pixels with both filters, and return whether they are Pillow's, but for `MAX_LEVELS`."""
    pixels = (np.arange(4 * 4 * 3) * 37 % 256).astype(np.uint8).reshape(4, 4, 3)
    image = Image.fromarray(pixels)
    box = (0.5, 0.0, 4.0, 4.0)

    for interpolation, largest in MAX_LEVELS.items():
        try:
            resized = fast_resize(image, (3, 2), interpolation, box)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # a panic of Rust is not an `Exception`
            return False
        expected = image.resize((3, 2), PILLOW_FILTERS[interpolation], box)
        difference = np.asarray(resized).astype(np.int16) - np.asarray(expected)
        if np.abs(difference).max() > largest:
            return False
    return True


if not resizes_as_pillow():
    cykooz_resizer = None
