"""Pixels: the network gets the tensors that it was trained on.

This is measured by `sopdeploy_export.pixels`, with the transform of the training. Photos that the export draws
go through the transform, and through the server's decoding and the first layer of the graph. They are
large, small, wide and tall; if the transform reads files, one of them is turned by EXIF.

Not seen: what the loader of the training does before a transform that takes a Pillow image or an array, and
a transform that treats photos of certain sizes or contents in its own way.

Refused: rules with another mean, square, way of resizing or order of colors (`tests/export/pixels/test_pixels.py`).
"""

STATEMENT = (
    "A server gives the network the pixels of the transform of the training (`--transform`), but for rounding. With "
    "--set allow_other_pixels=true, the bundle records how they differ and how many classes change. Without "
    "a transform, nothing is compared."
)
IS_PROVED = False
