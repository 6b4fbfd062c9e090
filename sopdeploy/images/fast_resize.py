"""Resize an image with fast_image_resize, by the instructions of the processor for several numbers at once.

The package `cykooz-resizer` brings it. Its pixels are the same bits with SSE4.1, AVX2 and without both. There
is no wheel for Linux on ARM; there, Pillow resizes, and a pixel of a photo differs by at most `MAX_LEVELS`.

Pillow also enlarges with "bicubic". There, fast_image_resize 6.1 ends the process for some boxes: it leaves out
leading weights that are about zero, takes the first pixel of the first sum for the first pixel of all, and reads
in front of it (`do_convolution` in its `resizer.rs`). The weights of "bilinear" fall from the center to the
sides, so no later sum begins earlier, and neither does one of an image that is not enlarged.
"""

from PIL import Image

from sopdeploy.images.preprocess import Box

try:
    import cykooz_resizer
except ImportError:
    cykooz_resizer = None

# The largest difference between the two on photos, of 255 levels. Both round in each direction, and bicubic
# can leave the range in between, where Pillow clips; on random noise, it differs by more.
MAX_LEVELS = 4
PILLOW_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
FILTERS = {"bilinear": "bilinear", "bicubic": "catmull_rom"}  # both are bicubic with a = -0.5


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
