"""Which files are images: their first bytes say so. Importing this module does not load Pillow.

A file whose ending is that of an image is listed without opening it, and judged when it is
read. Of other files, except `NO_PHOTOGRAPHS`, `counts_as_image` reads the first bytes: those of
a camera may have no ending, others that of a download.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import partial
from pathlib import Path, PurePath
from shlex import quote

from sopdeploy.base.files import PARTIAL, POINTER, open_regular
from sopdeploy.errors import amount, shorten
from sopdeploy.images.limits import FORMATS, describe_formats

SUFFIXES = (*(f".{name}" for name in FORMATS), ".jpg", ".heif")  # only to open fewer files
NO_PHOTOGRAPHS = (PARTIAL, ".thm")  # of a copy, and of a camera's thumbnail of a video
HEAD_BYTES = 64  # what `find_format` needs
SIGNATURES = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
}
# of every accepted format; other files have some, too
FIRST_BYTES = (*SIGNATURES, b"BM", b"RIFF", b"\0\0")
BITMAP_HEADERS = {12, 16, 40, 52, 56, 64, 108, 124}  # their lengths; texts can begin with BM
REJECTED_SIGNATURES = {
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"%PDF": "PDF",
    b"%!PS": "PostScript",
    b"8BPS": "PSD",
    b"\0\0\1\0": "ICO",
    b"\0\0\0\x0cjP  ": "JPEG 2000",
    b"\0\0\0\x0cJXL ": "JPEG XL",
    b"\xff\x0a": "JPEG XL",
    b"<svg": "SVG",
    b"<?xml": "XML or SVG",
    POINTER: "Git LFS",
}
# What converts files of other formats to images: a program, its command for all of a folder, or
# for the file $f, and the names of the formats with their suffixes
CONVERTERS = {
    "ImageMagick": (
        "mogrify -format png {files}",
        *("TIFF", "PSD", "ICO", "JPEG 2000"),
        *(".tif", ".tiff", ".psd", ".ico", ".jp2", ".pgm", ".ppm", ".tga"),
    ),
    "the program of the camera": ("", ".arw", ".cr2", ".cr3", ".dng", ".nef", ".raw"),
    "libjxl": ('djxl "$f" "$f.png"', "JPEG XL", ".jxl"),
    "DCMTK": ('dcmj2pnm --write-png "$f" "$f.png"', ".dcm"),
    "librsvg": ('rsvg-convert "$f" -o "$f.png"', "SVG", "XML or SVG", ".svg"),
    "Poppler": ('pdftoppm -png "$f" "$f"', "PDF", ".pdf"),
    "FFmpeg": ('ffmpeg -i "$f" -r 1 "$f-%04d.png"', ".avi", ".mkv", ".mov", ".mp4", ".webm"),
}
OF_DOCUMENTS = ("Poppler", "FFmpeg")  # reports and films, which folders beside the classes hold
WEB_PAGES = (b"<!doctype html", b"<html", b"<head", b"<body")  # what a failed download leaves
BRANDS = {b"avif": "AVIF", b"avis": "AVIF"} | dict.fromkeys(
    (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1", b"heif"), "HEIF"
)
_skipped: ContextVar[dict[Path, Mapping[str, int]] | None] = ContextVar("skipped", default=None)


def find_format(head: bytes) -> str:
    """Name the format of the file that begins with *head*; "" for an unknown one.

    Formats of images have Pillow's names.
    """
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "WEBP"
    if head[4:8] == b"ftyp":
        # The brand of the file, and those that it is compatible with: AVIF may begin as any HEIF does.
        end = min(int.from_bytes(head[:4]), len(head))
        brands = [head[begin : begin + 4] for begin in (8, *range(16, end, 4))]
        kinds = {BRANDS[brand] for brand in brands if brand in BRANDS}
        return min(kinds, default="")
    if head.startswith(b"BM") and int.from_bytes(head[14:18], "little") in BITMAP_HEADERS:
        return "BMP"

    for signature, name in (SIGNATURES | REJECTED_SIGNATURES).items():
        if head.startswith(signature):
            return name
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    return "HTML" if text.startswith(WEB_PAGES) else ""


def format_of(head: bytes) -> str:
    """Name the accepted format of the file that begins with *head*, as settings do; "" for another file."""
    detected = find_format(head)
    return next((name for name, known in FORMATS.items() if known == detected), "")


def media_type_of(head: bytes) -> str:
    """Return the media type of the image file that begins with *head*."""
    detected = find_format(head)
    is_accepted = detected in FORMATS.values()
    return f"image/{detected.lower()}" if is_accepted else "application/octet-stream"


def has_image_suffix(name: str) -> bool:
    """Tell whether the file *name* has the ending of an image."""
    return name.lower().endswith(SUFFIXES)


def counts_as_image(name: str, read_head: Callable[[], bytes]) -> bool:
    """Tell whether the file *name* is read as an image: by its ending, or else by its first bytes."""
    return has_image_suffix(name) or (
        not name.lower().endswith(NO_PHOTOGRAPHS)
        and find_format(read_head()) in FORMATS.values()
    )


def is_image(path: Path) -> bool:
    """Tell whether `counts_as_image` of the file *path*."""
    return counts_as_image(path.name, partial(read_head, path))


def read_head(path: Path) -> bytes:
    """Read the first bytes of a regular file; nothing of one that cannot be read."""
    with suppress(OSError), open_regular(path, buffering=0) as file:
        return file.read(HEAD_BYTES)
    return b""


def find_converter(kind: str) -> str:
    """Name the program that makes images of files of *kind*, a format or a suffix; "" if none is known."""
    return next((name for name, (_, *kinds) in CONVERTERS.items() if kind in kinds), "")


def describe_conversion(root: Path, file: str, others: Iterable[str]) -> str:
    """Say how *file* in *root*, and *others* with its suffix, become images; "" if that is not known.

    If they are in several folders, the command converts those of all folders beside its folder.
    """
    path = PurePath(file)
    converter = find_converter(suffix_of(file))
    if not converter:
        return ""
    folders = {
        PurePath(other).parent for other in others if PurePath(other).suffix == path.suffix
    }
    where = quote(str((root / path).parent))
    if len(folders) > 1:
        where = quote(str(root)) + "/*" * len(path.parent.parts)
    files = f"{where}/*{path.suffix}"
    command = CONVERTERS[converter][0].format(files=files)
    if "$f" in command:
        command = f"for f in {files}; do {command}; done"
    return f"convert them with {converter}" + (command and f": {command}")


def suffix_of(name: str) -> str:
    """Return the suffix of the file *name* in lower case, as counts of skipped files show it."""
    return PurePath(name).suffix.lower() or "without an ending"


def count_suffixes(names: Iterable[str]) -> dict[str, int]:
    """Count the files *names* by suffix, the most frequent one first."""
    return dict(Counter(map(suffix_of, names)).most_common())


def describe_suffixes(counts: Mapping[str, int]) -> str:
    """Format numbers of files by suffix."""
    return shorten([f"{suffix} {count}" for suffix, count in counts.items()])


def describe_skipped(counts: Mapping[str, int]) -> str:
    """Say how many files of which suffix were skipped."""
    count = sum(counts.values())
    return (
        f"{amount(count, 'file')} skipped, not {describe_formats()}: "
        f"{describe_suffixes(counts)}"
    )


def note_skipped(root: Path, counts: Mapping[str, int]) -> None:
    """Note the numbers of files in *root* that are not images, by suffix, for the end of a command."""
    if (skipped := _skipped.get()) is not None and counts:
        skipped[root] = counts


@contextmanager
def noting_skipped() -> Iterator[dict[Path, Mapping[str, int]]]:
    """Collect what `note_skipped` notes, by folder."""
    skipped: dict[Path, Mapping[str, int]] = {}
    token = _skipped.set(skipped)
    try:
        yield skipped
    finally:
        _skipped.reset(token)
