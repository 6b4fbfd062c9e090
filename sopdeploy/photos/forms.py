"""Images beside photographs that are none of their own: masks, and the same pictures in other forms.

Archives hold them in folders with the same names in every class (`<class>/images`,
`<class>/masks`), in a folder beside that of the photographs, or beside each photograph
(`1.jpg`, `1_mask.png`). Names only propose what to compare; pixels decide.
"""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from itertools import combinations, permutations
from pathlib import Path
from typing import NamedTuple, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sopdeploy.errors import DataError
from sopdeploy.files import read_file
from sopdeploy.images.limits import MAX_BYTES
from sopdeploy.photos.files import list_images, list_subfolders, part_kind
from sopdeploy.photos.kept import image_id
from sopdeploy.photos.photo import Photo

# Words of folders that say that their images are masks
MASK_WORDS = {
    *("alpha", "annotated", "annotation", "annotations", "binary", "contour", "contours"),
    *("edge", "edges", "foreground", "ground truth", "groundtruth", "gt", "truth"),
    *("label", "labels", "labeled", "labelled", "mask", "masks", "matte", "mattes"),
    *("outline", "outlines", "seg", "segmentation", "segmentations", "segmented"),
    *("silhouette", "silhouettes", "trimap", "trimaps"),
}
# Of 64 x 64 pixels of a mask, so many values make this share; of 676 photographs at most 87 %.
SAMPLED_SIDE = 64
MASK_VALUES = 32
MASK_SHARE = 0.95
PROPORTIONS = 0.02  # relative difference between those of a mask and its photograph
MASKS_READ = 3  # of each kind; the first that is a photograph ends the search
# Kinds of fewer than one in so many images are not read: a large archive has thousands
MASK_KINDS = 200
FORMS_READ = 6  # pictures of each form: chance would match all of them in one case of 46,656
PAIRED = 200  # images of each folder whose names are compared
FEW_FOLDERS = 4
NEARLY_EQUAL = 0.9
MAX_FORMS = 100  # folders beside each other that are compared: more are classes
COPIED = 0.9  # share of the files of a folder that others must have
FORM_SIDE = 16  # pixels of the pictures that are compared
LOOKS_KEPT = 4096  # of 2 KB

T = TypeVar("T")
Pair: TypeAlias = tuple[bytes, bytes]  # a photograph, and what may be another form of it


class _File(NamedTuple):
    """A path below the folder of a class, and its parts as texts; a folder has many, so no `Path`."""

    path: bytes
    folder: str
    stem: str
    suffix: str

    @classmethod
    def of(cls, path: bytes) -> "_File":
        """Take *path* apart."""
        folder, _, name = os.fsdecode(path).rpartition("/")
        stem, suffix = os.path.splitext(name)  # noqa: PTH122 - no `Path` for each image
        return cls(path, folder, stem, suffix)

    @property
    def below_class(self) -> str:
        """Its folder below the class folder; "" if it is the class folder itself."""
        return self.folder.partition("/")[2]


def find_copied_folders(root: Path, leave_out: Collection[str] = ()) -> list[str]:
    """Find the folders at the top whose files are nearly all in others: backups, caches, favourites.

    A folder with copies of a single other one is as good as that one, unless its name is longer
    and begins or ends as the other's does. The parts of a data set, which are told elsewhere, and
    the folders *leave_out* are not compared.
    """
    names = [name for name in list_subfolders(root) if name not in leave_out]
    if len(names) < 3 or any(map(part_kind, names)):
        return []

    # Files of one size are compared by their content.
    by_size = defaultdict[int, list[tuple[str, Path]]](list)
    counts = Counter[str]()
    for name in names:
        for path in list_images(root, name)[0]:
            file = root / os.fsdecode(path)
            with suppress(OSError):
                by_size[file.stat().st_size].append((name, file))
                counts[name] += 1
    folders_of_content = defaultdict[str, list[str]](list)
    for files in by_size.values():
        if len({name for name, _ in files}) > 1:
            for name, file in files:
                with suppress(OSError):
                    content = read_file(file, MAX_BYTES)
                    folders_of_content[image_id(content)].append(name)

    # The other folders that have the files of each one.
    in_others = defaultdict[str, Counter[str]](Counter)
    copied = Counter[str]()
    for holders in folders_of_content.values():
        for name in holders:
            others = {*holders} - {name}
            in_others[name].update(others)
            copied[name] += bool(others)

    def is_copy(name: str) -> bool:
        if copied[name] < COPIED * max(1, counts[name]):
            return False
        return len(in_others[name]) > 1 or any(
            name != other and (name.startswith(other) or name.endswith(other))
            for other in in_others[name]
        )

    # Of copies, what they were copied from stays.
    found = sorted(filter(is_copy, names), key=lambda name: -len(in_others[name]))
    left_out = list[str]()
    for name in found:
        if {*in_others[name]} - {*left_out}:
            left_out.append(name)
    return sorted(left_out) if len(names) - len(left_out) > 1 else []


def find_variants(root: Path, images: Mapping[str, Sequence[bytes]]) -> set[str]:
    """Find the folders with the pictures of another one again: cleaned, cropped or segmented.

    *images* are those below each folder, as for `find_leftovers`. A variant has the name of its
    original, or the numbers in it, and is more like it than like other pictures. Of more than
    `MAX_FORMS` folders, none is found. Of more than `FEW_FOLDERS`, which are more often classes, the
    pictures must be nearly equal: letters by one hand are alike, too.
    """
    if len(images) > MAX_FORMS:
        return set()
    return {
        os.fsdecode(pairs[0][1].partition(b"/")[0])
        for key in (_stem, _numbers)
        for pairs in _pair_folders(images, key)
        if _worse_form(root, pairs, NEARLY_EQUAL if len(images) > FEW_FOLDERS else 0.0)
    }


class Leftover(NamedTuple):
    """Paths of images that are no photographs of their own, and what they are."""

    paths: set[bytes]
    content: str


def find_leftovers(root: Path, images: Mapping[str, Sequence[bytes]]) -> list[Leftover]:
    """Find masks, and photographs that another folder of the class holds in a better form.

    *images* are the paths below each class folder, relative to *root*. A few files are read of
    each kind whose names could be those of masks or of other forms; the others are not read.
    """
    masks = _find_masks(root, images)
    worse_forms = set[bytes]()
    photographs = {
        label: [path for path in paths if path not in masks] for label, paths in images.items()
    }
    for pairs in _propose_forms(photographs):
        # The form of an earlier pair of folders may be left out already.
        remaining = [pair for pair in pairs if worse_forms.isdisjoint(pair)]
        # 1 or 2, the position in each pair; 0 if these are different photographs.
        if worse := _worse_form(root, remaining):
            worse_forms.update(pair[worse - 1] for pair in remaining)
    leftovers = [
        Leftover(masks, "masks of photos"),
        Leftover(worse_forms, "the same photos in another form"),
    ]
    return [leftover for leftover in leftovers if leftover.paths]


def _find_masks(root: Path, images: Mapping[str, Sequence[bytes]]) -> set[bytes]:
    """Find images with few values that are named like photographs of the same proportions."""
    masks = set[bytes]()
    num_images = sum(map(len, images.values()))
    for pairs in _propose_masks(images):
        is_frequent = len(pairs) * MASK_KINDS >= num_images
        if is_frequent and all(_is_mask(root, *pair) for pair in _spread(pairs, MASKS_READ)):
            masks.update(mask for _, mask in pairs)
    return masks


def _propose_masks(images: Mapping[str, Sequence[bytes]]) -> Iterator[list[Pair]]:
    """Yield the pairs of each kind of images that may be masks, by their names.

    These are of one kind:

    - the images of folders with one name below the classes, such as `cat/masks` and `dog/masks`,
    - images with the names of others and one added text, such as `_mask`, or another suffix,
    - the images of a folder at the top.
    """
    yield from _pair_with_other_classes(images)

    by_folder = defaultdict[str, list[Pair]](list)  # below the class
    by_text = defaultdict[str, list[Pair]](list)  # that the name of a mask adds
    for paths in images.values():
        files = list(map(_File.of, paths))
        for folder, pair in _pair_with_other_folders(files):
            by_folder[folder].append(pair)
        for text, pair in _pair_in_folders(files):
            by_text[text].append(pair)
    yield from by_folder.values()
    yield from by_text.values()


def _pair_with_other_folders(files: Sequence[_File]) -> Iterator[tuple[str, Pair]]:
    """Pair each of a class's *files* with one of another folder, by the numbers in their names.

    Without numbers, the names must be the same. Also yields the folder of each below the class.
    """
    # By numbers: the first file of each folder.
    by_numbers = defaultdict[str, dict[str, _File]](dict)
    for file in files:
        by_numbers[_numbers(file.path) or file.stem].setdefault(file.folder, file)

    for file in files:
        others = by_numbers[_numbers(file.path) or file.stem].items()
        other = next((one for folder, one in others if folder != file.folder), None)
        if other is not None:
            yield file.below_class, (other.path, file.path)


def _pair_in_folders(files: Sequence[_File]) -> Iterator[tuple[str, Pair]]:
    """Pair each of *files* with those of its folder whose names it extends or ends differently.

    Also yields what it adds to the name: a text without digits or, without one, another suffix.
    """
    by_stem = defaultdict[tuple[str, str], list[_File]](list)
    for file in files:
        by_stem[file.folder, file.stem].append(file)

    for file in files:
        for part in (file.stem, *_parts(file.stem)):
            for photograph in by_stem.get((file.folder, part), ()):
                if photograph != file:
                    added = re.sub(r"\d+", "", file.stem.replace(part, "", 1))
                    yield added or file.suffix, (photograph.path, file.path)


def _pair_folders(
    images: Mapping[str, Sequence[bytes]], key: Callable[[bytes], str]
) -> Iterator[list[Pair]]:
    """Yield the pairs of every two folders if half of the images of the second have namesakes in the first.

    Namesakes have the same *key*, a part of the name. The first `PAIRED` images of each folder count.
    """
    by_key = {
        label: {key(path): path for path in paths[:PAIRED]} for label, paths in images.items()
    }
    for (_, ones), (_, others) in permutations(by_key.items(), 2):
        common = sorted(ones.keys() & others.keys())
        if common and 2 * len(common) >= len(others):
            yield [(ones[name], others[name]) for name in common]


def _pair_with_other_classes(images: Mapping[str, Sequence[bytes]]) -> Iterator[list[Pair]]:
    """Yield the pairs of each class folder if at least half of its images have namesakes in another one.

    Names that several other classes have only count the images of each class, unless the folder is
    named as one of masks.
    """
    named_as_masks = _find_named_as_masks(images)
    first_of_class = defaultdict[str, dict[str, bytes]](dict)  # by stem: a path of each class
    for label, paths in images.items():
        for path in paths:
            first_of_class[_stem(path)].setdefault(label, path)

    for label, paths in images.items():
        photographs = named_as_masks.get(label)
        pairs = []
        for path in paths:
            namesakes = first_of_class[_stem(path)]
            elsewhere = [one for name, one in namesakes.items() if name != label]
            if photographs in namesakes:
                pairs.append((namesakes[photographs], path))
            elif len(elsewhere) == 1 or (elsewhere and photographs is not None):
                pairs.append((elsewhere[0], path))
        if pairs and 2 * len(pairs) >= len(paths):
            yield pairs


def _find_named_as_masks(labels: Collection[str]) -> dict[str, str]:
    """Return the folders that are named as masks, each with the folder whose name it extends, or "".

    The name has a word for masks, or adds to the other name what several folders add, such as
    `cat_bw` and `dog_bw`. Numbers and single letters that are added only count.
    """
    extended = {label: _extended(label, labels) for label in labels}
    counts = Counter(added for _, added in extended.values() if len(added) > 1)
    return {
        label: other
        for label, (other, added) in extended.items()
        if not MASK_WORDS.isdisjoint({*_words(label).split(), added}) or counts[added] > 1
    }


def _extended(label: str, labels: Collection[str]) -> tuple[str, str]:
    """Return the longest of *labels* that *label* begins or ends with, and the words that it adds."""
    for length in range(len(label) - 1, 0, -1):
        beginning, end = label[:length], label[-length:]
        if beginning in labels:
            return beginning, _words(label[length:])
        if end in labels:
            return end, _words(label[:-length])
    return "", ""


def _words(name: str) -> str:
    """Return the words of *name* in small letters, with a space between them."""
    parted = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    return re.sub(r"[\W\d_]+", " ", parted).strip().lower()


def _stem(path: bytes) -> str:
    return _File.of(path).stem


def _numbers(path: bytes) -> str:
    """Return the digits of a name, which a photograph and its mask share: 7 for `img_7` and `mask_7`."""
    return " ".join(re.findall(r"\d+", _stem(path)))


def _parts(stem: str) -> Iterator[str]:
    """Yield the beginnings and ends of *stem* between other characters than letters and digits."""
    for separator in re.finditer(r"[\W_]+", stem):
        beginning = stem[: separator.start()]
        end = stem[separator.end() :]
        yield from {beginning, stem[: separator.end()].rstrip(" _-."), end} - {""}


def _is_mask(root: Path, photograph: bytes, other: bytes) -> bool:
    """Tell whether *other* has few values, and *photograph* has many and the same proportions."""
    try:
        mask = _look(root, other)
        if not mask.has_few_values:
            return False
        original = _look(root, photograph)
    except DataError:
        return False

    # Equal proportions: width / height of one is that of the other.
    products = (original.width * mask.height, mask.width * original.height)
    is_similar = abs(products[0] - products[1]) <= PROPORTIONS * max(products)
    return is_similar and not original.has_few_values


def _has_few_values(pixels: Image.Image) -> bool:
    """Tell whether `MASK_VALUES` colors make `MASK_SHARE` of the *pixels*."""
    sampled = pixels.resize((SAMPLED_SIDE, SAMPLED_SIDE), Image.Resampling.NEAREST)
    counts = Counter(sampled.get_flattened_data()).most_common(MASK_VALUES)
    return sum(count for _, count in counts) >= MASK_SHARE * SAMPLED_SIDE**2


def _propose_forms(images: Mapping[str, Sequence[bytes]]) -> Iterator[list[Pair]]:
    """Yield the pairs of namesakes in every two folders, such as `raw` and `small`, that each class has.

    Folders with fewer than `FORMS_READ` pairs are left out, as are those of which most of the
    images in the second one have no namesake.
    """
    if len(images) < 2:
        return

    # The files of each class, by the folder below it and by their names without suffixes.
    folders_of_class = []
    for paths in images.values():
        folders = defaultdict[str, dict[str, bytes]](dict)
        for path in paths:
            file = _File.of(path)
            folders[file.below_class][file.stem] = path
        folders_of_class.append(folders)

    # Every two folders that each class has.
    of_all = set[str](folders_of_class[0]).intersection(*folders_of_class)
    for one, other in combinations(sorted(of_all), 2):
        pairs = [
            (folders[one][stem], folders[other][stem])
            for folders in folders_of_class
            for stem in sorted(folders[one].keys() & folders[other].keys())
        ]
        count = sum(len(folders[other]) for folders in folders_of_class)
        if len(pairs) >= FORMS_READ and 2 * len(pairs) >= count:
            yield pairs


def _worse_form(root: Path, pairs: Sequence[Pair], least: float = 0.0) -> int:
    """Return which form of *pairs* is the worse one, 1 or 2; 0 if nothing shows that both are the same.

    The worse form has fewer pixels or, with as many, less color; of equal forms, it is 2. The
    pictures are the same if each is most like its namesake. Otherwise these folders hold different
    photographs with the same numbers, such as those of two days. The likeness, a correlation, must be
    *least* in each pair.
    """
    if len(pairs) < FORMS_READ:
        return 0

    # Whether each picture is most like its namesake: the first pair that is not ends the reading.
    looks = list[tuple[_Look, _Look]]()
    for one, other in _spread(pairs, FORMS_READ):
        try:
            looks.append((_look(root, one), _look(root, other)))
        except DataError:
            return 0

        ones, others = (
            np.stack([look.small for look in form]) for form in zip(*looks, strict=True)
        )
        likeness = ones @ others.T
        order = np.arange(len(looks))
        if (likeness.argmax(axis=1) != order).any() or (likeness.argmax(axis=0) != order).any():
            return 0
        if likeness.diagonal().min() < least:
            return 0

    qualities = [
        (sum(look.width * look.height for look in form), sum(look.color for look in form))
        for form in zip(*looks, strict=True)
    ]
    return 2 if qualities[0] >= qualities[1] else 1


class _Look(NamedTuple):
    """What is compared of a picture: its size, how colored it is, and its gray values at a small size.

    `small` (`FORM_SIDE` ** 2,) is normalized so that products are correlations. `color` is the mean
    difference of the channels, 0 for gray pictures.
    """

    width: int
    height: int
    has_few_values: bool
    color: float
    small: NDArray[np.float64]


def _look(root: Path, path: bytes) -> _Look:
    """Look at a picture; raises `DataError` if it cannot be read.

    Each picture is compared with those of many folders, in several readings of the same data set.
    """
    file = root / os.fsdecode(path)
    try:
        changed = file.stat().st_mtime_ns
    except OSError as error:
        raise DataError(f"{file}: cannot be read") from error
    return _look_at(root, path, changed)


@lru_cache(maxsize=LOOKS_KEPT)
def _look_at(root: Path, path: bytes, changed: int) -> _Look:  # noqa: ARG001 - part of the key
    pixels = _read(root, path)
    gray = pixels.convert("L").resize((FORM_SIDE, FORM_SIDE), Image.Resampling.BOX)
    values = np.asarray(gray, np.float64).ravel()
    values -= values.mean()
    small = values / max(float(np.linalg.norm(values)), 1e-9)
    colors = np.asarray(pixels.resize((FORM_SIDE, FORM_SIDE)), np.float64)
    color = float(np.ptp(colors, axis=2).mean())
    return _Look(pixels.width, pixels.height, _has_few_values(pixels), color, small)


def _read(root: Path, path: bytes) -> Image.Image:
    """Read the upright pixels of the file; raises `DataError` if it cannot be read."""
    name = root / os.fsdecode(path)
    try:
        return Photo(str(name), read_file(name, MAX_BYTES)).pixels
    except OSError as error:
        raise DataError(f"{name}: cannot be read") from error


def _spread(values: Sequence[T], count: int) -> list[T]:
    """Return *count* of *values*, or all, spread over them."""
    positions = np.linspace(0, len(values) - 1, min(count, len(values))).astype(int)
    return [values[position] for position in positions.tolist()]
