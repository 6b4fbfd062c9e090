"""Encode images for tests; programs of `benchmarks/hostile_images.py` make hostile ones."""

import io

from PIL import Image

from sopdeploy.images.formats import prepare_decoders

prepare_decoders()  # also registers the encoder of HEIC


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    """Encode *image* with Pillow."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()
