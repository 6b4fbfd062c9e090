"""`sopdeploy data check`: the content and the problems of a folder or archive of images."""

import hashlib
import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from sopdeploy.config import StrictModel
from sopdeploy.data.datasets.folder import (
    class_mismatches,
    class_names,
    describe_empty_classes,
    describe_nested,
    describe_parts,
    list_classes,
    open_store,
)
from sopdeploy.data.datasets.label_table import (
    SEPARATOR,
    TRAIN,
    VAL,
    has_label_table,
    read_label_table,
    unlisted_images,
)
from sopdeploy.data.datasets.layouts import open_official
from sopdeploy.data.folder_store import LABELS_FILE, OpenOptions
from sopdeploy.data.image_files import ImageFiles, count_ignored_files, load_pixels, map_threaded, open_image
from sopdeploy.data.parts import find_parts, open_part
from sopdeploy.errors import DataError, shorten
from sopdeploy.files import expand_user
from sopdeploy.images.pixels import ROTATED, SIXTEEN_BIT, exif_orientation, to_rgb
from sopdeploy.images.preprocess import Preprocess

MIN_SIDE = 32  # pixels; smaller images are reported
MAX_ASPECT_RATIO = 4.0  # of the longer side to the shorter one; the center crop cuts off most of the image
RULES = Preprocess()  # for the conversion to upright RGB
UNSPLIT = "all"  # the name of the only part if there are no folders train and val


class Part(StrictModel):
    """Images of train/, val/ or an unsplit folder; `classes` counts the images of each class."""

    name: str
    count: int
    bytes: int
    classes: dict[str, int]


class Duplicates(StrictModel):
    """Files with identical pixels; `same_bytes` if the files are identical, too.

    `across`: the files are in different parts (train/test leakage). `labels_differ`: they have different
    labels.
    """

    files: tuple[str, ...]
    same_bytes: bool
    across: bool
    labels_differ: bool


class DataReport(StrictModel):
    """Result of a check.

    Sides are (minimum, median, maximum) in pixels. `classes` names the folders that a training run would
    reject: those without images, and held-out classes that differ from the training classes. `too_few` names
    the classes with a single image. `strange` lists readable but unusual files by reason, `passed_over`
    counts the files without an image suffix by their suffix. `notes` are lines about folders that are not
    used, or that may not be what they seem.
    """

    path: Path
    parts: tuple[Part, ...]
    formats: dict[str, int]
    modes: dict[str, int]
    shorter_side: tuple[int, int, int]
    longer_side: tuple[int, int, int]
    classes: tuple[str, ...] = ()
    unreadable: tuple[str, ...]
    too_few: tuple[str, ...]
    duplicates: tuple[Duplicates, ...]
    strange: dict[str, tuple[str, ...]]
    passed_over: dict[str, int]
    notes: tuple[str, ...] = ()

    def must_be_usable(self) -> None:
        """Raise `DataError` with every problem that would stop a training run."""
        problems = [*self.classes, *self.unreadable, *self.too_few]
        if problems:
            raise DataError(f"{self.path}: cannot be used as it is: {shorten(problems, '; ')}")


@dataclass(frozen=True, slots=True)
class _FileInfo:
    """Properties of one file; only `error` is set for an unreadable one."""

    file: str
    part: str
    label: str
    length: int = 0
    error: str = ""
    format: str = ""
    mode: str = ""
    size: tuple[int, int] = (0, 0)
    file_hash: bytes = b""
    pixel_hash: bytes = b""
    oddities: tuple[str, ...] = ()


def check(path: Path, cache: Path | None = None) -> DataReport:
    """Decode every image below *path* and report contents and problems.

    *path* is a folder or tar archive with one folder per class or with `labels.csv`. The official layouts of
    CUB, FGVC-Aircraft, Stanford Cars and ImageNet are recognized. Archives are indexed in the folder *cache*.

    Raises `DataError` if there are fewer than two classes, or if `labels.csv` is invalid.
    """
    notes: list[str] = []
    options = OpenOptions(cache, notes.append)
    official = open_official(expand_user(path), options)
    parts, listed = (official, False) if official else _open_parts(expand_user(path), options)
    infos = [
        info
        for name, part in parts.items()
        for info in map_threaded(partial(_inspect_file, part, name), len(part))
    ]
    readable = [info for info in infos if not info.error]
    sides = np.sort([info.size for info in readable] or [(0, 0)], axis=1).T
    shorter, longer = ((int(row.min()), int(np.median(row)), int(row.max())) for row in sides)
    strange: dict[str, list[str]] = {}
    for info in readable:
        for reason in info.oddities:
            strange.setdefault(reason, []).append(info.file)
    folders = [] if official or listed else list(parts.values())
    unlisted = unlisted_images(list(parts.values())) if listed else []
    strange |= {f"not listed in {LABELS_FILE}": unlisted} if unlisted else {}
    ignored: Counter[str] = Counter()
    for part in folders:
        ignored.update(count_ignored_files(part.store, part.labels))
    notes += filter(None, map(describe_nested, folders))
    counted = []
    for name, part in parts.items():
        size = sum(info.length for info in infos if info.part == name)
        counts = part.class_counts().tolist()
        classes = dict(zip(part.labels, counts, strict=True))
        counted.append(Part(name=name, count=len(part), bytes=size, classes=classes))
    return DataReport(
        path=path,
        parts=tuple(counted),
        formats=dict(Counter(info.format for info in readable).most_common()),
        modes=dict(Counter(info.mode for info in readable).most_common()),
        shorter_side=shorter,
        longer_side=longer,
        classes=tuple(_class_problems(folders)),
        unreadable=tuple(info.error for info in infos if info.error),
        too_few=tuple(
            f"{images.store.root / images.labels[target]}: only one image; add another"
            for images in (parts.values() if len(parts) == 1 else ())
            for target in np.flatnonzero(images.class_counts() == 1)
        ),
        duplicates=tuple(_find_duplicates(readable)),
        strange={reason: tuple(files) for reason, files in strange.items()},
        passed_over=dict(ignored),
        notes=tuple(notes),
    )


def _open_parts(path: Path, options: OpenOptions) -> tuple[dict[str, ImageFiles], bool]:
    """Open the parts of a folder by name, training images first, and tell whether a table lists them."""
    store = open_store(path, options)
    if has_label_table(store):
        table = read_label_table(store)
        split_names = [TRAIN, VAL] if table.is_split else []
        return {name: table.part(name) for name in split_names} or {UNSPLIT: table.images}, True
    found = find_parts(store)
    for line in describe_parts(store, found):
        options.log(line)
    if not found.train:
        return {UNSPLIT: list_classes(store, class_names(store))}, False
    train = open_part(store, found.train)
    parts = {found.train: list_classes(train, class_names(train))}
    for name in found.held_out:
        part = open_part(store, name)
        parts[name] = list_classes(part, tuple(part.folders()))
    return parts, False


def _class_problems(parts: list[ImageFiles]) -> Iterator[str]:
    """Describe empty class folders of *parts*, and classes that differ from those of the first part."""
    for images in parts:
        if images is not parts[0]:
            mismatches = class_mismatches(images.store, parts[0].labels)
            yield from (f"{images.store.root}: {mismatch}" for mismatch in mismatches)
        empty = describe_empty_classes(images)
        yield from [empty] if empty else []


def _inspect_file(images: ImageFiles, part: str, index: int) -> _FileInfo:
    path, label = images.path(index), SEPARATOR.join(images.class_names(index))
    try:
        data = images.store.read(bytes(images.paths[index]))
    except OSError as error:
        message = f"{path}: cannot be read ({error}); repair or delete it"
        return _FileInfo(str(path), part, label, error=message)
    try:
        image = open_image(data, path)
        mode, name, frames = image.mode, image.format or "", _count_frames(data)
        pixels = to_rgb(load_pixels(image, path), RULES)
    except DataError as error:
        return _FileInfo(str(path), part, label, len(data), str(error))
    return _FileInfo(
        file=str(path),
        part=part,
        label=label,
        length=len(data),
        format=name,
        mode=mode,
        size=pixels.size,
        file_hash=hashlib.sha256(data).digest()[:16],
        pixel_hash=hashlib.sha256(repr(pixels.size).encode() + pixels.tobytes()).digest()[:16],
        oddities=_oddities(image, pixels, mode, frames),
    )


def _count_frames(data: bytes) -> int:
    """Count the frames of an image; 2 if a later frame is damaged. Training reads only the first one."""
    try:  # on an object of its own, because counting moves to other frames
        return getattr(Image.open(io.BytesIO(data)), "n_frames", 1)
    except Exception:  # Pillow raises many types for damaged frames
        return 2


def _oddities(image: Image.Image, pixels: Image.Image, mode: str, frames: int) -> tuple[str, ...]:
    short, long = sorted(image.size)
    single_color = all(low == high for low, high in pixels.getextrema())  # type: ignore[misc]
    found = {  # these texts are keys of the JSON output
        f"shorter side under {MIN_SIDE} pixels": short < MIN_SIDE,
        f"longer side over {MAX_ASPECT_RATIO:g} times the shorter one": long > MAX_ASPECT_RATIO * short,
        "one colour only": single_color,
        "several frames, the first one counts": frames > 1,
        "printing colours (CMYK)": mode == "CMYK",
        "16 bits a pixel": mode in SIXTEEN_BIT,
        "turned by its EXIF orientation": exif_orientation(image) in ROTATED,
    }
    return tuple(reason for reason, applies in found.items() if applies)


def _find_duplicates(infos: list[_FileInfo]) -> Iterator[Duplicates]:
    groups: dict[bytes, list[_FileInfo]] = {}
    for info in infos:
        groups.setdefault(info.pixel_hash, []).append(info)
    for group in groups.values():
        if len(group) > 1:
            yield Duplicates(
                files=tuple(info.file for info in group),
                same_bytes=len({info.file_hash for info in group}) == 1,
                across=len({info.part for info in group}) > 1,
                labels_differ=len({info.label for info in group}) > 1,
            )
