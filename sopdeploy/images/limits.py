"""Suffixes of image files and limits of one image, the same in training and service.

Importing this module does not load Pillow; `formats` enforces the limits.
"""

MAX_BYTES = 20_000_000  # of a file
MAX_PIXELS = 70_000_000  # of an image; phones take photos of 50 and 64 megapixels
SUFFIXES = (".bmp", ".gif", ".heic", ".heif", ".jpeg", ".jpg", ".png", ".webp")
FORMATS = {  # names in settings, and those of Pillow
    "jpeg": "JPEG", "png": "PNG", "webp": "WEBP", "gif": "GIF", "bmp": "BMP", "heic": "HEIF",
}  # fmt: skip
