"""The first bytes of a file tell its format: that of an image, or one with a name for the message."""

import struct

import pytest

from sopdeploy.images.signatures import BRANDS, REJECTED_SIGNATURES, SIGNATURES, find_format

HEADS = dict((SIGNATURES | REJECTED_SIGNATURES).items())
HEADS |= {
    struct.pack(">I4s4s", 16, b"ftyp", brand) + bytes(4): BRANDS[brand] for brand in BRANDS
}
HEADS |= {
    b"RIFF\0\0\0\0WEBPVP8 ": "WEBP",
    b"RIFF\0\0\0\0WAVEfmt ": "",
    b"\0\0\0\x10ftypisom\0\0\0\0": "",
    b"BM is a car": "",
    b"\xef\xbb\xbf\n<!DOCTYPE HTML>": "HTML",
    # An AVIF may begin as any HEIC does; a brand behind the box is none of the file's.
    b"\0\0\0\x14ftypmif1\0\0\0\0avif": "AVIF",
    b"\0\0\0\x10ftypmif1\0\0\0\0avif": "HEIF",
}


@pytest.mark.parametrize(("head", "name"), HEADS.items())
def test_the_first_bytes_tell_the_format(head: bytes, name: str) -> None:
    assert find_format(head) == name
