"""Parse `multipart/form-data` into images, in memory.

Starlette's form parser writes files above 1 MB to disk and accepts truncated bodies.
"""

from dataclasses import dataclass, field

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartState, parse_options_header

from sopdeploy_service.inference.results import HttpError, RejectedError

FIELDS = {"image", "images", "file", "files"}
MAX_TYPE_CHARS = 1000  # of the content type, whose parser takes quadratic time

_MALFORMED = HttpError(
    "malformed_multipart", 400, "the multipart body is malformed or truncated"
)
NO_BOUNDARY = HttpError(
    "malformed_multipart", 400, "the content type has no valid multipart boundary"
)
_NO_IMAGE = HttpError("no_image", 422, "the form has no image; add it as a field named `image`")


def parse_form(body: bytes, content_type: str, max_images: int) -> list[bytes]:
    """Read the images of the form *body*, whose boundary is in *content_type*.

    Bytes before the first delimiter and after the last one are skipped (RFC 2046, section
    5.1.1). Raises `RejectedError` for a form that is malformed, truncated or empty, or has
    other fields or more images.
    """
    is_short = len(content_type) <= MAX_TYPE_CHARS
    boundary = parse_options_header(content_type)[1].get(b"boundary") if is_short else None
    if not boundary:
        raise RejectedError(NO_BOUNDARY)
    parts = _Parts(max_images)
    try:
        parser = MultipartParser(
            boundary,
            {
                "on_header_field": lambda data, start, end: parts.header.extend(
                    data[start:end]
                ),
                "on_header_value": lambda data, start, end: parts.value.extend(data[start:end]),
                "on_header_end": parts.end_header,
                "on_headers_finished": parts.begin_image,
                "on_part_data": lambda data, start, end: parts.images[-1].extend(
                    data[start:end]
                ),
            },
        )
    except FormParserError as problem:
        raise RejectedError(NO_BOUNDARY) from problem
    start = 0 if body.startswith(b"--" + boundary) else body.find(b"\r\n--" + boundary)
    if start < 0:  # there is no delimiter
        raise RejectedError(_MALFORMED)
    try:
        parser.write(body[start:])  # the parser skips the line break before the delimiter
    except FormParserError as problem:
        raise RejectedError(_MALFORMED) from problem
    if parser.state != MultipartState.END:  # truncated
        raise RejectedError(_MALFORMED)
    if not parts.images:
        raise RejectedError(_NO_IMAGE)
    return [bytes(image) for image in parts.images]


@dataclass(slots=True)
class _Parts:
    """What the parser's callbacks collect: the images, and *header* and *value* of the present header.

    A reference to the parser would be a cycle and keep the images longer.
    """

    max_images: int
    images: list[bytearray] = field(default_factory=list)
    header: bytearray = field(default_factory=bytearray)
    value: bytearray = field(default_factory=bytearray)
    name: str | None = None  # of the field whose headers are parsed

    def end_header(self) -> None:
        """Take the name of the field from a header that has it."""
        if self.header.lower() == b"content-disposition":
            name = parse_options_header(bytes(self.value))[1].get(b"name", b"")
            self.name = name.decode("utf-8", "replace")
        self.header.clear()
        self.value.clear()

    def begin_image(self) -> None:
        """Begin the next image; raise `RejectedError` for another field or one too many."""
        if self.name not in FIELDS:
            message = f"field {str(self.name)[:80]!r}: images must be in fields named `image`"
            raise RejectedError(HttpError("unexpected_field", 422, message))
        if len(self.images) == self.max_images:
            message = (
                f"the form has more than {self.max_images} images, the limit of this server"
            )
            raise RejectedError(HttpError("too_many_images", 400, message))
        self.images.append(bytearray())
        self.name = None
