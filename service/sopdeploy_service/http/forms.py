"""`multipart/form-data` to the bytes of its images, in memory and in one pass.

Starlette's own form parser writes files above 1 MB to disk and takes a body that was cut short for
a whole one; neither is wanted here.
"""

from typing import TYPE_CHECKING

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from sopdeploy_service.http.problems import RejectedError
from sopdeploy_service.images.decode import EncodedImage
from sopdeploy_service.inference.results import Rejection

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

FIELDS = {"image", "images", "file", "files"}

MALFORMED = Rejection("malformed_multipart", 400, "the multipart body is damaged or cut short")
NO_BOUNDARY = Rejection("malformed_multipart", 400, "the content type names no multipart boundary")
NO_IMAGE = Rejection("no_image", 422, "the form holds no image; put it in a field named `image`")


class ImageForm:
    """Collects the images of a form that is fed to it piece by piece."""

    def __init__(self, content_type: str, *, max_images: int) -> None:
        """Read the boundary from *content_type*; raises `RefusedError` where there is none."""
        boundary = parse_options_header(content_type)[1].get(b"boundary")
        if not boundary:
            raise RejectedError(NO_BOUNDARY)
        self._parts = Parts(max_images)
        try:
            self._parser = MultipartParser(boundary, self._parts.callbacks())
        except FormParserError as problem:
            raise RejectedError(NO_BOUNDARY) from problem

    def feed(self, piece: bytes) -> None:
        """Take the next *piece* of the body; raises `RefusedError` where the form is not wanted."""
        try:
            self._parser.write(piece)
        except FormParserError as problem:
            raise RejectedError(MALFORMED) from problem

    def images(self) -> list[EncodedImage]:
        """Return the images after the last piece; raises `RefusedError` where the form is cut short."""
        found = self._parts
        if not found.whole:
            raise RejectedError(MALFORMED)
        if not found.images:
            raise RejectedError(NO_IMAGE)
        return [
            EncodedImage(bytes(image), kind) for image, kind in zip(found.images, found.kinds, strict=True)
        ]


class Parts:
    """The parts of a form so far. A parser leads here and nothing leads back, so both go with the request."""

    def __init__(self, max_images: int) -> None:
        self.images: list[bytearray] = []
        self.kinds: list[str] = []
        self.whole = False
        self._max_images = max_images
        self._header = bytearray()
        self._value = bytearray()
        self._name: str | None = None
        self._kind = ""

    def callbacks(self) -> "MultipartCallbacks":
        """Return what a parser calls."""
        return {
            "on_part_begin": self._part_begins,
            "on_header_field": lambda data, start, end: self._header.extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
            "on_header_end": self._header_ends,
            "on_headers_finished": self._headers_end,
            "on_part_data": lambda data, start, end: self.images[-1].extend(data[start:end]),
            "on_end": self._form_ends,
        }

    def _part_begins(self) -> None:
        self._name, self._kind = None, ""

    def _header_ends(self) -> None:
        if self._header.lower() == b"content-disposition":
            name = parse_options_header(bytes(self._value))[1].get(b"name", b"")
            self._name = name.decode("utf-8", "replace")
        elif self._header.lower() == b"content-type":
            self._kind = self._value.decode("latin-1")
        self._header.clear()
        self._value.clear()

    def _headers_end(self) -> None:
        if self._name not in FIELDS:
            wanted = "the images go into fields named `image`"
            raise RejectedError(Rejection("unexpected_field", 422, f"field {self._name!r:.80}: {wanted}"))
        if len(self.images) == self._max_images:
            limit = f"the form holds more than {self._max_images} images, the limit of this server"
            raise RejectedError(Rejection("too_many_images", 400, limit))
        self.images.append(bytearray())
        self.kinds.append(self._kind)

    def _form_ends(self) -> None:
        self.whole = True
