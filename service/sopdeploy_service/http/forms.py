"""Parse `multipart/form-data` to images, in memory and in one pass.

Starlette's form parser writes files above 1 MB to disk and accepts truncated bodies.
"""

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from sopdeploy_service.http.problems import RejectedError
from sopdeploy_service.images.decode import EncodedImage
from sopdeploy_service.inference.results import Rejection

FIELDS = {"image", "images", "file", "files"}

MALFORMED = Rejection("malformed_multipart", 400, "the multipart body is malformed or truncated")
NO_BOUNDARY = Rejection("malformed_multipart", 400, "the content type has no valid multipart boundary")
NO_IMAGE = Rejection("no_image", 422, "the form has no image; add it as a field named `image`")


class ImageForm:
    """Collects the images of a form whose body arrives in pieces."""

    def __init__(self, content_type: str, *, max_images: int) -> None:
        """Read the boundary of *content_type*; raises `RejectedError` if it is missing or invalid."""
        boundary = parse_options_header(content_type)[1].get(b"boundary")
        if not boundary:
            raise RejectedError(NO_BOUNDARY)
        self._parts = _Parts(max_images)
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._parts.begin,
                    "on_header_field": self._parts.header_field,
                    "on_header_value": self._parts.header_value,
                    "on_header_end": self._parts.end_header,
                    "on_headers_finished": self._parts.end_headers,
                    "on_part_data": self._parts.data,
                    "on_end": self._parts.end_form,
                },
            )
        except FormParserError as problem:
            raise RejectedError(NO_BOUNDARY) from problem

    def feed(self, piece: bytes) -> None:
        """Parse the next *piece* of the body; raises `RejectedError` for an invalid form."""
        try:
            self._parser.write(piece)
        except FormParserError as problem:
            raise RejectedError(MALFORMED) from problem

    def images(self) -> list[EncodedImage]:
        """Collect the images after the last piece; raises `RejectedError` for a truncated or empty form."""
        if not self._parts.complete:
            raise RejectedError(MALFORMED)
        if not self._parts.images:
            raise RejectedError(NO_IMAGE)
        return [EncodedImage(bytes(image), content_type) for image, content_type in self._parts.images]


class _Parts:
    """Callbacks of the parser. It has no reference to the parser, so both are freed with the request."""

    def __init__(self, max_images: int) -> None:
        self.images: list[tuple[bytearray, str]] = []  # with their content types
        self.complete = False
        self._max_images = max_images
        self._header = bytearray()
        self._value = bytearray()
        self._name: str | None = None
        self._content_type = ""

    def begin(self) -> None:
        self._name, self._content_type = None, ""

    def header_field(self, data: bytes, start: int, end: int) -> None:
        self._header.extend(data[start:end])

    def header_value(self, data: bytes, start: int, end: int) -> None:
        self._value.extend(data[start:end])

    def end_header(self) -> None:
        if self._header.lower() == b"content-disposition":
            name = parse_options_header(bytes(self._value))[1].get(b"name", b"")
            self._name = name.decode("utf-8", "replace")
        elif self._header.lower() == b"content-type":
            self._content_type = self._value.decode("latin-1")
        self._header.clear()
        self._value.clear()

    def end_headers(self) -> None:
        if self._name not in FIELDS:
            message = f"field {self._name!r:.80}: images must be in fields named `image`"
            raise RejectedError(Rejection("unexpected_field", 422, message))
        if len(self.images) == self._max_images:
            message = f"the form has more than {self._max_images} images, the limit of this server"
            raise RejectedError(Rejection("too_many_images", 400, message))
        self.images.append((bytearray(), self._content_type))

    def data(self, data: bytes, start: int, end: int) -> None:
        self.images[-1][0].extend(data[start:end])

    def end_form(self) -> None:
        self.complete = True
