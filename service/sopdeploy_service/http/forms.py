"""Parse `multipart/form-data` into images and text fields, in memory.

A part with a file name is an image, whatever its field is called, as is one without that begins
like one. Every other part is a text field.

Starlette's form parser writes files above 1 MB to disk and accepts truncated bodies.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartState, parse_options_header

from sopdeploy.images.limits import FORMATS
from sopdeploy.images.signatures import HEAD_BYTES, find_format
from sopdeploy_service.inference.results import HttpError, RejectedError

MAX_TEXTS = 200
MAX_TEXT_BYTES = 1000  # longer texts are not options
MAX_TYPE_CHARS = 1000  # of the content type, whose parser takes quadratic time

_MALFORMED = HttpError(
    "malformed_multipart", 400, "the multipart body is malformed or truncated"
)
NO_BOUNDARY = HttpError(
    "malformed_multipart", 400, "the content type has no valid multipart boundary"
)
_NO_IMAGE = HttpError(
    "no_image", 422, "the form has no file; add the image, as `curl -F image=@photo.jpg` does"
)
_TOO_MANY_TEXTS = HttpError(
    "malformed_multipart", 400, f"the form has more than {MAX_TEXTS} fields beside its images"
)


class Form(NamedTuple):
    """The images of a form, in order, and its short text fields by name."""

    images: list[bytes]
    texts: dict[str, str]


def parse_form(body: bytes, content_type: str, max_images: int) -> Form:
    """Read the form *body*, whose boundary is in *content_type*.

    Bytes before the first delimiter and after the last one are skipped (RFC 2046, section
    5.1.1). Raises `RejectedError` for a form that is malformed or truncated, or has no image or
    more than *max_images*.
    """
    # Read the boundary.
    is_short = len(content_type) <= MAX_TYPE_CHARS
    boundary = parse_options_header(content_type)[1].get(b"boundary") if is_short else None
    if not boundary:
        raise RejectedError(NO_BOUNDARY)

    # Build a parser that collects the parts.
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
                "on_part_data": lambda data, start, end: parts.content.extend(data[start:end]),
                "on_part_end": parts.end_part,
            },
        )
    except FormParserError as problem:
        raise RejectedError(NO_BOUNDARY) from problem

    # Parse from the first delimiter on; a text may come before it.
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
    return Form(parts.images, parts.texts)


@dataclass(slots=True)
class _Parts:
    """What the parser's callbacks collect: images and texts, and the present header and part.

    A reference to the parser would be a cycle and keep the images longer.
    """

    max_images: int
    images: list[bytes] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)
    num_texts: int = 0
    header: bytearray = field(default_factory=bytearray)
    value: bytearray = field(default_factory=bytearray)
    name: str = ""  # of the field
    file_name: bytes | None = None
    content: bytearray = field(default_factory=bytearray)

    def end_header(self) -> None:
        """Take the names of field and file from a header that has them."""
        if self.header.lower() == b"content-disposition":
            options = parse_options_header(bytes(self.value))[1]
            self.name = options.get(b"name", b"").decode("utf-8", "replace")
            self.file_name = options.get(b"filename")
        self.header.clear()
        self.value.clear()

    def end_part(self) -> None:
        """Add an image or a text; raise `RejectedError` for one too many."""
        content = bytes(self.content)
        name = self.name
        file_name = self.file_name
        self.content.clear()
        self.name = ""
        self.file_name = None

        # A browser sends a file input without a file like this.
        if file_name == b"" and not content:
            return

        if file_name is None and find_format(content[:HEAD_BYTES]) not in FORMATS.values():
            self._add_text(name, content)
            return

        if len(self.images) == self.max_images:
            message = (
                f"the form has more than {self.max_images} images, the limit of this server"
            )
            raise RejectedError(HttpError("too_many_images", 400, message))
        self.images.append(content)

    def _add_text(self, name: str, content: bytes) -> None:
        """Add a text field, unless it is long; raise `RejectedError` for one too many."""
        self.num_texts += 1
        if self.num_texts > MAX_TEXTS:
            raise RejectedError(_TOO_MANY_TEXTS)
        if len(content) <= MAX_TEXT_BYTES:
            self.texts[name] = content.decode("utf-8", "replace")
