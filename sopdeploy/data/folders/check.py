"""`sopdeploy train --dry-run`: the content and the problems of a folder of images."""

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from sopdeploy.base.config import StrictModel
from sopdeploy.data.folders.cells import SEPARATOR
from sopdeploy.data.folders.folder import describe_single_images, open_parts
from sopdeploy.data.photos.copies import Groups
from sopdeploy.data.photos.file_checks import map_threaded
from sopdeploy.data.photos.files import data_folder
from sopdeploy.data.photos.photo import ImageFiles
from sopdeploy.errors import DataError, shorten_problems
from sopdeploy.images.decode import JPEG

# Images whose features are computed, which takes about four minutes on a CPU
MAX_FEATURES = 10_000
NOT_COMPARED = (
    "near-duplicates were not searched; up to "
    f"{MAX_FEATURES:,} images are compared by a network if the extra train is "
    "installed and a `train` has downloaded its weights"
)


class PartReport(StrictModel):
    """Images of train/, val/ or an unsplit folder; `classes` counts the images of each class."""

    name: str
    count: int
    bytes: int
    classes: dict[str, int]


class Duplicates(StrictModel):
    """Files with identical pixels, or near-duplicates; `across`: in the training part and a held-out one."""

    files: tuple[str, ...]
    across: bool
    labels_differ: bool


class DataReport(StrictModel):
    """Result of a check.

    Attributes:
        shorter_side, longer_side: Minimum, median and maximum in pixels.
        classes: Problems of class folders that stop a training run: a folder has no images, or the held-out
            classes differ from the training classes.
        unreadable: Errors of the files that cannot be decoded.
        too_few: Classes with a single image, which training leaves out if no images are held out by folder.
        near: Groups of near-duplicates, each with a file that is not an exact duplicate; `None` if not searched.
        passed_over: Number of files that are not images, by suffix.
        notes: What the user may not have intended, such as folders that are not used.
    """

    path: Path
    parts: tuple[PartReport, ...]
    formats: dict[str, int]
    shorter_side: tuple[int, int, int]
    longer_side: tuple[int, int, int]
    classes: tuple[str, ...] = ()
    unreadable: tuple[str, ...]
    too_few: tuple[str, ...]
    duplicates: tuple[Duplicates, ...]
    near: tuple[Duplicates, ...] | None = None
    passed_over: dict[str, int]
    notes: tuple[str, ...] = ()

    def must_be_usable(self) -> None:
        """Raise `DataError` if classes cannot be trained on, or any image is unreadable.

        Training itself leaves a few unreadable images out.
        """
        problems = [*self.classes, *self.unreadable]
        # The first part holds the training images.
        num_trained_classes = len(self.parts[0].classes) - len(self.too_few)
        if num_trained_classes < 2:  # training leaves those of one image out, and needs two
            problems += self.too_few
        if problems:
            raise DataError(
                f"{self.path}: cannot be used as it is: {shorten_problems(problems)}"
            )


@dataclass(frozen=True, slots=True)
class _FileInfo:
    """Properties of one file; of an unreadable one, those after `error` are not set."""

    file: str
    part: str
    label: str
    length: int = 0
    error: str = ""
    format: str = ""
    size: tuple[int, int] = (0, 0)
    pixel_hash: str = ""


def check_data(
    path: Path,
    *,
    near: bool = False,
    group_by_features: Callable[[ImageFiles], Groups] | None = None,
    classes_from: str = "",
    leave_out: str = "",
) -> DataReport:
    """Decode every image below *path* that `open_parts` lists, and report contents and problems.

    With *near*, near-duplicates are searched, too, among at most `MAX_FEATURES` images, by
    *group_by_features*, which returns a group number (N,) per image. Without it, a note says so.
    *classes_from* and *leave_out* are those of `open_folder`.
    Raises `DataError` for fewer than two classes.
    """
    opened = open_parts(data_folder(path), classes_from=classes_from, leave_out=leave_out)
    num_images = sum(len(images) for images in opened.parts.values())

    # Without a network, or for many images, only identical files are found.
    if not near or num_images > MAX_FEATURES:
        group_by_features = None

    # Decode all images.
    infos: list[_FileInfo] = []
    parts = []
    for name, images in opened.parts.items():
        inspect = partial(_inspect_file, images, name)
        infos_of_part = list(map_threaded(inspect, len(images)))
        infos += infos_of_part
        counts = dict(zip(images.labels, images.class_counts().tolist(), strict=True))
        size = sum(info.length for info in infos_of_part)
        parts.append(PartReport(name=name, count=len(images), bytes=size, classes=counts))

    readable = [info for info in infos if not info.error]
    notes = [*opened.notes]
    near_groups = None
    if group_by_features is not None:
        near_groups = tuple(_find_near(readable, group_by_features, parts[0].name))
    elif near:
        notes.append(NOT_COMPARED)

    # The two sides of each image, the shorter one first.
    shorter, longer = np.sort([info.size for info in readable] or [(0, 0)], axis=1).T
    train, *held_out = opened.parts.values()

    # If no images are held out by folder, training leaves out classes of one image: it cannot
    # divide them.
    too_few = () if held_out else tuple(describe_single_images(train))

    return DataReport(
        path=path,
        parts=tuple(parts),
        formats=dict(Counter(info.format for info in readable).most_common()),
        shorter_side=(int(shorter.min()), int(np.median(shorter)), int(shorter.max())),
        longer_side=(int(longer.min()), int(np.median(longer)), int(longer.max())),
        classes=tuple(opened.problems),
        unreadable=tuple(info.error for info in infos if info.error),
        too_few=too_few,
        duplicates=tuple(
            _describe_groups(readable, [info.pixel_hash for info in readable], parts[0].name)
        ),
        near=near_groups,
        passed_over=dict(opened.ignored),
        notes=tuple(notes),
    )


def _inspect_file(images: ImageFiles, part: str, index: int) -> _FileInfo:
    """Describe the file of an image, or its length and error."""
    file = str(images.path(index))
    label = SEPARATOR.join(images.class_names(index))
    length = 0  # if it cannot be read
    try:
        photo = images.photo(index)
        length = len(photo.content)
        return _FileInfo(
            file=file,
            part=part,
            label=label,
            length=length,
            format="JPEG" if photo.image.format in JPEG else photo.image.format or "",
            size=photo.pixels.size,
            pixel_hash=photo.pixel_hash,
        )
    except DataError as error:
        return _FileInfo(file=file, part=part, label=label, length=length, error=str(error))


def _find_near(
    infos: Sequence[_FileInfo],
    group_by_features: Callable[[ImageFiles], Groups],
    train: str,
) -> Iterator[Duplicates]:
    """Yield the groups of near-duplicates, except those of exact duplicates alone.

    *train* is the name of the training part.
    """
    if len(infos) < 2:
        return

    _, label_N = np.unique([info.label for info in infos], return_inverse=True)
    paths = np.asarray([os.fsencode(info.file) for info in infos], dtype=np.bytes_)
    images = ImageFiles(Path(), ("",), paths, label_N.astype(np.int64))  # without class names
    groups = group_by_features(images)

    # Groups of exact duplicates alone are listed elsewhere.
    hashes = {info.file: info.pixel_hash for info in infos}
    for group in _describe_groups(infos, groups.tolist(), train):
        if len({hashes[file] for file in group.files}) > 1:
            yield group


def _describe_groups(
    infos: Sequence[_FileInfo], keys: Sequence[object], train: str
) -> Iterator[Duplicates]:
    """Yield the groups of several files with equal *keys*; *train* is the name of the training part."""
    groups = defaultdict[object, list[_FileInfo]](list)
    for info, key in zip(infos, keys, strict=True):
        groups[key].append(info)
    for group in groups.values():
        if len(group) > 1:
            parts = {info.part for info in group}
            yield Duplicates(
                files=tuple(info.file for info in group),
                across=train in parts and len(parts) > 1,
                labels_differ=len({info.label for info in group}) > 1,
            )
