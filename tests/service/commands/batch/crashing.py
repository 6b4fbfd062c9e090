"""A worker process that ends at one image, as one with a bug in a C library does."""

import os

import numpy as np
from numpy.typing import NDArray

from sopdeploy_service.commands.batch import decoders


class CrashingDecoder(decoders.EntryDecoder):
    def __call__(self, entry: decoders.ListedImage, pixels: NDArray[np.uint8]) -> decoders.DecodedImage:
        return os._exit(1) if entry.path.endswith("017.jpg") else super().__call__(entry, pixels)


def start_crashing_worker(*arguments: object) -> None:
    decoders.EntryDecoder = CrashingDecoder
    decoders.start_worker(*arguments)
