"""The ways to the pixels of a picture whose header was read; which of them a server takes."""

from PIL import Image

from sopdeploy.preprocess import Preprocess
from sopdeploy_service.decode import Load, exactly
from sopdeploy_service.nvimagecodec import on_this_gpu
from sopdeploy_service.settings import Settings

SMALLEST_FRACTION = 4  # of a side; 1/8 would need a check on pictures of 16 times the network's input


def loader(settings: Settings) -> Load:
    """Return the way that *settings* name.

    Raises `RuntimeUnavailableError` where nvImageCodec or its GPU is not there.
    """
    if settings.decode == "nvimagecodec":
        return on_this_gpu()
    return {"exact": exactly, "fast": at_a_fraction}[settings.decode]


def at_a_fraction(picture: Image.Image, body: bytes, preprocess: Preprocess) -> Image.Image:  # noqa: ARG001
    """Return a JPEG *picture* decoded at 1/2 or 1/4 of its size, other formats whole.

    At least twice the pixels that resizing needs are left along each side, for its filter to work on. Without
    the frequencies above, the result is close to the exact one, not equal: `fast_decode` measures how close.
    """
    side = max(2 * preprocess.resize, -(-min(picture.size) // SMALLEST_FRACTION))
    picture.draft(picture.mode, (side, side))
    picture.load()
    return picture
