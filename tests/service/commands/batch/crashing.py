"""A decoder process that ends at one image, as one with a bug in a C library does."""

import os

from sopdeploy_service.commands.batch import decoders
from sopdeploy_service.commands.batch.sources import ListedImage, read_listed


def crash_or_read(image: ListedImage, limit: int) -> bytes:
    return os._exit(1) if image.path.endswith("017.jpg") else read_listed(image, limit)


if __name__ == "__main__":
    decoders.read_listed = crash_or_read
    decoders.main()
