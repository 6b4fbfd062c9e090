"""Why a folder holds no classes: what is there instead of images in class folders, and what to do."""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from sopdeploy.base.files import POINTER_ADVICE, is_pointer
from sopdeploy.data.photos.contents import Contents
from sopdeploy.data.photos.parts import LABELS_FILE
from sopdeploy.errors import DataError, amount, shorten
from sopdeploy.images.signatures import (
    OF_DOCUMENTS,
    count_suffixes,
    describe_conversion,
    describe_suffixes,
    find_converter,
    suffix_of,
)
from sopdeploy.paths import ARCHIVES, COMPRESSED

# Of files with many images, which no command converts; .h5 and .pkl are more often networks
ARRAYS = (".lmdb", ".mat", ".npy", ".npz", ".parquet", ".tfrecord")
SPREADSHEETS = (".numbers", ".ods", ".xls", ".xlsx")
TABLES = (".csv", ".tsv")
# Of files that describe boxes and outlines in images: COCO, VIA, LabelMe, Darwin, Supervisely; CVAT, Pascal
# VOC; YOLO
ANNOTATIONS = (".json", ".xml", ".txt")


def no_classes_error(contents: Contents) -> DataError:
    """Build the error for a folder in which nothing tells classes: what is there, what to do."""
    root, images, others = contents.root, contents.images, contents.others
    packed = _find_packed(contents)
    advice = advise_on_files(root, packed if images else others)
    if not advice:
        advice = _advise_on_labels(contents)
    if not advice:
        verb = "sort the images" if images else "put images into it,"
        advice = f"{verb} {'into' if images else 'in'} one subfolder per class"
    return DataError(
        f"{root}: holds no class folders and no {LABELS_FILE} ({_describe(contents)}); {advice}"
    )


def advise_on_files(where: Path, files: Sequence[str]) -> str:
    """Say what makes images of *files* in *where*, which are none; "" if it is not known."""
    # A pointer stands for any file. An archive may hold all images.
    for file in files:
        if is_pointer(where / file):
            return f"{where / file} is {POINTER_ADVICE}"
    if archives := [file for file in files if _is_packed(file)]:
        return f"unpack {shorten(archives)}"

    # Other formats, of one image each or of many; a few documents are not photographs.
    most = next(iter(count_suffixes(files)), "")
    for file in files:
        if suffix_of(file) != most and find_converter(suffix_of(file)) in OF_DOCUMENTS:
            continue
        if conversion := describe_conversion(where, file, files):
            return conversion
    for file in files:
        if file.lower().endswith(ARRAYS):
            return f"write the images of {file} to image files, in one subfolder per class"
    return ""


def may_hold_photographs(file: str) -> bool:
    """Tell whether *file* is an archive, or has the suffix of an image format that is not read."""
    converter = find_converter(suffix_of(file))
    return file.lower().endswith(ARCHIVES) or converter not in ("", *OF_DOCUMENTS)


def _advise_on_labels(contents: Contents) -> str:
    """Say how files that may label the images become something that is read; "" without any."""
    if sheets := [file for file in contents.files if file.lower().endswith(SPREADSHEETS)]:
        return f"save {sheets[0]} as {LABELS_FILE} with the columns file,classes"

    # One file of annotations beside each image, or one for all
    stems = {PurePosixPath(os.fsdecode(path)).stem for path in contents.images}
    annotations = [file for file in contents.others if file.lower().endswith(ANNOTATIONS)]
    beside = [file for file in annotations if PurePosixPath(file).stem in stems]
    of_all = [
        file for file in annotations if "coco" in file.lower() or "annotations" in file.lower()
    ]
    found = beside if 2 * len(beside) > len(stems) else of_all
    if contents.images and found:
        return (
            f"if {amount(len(found), 'file')} such as {found[0]} describe the images, convert them to class "
            "folders with datumaro (`datum convert`) or FiftyOne (`fiftyone convert`), as the page on photos says"
        )
    return ""


def _find_packed(contents: Contents) -> list[str]:
    """List the files that stand for files that are not there yet.

    These are archives and, directly in the folder, compressed tables and pointers; a pointer below
    may be of weights. A folder that holds some of the images has been unpacked.
    """
    return [
        file
        for file in contents.others
        if (_is_packed(file) and file.partition("/")[0] not in contents.tops)
        or ("/" not in file and is_pointer(contents.root / file))
    ]


def _is_packed(file: str) -> bool:
    """Tell whether *file* is an archive, or a compressed table that is not in a folder, as logs are."""
    name = PurePosixPath(file.lower())
    is_compressed = name.suffix in COMPRESSED and name.with_suffix("").suffix in TABLES
    return name.name.endswith(ARCHIVES) or (is_compressed and "/" not in file)


def _describe(contents: Contents) -> str:
    """Say what a folder holds: its folders with counts, and its files by suffix."""
    names = (os.fsdecode(path) for path in contents.images)
    counts = Counter(f"{path.partition('/')[0]}/" if "/" in path else "" for path in names)
    seen = [
        f"{name} {amount(count, 'image')}".strip() for name, count in sorted(counts.items())
    ]
    if contents.others:
        seen.append(f"other files: {describe_suffixes(count_suffixes(contents.others))}")
    return shorten(seen) or "it is empty"
