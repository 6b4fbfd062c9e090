"""Groups of frames and objects by names, times and likeness, and by a pattern that the user gives."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sopdeploy.data.folders.check import check_data
from sopdeploy.data.photos import clips
from sopdeploy.data.photos.clips import Clips, divides_classes, find_clips
from sopdeploy.data.photos.photo import Photo
from sopdeploy.data.sources import FolderConfig, open_data
from sopdeploy.errors import ConfigError, DataError
from sopdeploy.images.metadata import NO_TIME, capture_time
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.training.few_shot.score import estimate_score
from sopdeploy.training.settings.recipe import read_recipe
from tests.sopdeploy.data.photos.test_copies import encoded, scene
from tests.support.small_data import write_classes

CLASSES = 3
OBJECTS = 4
FRAMES = 8


def walk(frames: int, random: np.random.Generator) -> np.ndarray:
    """Draw vectors (frames, 64) that change slowly, so that only frames near each other are alike."""
    steps = random.normal(size=(frames, 64))
    steps[1:] *= 0.7
    return np.cumsum(steps, axis=0)


def film(frames: int = FRAMES) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw the vectors of frames of `OBJECTS` clips in each class, of length 1, with classes and objects."""
    random = np.random.default_rng(0)
    count = CLASSES * OBJECTS
    vectors = np.concatenate([walk(frames, random) for _ in range(count)])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    objects = np.repeat(np.arange(count), frames)
    return vectors.astype(np.float32), objects // OBJECTS, objects


def find(
    names: list[str], vectors: np.ndarray, classes: np.ndarray, times: np.ndarray | None = None
) -> Clips:
    times = np.full(len(names), NO_TIME) if times is None else times
    return find_clips(names, times, classes, vectors, np.arange(len(names)))


# The name of a frame by its object, its number in the clip, and its number in the class.
NAMES: dict[str, Callable[[int, int, int], str]] = {
    "track and frame": lambda clip, frame, _: f"{clip:05}_{frame:05}.png",
    "clip and frame": lambda clip, frame, _: f"clip{clip}_f{frame:03}.jpg",
    "frame and clip": lambda clip, frame, _: f"frame{frame}-of-{clip}.jpg",
    "name of the object": lambda clip, frame, _: f"cup {'abcdefghijkl'[clip]} {frame}.jpg",
    "constant number": lambda clip, frame, _: f"r{clip}_{frame}_100.jpg",
    "numbers of a camera": lambda _clip, _frame, number: f"IMG_{2031 + number}.JPG",
    "date and time": lambda clip, frame, _: f"20260112_{10 + clip:02}{frame:02}00.jpg",
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_frames_of_a_clip_whose_names_tell_it_are_a_group(name: Callable[[int, int, int], str]):
    vectors, classes, objects = film()
    in_class = np.arange(len(objects)) % (OBJECTS * FRAMES)
    names = [
        f"class {label}/{name(int(clip), int(number) % FRAMES, int(number))}"
        for label, clip, number in zip(classes, objects, in_class, strict=True)
    ]
    found = find(names, vectors, classes)

    assert found.groups.tolist() == objects.tolist()
    assert found.certain is not None
    assert objects[found.certain[0]] == objects[found.certain[1]]


def test_photographs_taken_within_seconds_that_are_alike_are_a_group():
    vectors, classes, objects = film()
    times = 1000 * objects + 3 * (np.arange(len(objects)) % FRAMES)
    names = [
        f"{label}/{chr(97 + number % 26) * (1 + number // 26)}.jpg"
        for number, label in enumerate(classes)
    ]

    assert find(names, vectors, classes).groups.tolist() == list(range(len(objects)))
    assert find(names, vectors, classes, times).groups.tolist() == objects.tolist()


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_names_in_sequence_do_not_group_photographs_of_different_objects(
    name: Callable[[int, int, int], str],
):
    _, classes, objects = film()
    vectors = np.random.default_rng(1).normal(size=(len(classes), 64)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    names = [
        f"{label}/{name(int(clip), n % FRAMES, n)}"
        for n, (label, clip) in enumerate(zip(classes, objects, strict=True))
    ]
    found = find(names, vectors, classes)

    assert found == Clips(found.groups)
    assert len(set(found.groups.tolist())) == len(names)


def test_sequences_of_a_few_photographs_are_not_divided_into_clips():
    classes, numbers = np.divmod(np.arange(40 * 4), 4)
    objects = np.arange(40 * 4) // 2  # two photographs of each, one after the other
    vectors = np.eye(80)[objects] + 0.1 * np.random.default_rng(0).normal(size=(160, 80))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    names = [
        f"{label}/IMG_{2031 + number}.JPG"
        for label, number in zip(classes, numbers, strict=True)
    ]

    assert len({*find(names, vectors, classes).groups.tolist()}) == len(names)


def test_alike_frames_of_equal_numbers_do_not_join_clips():
    objects, frames = np.divmod(np.arange(36 * 4), 4)
    classes = objects // 12
    vectors = np.concatenate([1.1 * np.eye(36)[objects], np.eye(4)[frames]], axis=1)
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    names = [
        f"{label}/clip{clip}_f{frame}.jpg"
        for label, clip, frame in zip(classes, objects, frames, strict=True)
    ]

    assert find(names, vectors, classes).groups.tolist() == objects.tolist()


def test_photographs_of_two_sources_are_named_and_not_two_clips():
    random = np.random.default_rng(0)
    count = 120
    classes = np.arange(count) % 3
    sources = np.arange(count) // 3 % 2
    vectors = random.normal(size=(count, 400)) + 8 * np.eye(2, 400)[sources]
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    names = [
        f"{label}/{['web', 'photo'][source]}{n}.jpg"
        for n, (label, source) in enumerate(zip(classes, sources, strict=True))
    ]
    found = find(names, vectors, classes)

    assert len(set(found.groups.tolist())) == count
    assert found.doubtful is not None
    assert found.pattern == r"^\D*"


def test_of_several_relations_that_may_be_clips_the_clearest_is_told():
    relation = clips._Relation("{}", "", np.zeros(6, np.int64))
    measured = [
        clips._Measured(excess, 0.9, (first, first + 1), relation)
        for excess, first in ((0.2, 0), (0.6, 2), (0.4, 4))
    ]
    names = [f"{number}.jpg" for number in range(6)]
    classes = np.zeros(6, np.int64)

    found = clips._find_doubtful(measured, np.arange(6), names, classes)
    joined = clips._find_doubtful(measured, np.asarray([0, 1, 2, 2, 4, 5]), names, classes)

    assert (found, joined) == (measured[1], measured[2])
    assert clips._find_doubtful([], np.arange(6), names, classes) is None


def test_a_single_clip_among_photographs_of_many_objects_is_found():
    vectors, classes, objects = film()
    others = np.random.default_rng(2).normal(size=(40, 64))
    others /= np.linalg.norm(others, axis=1, keepdims=True)
    names = [
        f"{label}/v{clip}_{n}.png"
        for n, (label, clip) in enumerate(zip(classes, objects, strict=True))
    ]
    names += [f"{n % 3}/photo {100 - n}.png" for n in range(40)]
    found = find(
        names,
        np.concatenate([vectors, others.astype(np.float32)]),
        np.append(classes, np.arange(40) % 3),
    )

    assert found.groups.tolist() == [*objects.tolist(), *range(12, 52)]


FOUR = [f"y/{kind}{number}.jpg" for kind in "abcd" for number in range(2)]
# Names of two classes, and whether `^\D*` divides both
PATTERNS = {
    "four objects": ([*FOUR, *(name.replace("y", "x") for name in FOUR)], True),
    "most of a class is one": ([*FOUR, "x/a1.jpg", "x/b1.jpg", "x/b2.jpg", "x/b3.jpg"], False),
    "all single": (FOUR[::2], False),
}


@pytest.mark.parametrize(("names", "divides"), PATTERNS.values(), ids=PATTERNS)
def test_a_pattern_is_advised_only_if_it_divides_each_class(names, divides):
    classes = np.asarray(["xy".index(name[0]) for name in names])
    assert divides_classes(r"^\D*", names, classes) == divides


def test_images_are_grouped_by_the_match_of_a_pattern(tmp_path: Path):
    for label in ("cat", "dog"):
        (tmp_path / label).mkdir()
        for name in ("clip1_01", "clip1_02", "clip2_01", "other", "else"):
            (tmp_path / label / f"{name}.jpg").write_bytes(encoded(scene(len(label + name))))
    images = open_data(FolderConfig(kind="folder", path=tmp_path, groups=r"^clip\d+")).train
    groups = np.unique(images.groups, return_inverse=True)[1]
    paths = [images.identity(index) for index in range(len(images))]
    together = [
        [paths[index] for index in np.flatnonzero(groups == group)]
        for group in range(groups.max() + 1)
    ]

    assert sorted(sorted(one) for one in together if len(one) > 1) == [
        ["cat/clip1_01.jpg", "cat/clip1_02.jpg"],
        ["dog/clip1_01.jpg", "dog/clip1_02.jpg"],
    ]


@pytest.mark.parametrize(
    ("pattern", "error", "problem"),
    [("^video", DataError, "cat/0.jpg"), ("(", ConfigError, "not a regular expression")],
)
def test_a_pattern_that_finds_nothing_or_is_invalid_is_an_error(
    tmp_path: Path, pattern: str, error: type[Exception], problem: str
):
    root = write_classes(tmp_path, ("cat", "dog"))
    with pytest.raises(error, match=problem):
        open_data(read_recipe("photos", [f"data.path={root}", f"data.groups={pattern}"]).data)


def test_the_time_of_a_photograph_is_that_of_its_camera():
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9003] = "2026:01:12 09:30:11"
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG", exif=exif)

    assert Photo("a.jpg", file.getvalue()).taken == 1768210211


def test_the_time_of_a_photograph_does_not_depend_on_its_decoding():
    exif = Image.Exif()
    file = io.BytesIO()
    exif.get_ifd(0x8769)[0x9003] = "2026:01:12 09:30:11"
    Image.new("RGB", (8, 8)).save(file, "PNG", exif=exif.tobytes())
    start = file.getvalue().index(b"eXIf") - 4
    end = file.getvalue().index(b"IDAT") - 4
    png = file.getvalue()
    chunk = file.getvalue()[start:end]
    # Before the last chunk
    behind_pixels = (png[:start] + png[end:]).replace(png[-12:], chunk + png[-12:])

    for content, time in ((png, 1768210211), (behind_pixels, NO_TIME)):
        decoded, preprocessed, unread = (Photo("a.png", content) for _ in range(3))
        assert (
            decoded.pixels.size
            == preprocessed.preprocess(Preprocess(resize=8, crop=8)).shape[:2]
        )
        assert [photo.taken for photo in (decoded, preprocessed, unread)] == [time] * 3


@pytest.mark.parametrize("text", ["yesterday", "2026:13:40 99:99:99", "", None, 7])
def test_a_photograph_with_a_damaged_or_no_time_has_none(text: object):
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9003] = text
    image = Image.new("RGB", (8, 8))
    image.info["exif"] = exif.tobytes() if text is not None else b"Exif\0\0II*\0damaged"

    assert capture_time(image) == NO_TIME
    assert capture_time(Image.new("RGB", (8, 8))) == NO_TIME


def test_data_check_says_nothing_about_different_photographs(tmp_path: Path):
    for number, label in enumerate(("cat", "dog")):
        (tmp_path / label).mkdir()
        for photo in range(24):
            (tmp_path / label / f"{photo}.jpg").write_bytes(
                encoded(scene(100 * number + photo), 90)
            )

    assert not check_data(tmp_path).notes


@pytest.mark.parametrize(
    ("objects", "widened"), [(2, True), (4, True), (5, False), (10, False)]
)
def test_the_interval_allows_for_what_one_more_object_teaches(objects: int, *, widened: bool):
    classes = np.repeat(np.arange(4), 20)
    groups = np.arange(80) // (20 // objects)
    logits = np.eye(4)[np.where(np.arange(80) % 2, classes, (classes + 1) % 4)]
    one_hot = np.eye(4)[classes]
    held_out, validated = (
        estimate_score(one_hot, "softmax", logits, 0, groups, folds) for folds in (0, 2)
    )

    assert validated.share == held_out.share == 0.5

    middle = (validated.low + validated.high) / 2
    assert (middle > 0.52) == widened
