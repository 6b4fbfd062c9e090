"""What a folder or archive of images holds, and what is wrong with it, before a network learns from it."""

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from sopdeploy.config import StrictModel
from sopdeploy.data.datasets.folder import HELD_OUT, TRAIN, class_names, open_store, pictures_of, scan
from sopdeploy.data.image_files import ImageFiles, Opening, loaded, opened, passed_over
from sopdeploy.data.validation import each
from sopdeploy.errors import DataError
from sopdeploy.images.color import SIXTEEN_BIT
from sopdeploy.images.preprocess import Preprocess, is_rotated, to_rgb

TINY = 32  # pixels of the shorter side, below which hardly anything is to be seen
LONG = 4.0  # times its width, above which the centre crop shows little of a picture
RULES = Preprocess()  # of which turning and colours are used
EVERYTHING = "all"  # the only part, where there are no folders train and val


class Part(StrictModel):
    """The images of train/, val/ or of a folder without such; `classes` counts those of each class."""

    name: str
    count: int
    bytes: int
    classes: dict[str, int]


class Duplicates(StrictModel):
    """Files with the same pixels; `same_bytes` where the files are equal too.

    `across` says that a part to measure on shows what was learnt, `labels_differ` that one picture is said to
    be of two classes.
    """

    files: tuple[str, ...]
    same_bytes: bool
    across: bool
    labels_differ: bool


class DataReport(StrictModel):
    """What was found; sides are in pixels, `strange` says why of each odd file that can be read.

    `passed_over` counts the files that are no pictures by their names, by ending.
    """

    path: Path
    parts: tuple[Part, ...]
    formats: dict[str, int]
    modes: dict[str, int]
    shorter_side: tuple[int, int, int]  # least, median, most
    longer_side: tuple[int, int, int]
    unreadable: tuple[str, ...]
    too_few: tuple[str, ...]
    duplicates: tuple[Duplicates, ...]
    strange: dict[str, tuple[str, ...]]
    passed_over: dict[str, int]

    def must_be_usable(self) -> None:
        """Raise `DataError` with everything that keeps a run from its end."""
        problems = [*self.unreadable, *self.too_few]
        if problems:
            raise DataError(f"{self.path}: cannot be used as it is: " + "; ".join(problems))


@dataclass(frozen=True, slots=True)
class Look:
    """What one file gave: `problem`, or all the rest."""

    file: str
    part: str
    label: str
    length: int
    problem: str = ""
    format: str = ""
    mode: str = ""
    size: tuple[int, int] = (0, 0)
    content: bytes = b""
    pixels: bytes = b""
    odd: tuple[str, ...] = ()


def check(path: Path, cache: Path | None = None) -> DataReport:
    """Return what *path*, a folder or tar archive with one folder per class, holds: every file is decoded.

    Raises `DataError` where there are no classes, or others than to learn from.
    """
    parts = parts_of(path.expanduser(), Opening(cache))
    looks = [look for name, part in parts.items() for look in looks_at(part, name)]
    good = [look for look in looks if not look.problem]
    strange: dict[str, list[str]] = {}
    for look in good:
        for why in look.odd:
            strange.setdefault(why, []).append(look.file)
    return DataReport(
        path=path,
        parts=tuple(count_part(name, part, looks) for name, part in parts.items()),
        formats=dict(Counter(look.format for look in good).most_common()),
        modes=dict(Counter(look.mode for look in good).most_common()),
        shorter_side=spread([min(look.size) for look in good]),
        longer_side=spread([max(look.size) for look in good]),
        unreadable=tuple(look.problem for look in looks if look.problem),
        too_few=tuple(too_few(parts)),
        duplicates=tuple(duplicates(good)),
        strange={why: tuple(files) for why, files in strange.items()},
        passed_over=dict(sum((Counter(others_in(part)) for part in parts.values()), Counter())),
    )


def parts_of(path: Path, opening: Opening) -> dict[str, ImageFiles]:
    """Return the parts of a data set, each with the classes of the first."""
    store = open_store(path, opening)
    names = [name for name in (TRAIN, *HELD_OUT) if name in store.folders()]
    if TRAIN not in names:
        return {EVERYTHING: scan(store, class_names(store))}
    train = store.below(TRAIN)
    labels = class_names(train)
    rest = {name: pictures_of(store.below(name), labels) for name in names[1:]}
    return {TRAIN: scan(train, labels), **rest}


def others_in(pictures: ImageFiles) -> dict[str, int]:
    """Return how many files beside the pictures of one part are none, by ending."""
    return passed_over(pictures.store, pictures.labels)


def looks_at(pictures: ImageFiles, part: str) -> Iterable[Look]:
    """Yield what each file of one part gives."""

    def look(index: int) -> Look:
        file, label = pictures.where(index), pictures.labels[int(pictures.targets[index])]
        try:
            data = pictures.store.read(bytes(pictures.paths[index]))
        except OSError as problem:
            return Look(file, part, label, 0, f"{file}: cannot be read ({problem}); repair or delete it")
        try:
            picture = opened(data, file)
            mode, name, frames = picture.mode, picture.format or "", getattr(picture, "n_frames", 1)
            pixels = to_rgb(loaded(picture, file), RULES)
        except DataError as problem:
            return Look(file, part, label, len(data), str(problem))
        shape = repr(pixels.size).encode()
        return Look(
            file=file,
            part=part,
            label=label,
            length=len(data),
            format=name,
            mode=mode,
            size=pixels.size,
            content=hashlib.sha256(data).digest()[:16],
            pixels=hashlib.sha256(shape + pixels.tobytes()).digest()[:16],
            odd=tuple(oddities(picture, pixels, mode, frames)),
        )

    return each(look, len(pictures))


def oddities(picture: Image.Image, pixels: Image.Image, mode: str, frames: int) -> Iterable[str]:
    """Say what is unusual about a picture that can be read."""
    short, long = sorted(picture.size)
    found = {
        f"shorter side under {TINY} pixels": short < TINY,
        f"longer than {LONG:g} times its width": long > LONG * short,
        "one colour only": all(low == high for low, high in pixels.getextrema()),  # type: ignore[misc]
        "several frames, the first one counts": frames > 1,
        "printing colours (CMYK)": mode == "CMYK",
        "16 bits a pixel": mode in SIXTEEN_BIT,
        "turned by its EXIF orientation": is_rotated(picture),
    }
    return [why for why, holds in found.items() if holds]


def duplicates(looks: list[Look]) -> Iterable[Duplicates]:
    """Yield the groups of files that show the same pixels, in the order of their first files."""
    groups: dict[bytes, list[Look]] = {}
    for look in looks:
        groups.setdefault(look.pixels, []).append(look)
    for group in groups.values():
        if len(group) > 1:
            yield Duplicates(
                files=tuple(look.file for look in group),
                same_bytes=len({look.content for look in group}) == 1,
                across=len({look.part for look in group}) > 1,
                labels_differ=len({look.label for look in group}) > 1,
            )


def count_part(name: str, pictures: ImageFiles, looks: list[Look]) -> Part:
    """Return the counts of one part, unreadable files included."""
    counts = np.bincount(pictures.targets, minlength=len(pictures.labels)).tolist()
    return Part(
        name=name,
        count=len(pictures),
        bytes=sum(look.length for look in looks if look.part == name),
        classes=dict(zip(pictures.labels, counts, strict=True)),
    )


def too_few(parts: dict[str, ImageFiles]) -> Iterable[str]:
    """Yield the classes of which nothing can be held out."""
    if len(parts) == 1:
        for pictures in parts.values():
            for target in np.flatnonzero(np.bincount(pictures.targets) == 1):
                yield f"{pictures.store.root / pictures.labels[target]}: one image only; add another"


def spread(values: list[int]) -> tuple[int, int, int]:
    """Return the least, the median and the most of *values*, zeros for none."""
    return (min(values), int(np.median(values)), max(values)) if values else (0, 0, 0)
