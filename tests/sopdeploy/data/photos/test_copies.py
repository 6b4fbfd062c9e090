"""Groups of near-duplicates, their use in splits, and `train --dry-run`."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps
from typer.testing import CliRunner

from sopdeploy.data.folders.check import NOT_COMPARED, check_data
from sopdeploy.data.folders.class_folders import list_classes
from sopdeploy.data.folders.folder import open_folder
from sopdeploy.data.folders.table import UNSPLIT, read_label_table
from sopdeploy.data.photos.contents import list_contents
from sopdeploy.data.photos.copies import (
    NO_PAIRS,
    NearDuplicates,
    connect,
    find_near_duplicates,
    find_turned,
    group_photographs,
    shrink,
)
from sopdeploy.data.photos.file_checks import describe_seen, hash_images
from sopdeploy.data.photos.photo import ArrayImages, Split
from sopdeploy.data.photos.split import (
    NONE,
    choose_held_out,
    divide,
    hold_out,
    record_choice,
    recorded_choice,
)
from sopdeploy.errors import DataError
from sopdeploy.evaluation.metrics import Rate, effective_count
from sopdeploy.training.callback import Callback
from sopdeploy.training.distributed import Strategy
from sopdeploy.training.division import divide_images
from sopdeploy.training.records.run_folder import RunFolder
from sopdeploy.training.settings.recipe import read_recipe
from sopdeploy.training.setup import set_up_run
from sopdeploy.training.train import train_recipe
from sopdeploy_commands.app import app
from tests.support.small_data import jpeg, write_classes, write_photos

TINY = (
    "model.name=dsop-resnet8",
    "model.config={aux_widths=[4,4,4], iterations=1}",
    "start.weights=none",
    "epochs=1",
    "preprocess.resize=16",
    "preprocess.crop=16",
)
CPU = torch.device("cpu")


def scene(seed: int) -> Image.Image:
    """Paint rectangles at random places."""
    random = np.random.default_rng(seed)
    image = Image.new("RGB", (160, 120), tuple(random.integers(0, 255, 3).tolist()))
    for _ in range(12):
        width, height = random.integers(20, 70, 2).tolist()
        x = random.integers(0, 130)
        y = random.integers(0, 100)
        color = tuple(random.integers(0, 255, 3).tolist())
        image.paste(color, (int(x), int(y), int(x) + width, int(y) + height))
    return image


def encoded(image: Image.Image, quality: int = 50) -> bytes:
    """Encode *image* as JPEG."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def write_scenes(root: Path, each: int = 12, copies: int = 0) -> Path:
    """Write *each* different scenes per class, and *copies* darker, smaller ones of each, below *root*."""
    for place, label in enumerate(("cat", "dog")):
        (root / label).mkdir(parents=True)
        for number in range(each):
            image = scene(100 * place + number)
            image.save(root / label / f"{number}.png")
            for copy in range(copies):
                other = ImageEnhance.Brightness(image.resize((100, 75))).enhance(
                    0.9 - 0.1 * copy
                )
                (root / label / f"{number}-{copy}.jpg").write_bytes(encoded(other))
    return root


def true_groups(paths: np.ndarray) -> list[str]:
    """Name the scene of each path."""
    return [path.decode().split(".")[0].split("-")[0] for path in paths]


@pytest.mark.parametrize("copies", [0, 1, 2])
def test_smaller_darker_copies_are_grouped_without_a_network(tmp_path: Path, copies: int):
    images = list_classes(list_contents(write_scenes(tmp_path, copies=copies))).images
    groups = group_photographs(images).groups
    scenes = true_groups(images.paths)

    assert groups.tolist() == [list(dict.fromkeys(scenes)).index(one) for one in scenes]


def compare(
    views: NDArray[np.float64],
    classes: NDArray[np.int64],
    parts: NDArray[np.intp] | None = None,
) -> NearDuplicates:
    """Find the near-duplicates among images of different scenes with *views* (N, V, D)."""
    small = np.stack([shrink(scene(number)) for number in range(len(views))])
    return find_near_duplicates(
        [views.astype(np.float32)], small, classes, list(map(str, range(len(views)))), parts
    )


def pairs_of(found: NearDuplicates) -> list[list[int]]:
    """List the pairs, each once and in ascending order, sorted."""
    return np.unique(np.sort(found.pairs, axis=0), axis=1).T.tolist()


def random_views(count: int, num_views: int = 1) -> NDArray[np.float64]:
    """Return views (count, num_views, 64) of images that have a direction in common."""
    return 3.0 + np.random.default_rng(0).normal(size=(count, num_views, 64))


@pytest.mark.parametrize(
    ("noise", "expected"),
    [(0.3, [[3, 8], [3, 20], [8, 20]]), (3.0, [])],
    ids=["copies", "others"],
)
def test_images_of_one_direction_beside_what_all_have_in_common_are_copies(
    noise: float, expected: list[list[int]]
):
    views = random_views(24)
    views[[8, 20]] = views[3] + noise * np.random.default_rng(1).normal(size=(2, 1, 64))
    assert pairs_of(compare(views, np.arange(24) % 2)) == expected

    # Of two parts, only pairs of both.
    is_between = [[one, other] for one, other in expected if one < 12 <= other]
    assert pairs_of(compare(views, np.arange(24) % 2, np.repeat([0, 1], 12))) == is_between


def test_an_image_that_resembles_a_corner_of_another_one_is_its_copy():
    views = random_views(60, num_views=5)
    views[24, 0] = views[3, 4] + 0.3 * np.random.default_rng(1).normal(size=64)

    assert pairs_of(compare(views, np.arange(60) % 4)) == [[3, 24]]


def test_a_class_that_would_be_one_group_has_no_copies():
    views = random_views(44)
    views[30:] = views[30] + 0.2 * np.random.default_rng(1).normal(size=(14, 1, 64))
    views[1] = views[0]
    classes = np.repeat([0, 1], [30, 14])
    found = compare(views, classes)

    assert pairs_of(found) == [[0, 1]]
    assert found.alike.tolist() == [False] * 30 + [True] * 14


@pytest.mark.parametrize("count", [1, 2])
def test_a_folder_of_one_or_two_images_has_no_near_duplicates(count: int):
    assert not compare(random_views(count), np.zeros(count, np.int64)).pairs.size


@pytest.mark.parametrize("choice", [[NONE, 0, NONE, 3, 0], [NONE] * 5])
def test_a_recorded_choice_is_found_again_in_another_order(choice: list[int]):
    hashes = np.asarray([5, -7, 9, 2, -7], np.int64)
    record = record_choice(np.asarray(choice, np.int64), hashes)

    assert recorded_choice(record, hashes[::-1]).tolist() == choice[::-1]
    assert recorded_choice(record, np.asarray([1, 99], np.int64)).tolist() == [NONE, NONE]


BROKEN = "an image that cannot be read"


@pytest.mark.parametrize("case", ["other bytes", "many images", BROKEN])
def test_equal_images_are_on_one_side_whatever_the_measure_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
):
    for number in range(30):
        for label, ending in (
            ("cat", "png"),
            ("dog", "bmp" if case == "other bytes" else "png"),
        ):
            (tmp_path / label).mkdir(exist_ok=True)
            scene(number).save(tmp_path / label / f"{number}.{ending}")
    if case == BROKEN:
        (tmp_path / "cat" / "broken.png").write_bytes(b"no image")
    if case == "many images":
        monkeypatch.setattr("sopdeploy.data.photos.copies.MAX_COMPARED", 10)
    monkeypatch.setattr("sopdeploy.data.photos.copies.find_turned", lambda *_: NO_PAIRS)
    images = list_classes(list_contents(tmp_path)).images
    choice = choose_held_out(images, group_photographs(images).groups, 0.3, 0)
    sides: dict[str, set[bool]] = {}
    for path, group in zip(images.paths, choice, strict=True):
        sides.setdefault(Path(path.decode()).stem, set()).add(bool(group != NONE))

    assert {len(side) for side in sides.values()} == {1}
    assert len(set(choice[choice != NONE].tolist())) == 9


def test_pairs_and_equal_keys_are_connected_and_groups_count_by_their_size():
    groups = connect(
        6, np.asarray([[0], [3]]), ["a", "b", "b", "c", "d", "e"], None, [1, 2, 3, 4, 4, 5]
    )

    assert groups.tolist() == [0, 1, 1, 0, 0, 2]
    assert effective_count(groups) == pytest.approx(36 / 14)
    assert effective_count(np.arange(7)) == 7


def test_a_folder_per_object_is_never_divided(tmp_path: Path):
    for place, name in enumerate(("cat/tom", "cat/tim", "cat/tam", "dog/all")):
        (tmp_path / name).mkdir(parents=True)
        for number in range(4):
            scene(10 * place + number).save(tmp_path / name / f"{number}.png")
    images = list_classes(list_contents(tmp_path)).images
    # Three cats are groups. The only folder of a class is none, so each of four dogs is its own.
    assert len(set(images.groups.tolist())) == 3 + 4

    choice = choose_held_out(images, group_photographs(images).groups, 0.3, 0)
    held_out = divide(Split.undivided(images), choice).held_out
    assert len({path.split(b"/")[1] for path in held_out.paths if path.startswith(b"cat")}) == 1


def test_rows_with_the_same_cell_in_the_column_group_are_one_group(tmp_path: Path):
    for number in range(16):
        scene(number).save(tmp_path / f"{number}.png")
    rows = [
        f"{number}.png,{'cat' if number < 12 else 'dog'},{'burst' if number < 4 else ''}"
        for number in range(16)
    ]
    (tmp_path / "labels.csv").write_text(
        "\n".join(["file,classes,group", *rows]), encoding="utf-8"
    )
    table = read_label_table(tmp_path / "labels.csv")

    assert len(set(table.parts[UNSPLIT].groups.tolist())) == 1 + 12


@pytest.mark.parametrize("multi_label", [False, True])
def test_a_group_of_several_classes_counts_for_each_of_them(multi_label: bool):
    """Ten patients have benign images, the last two of them also a melanoma."""
    targets = np.repeat([0, 1], [10, 2])
    patients = np.asarray([*range(10), 8, 9])
    images = ArrayImages(
        ("benign", "melanoma"),
        np.zeros((12, 4, 4, 3), np.uint8),
        np.eye(2, dtype=np.float32)[targets] if multi_label else targets,
    )

    for seed in range(40):
        is_held_out = choose_held_out(images, patients, 0.2, seed) != NONE
        for side in (is_held_out, ~is_held_out):
            assert set(targets[side].tolist()) == {0, 1}
        assert not set(patients[is_held_out].tolist()) & set(patients[~is_held_out].tolist())
        benign = images.select(targets == 0)
        keys = [benign.identity(index) for index in range(10)]
        chosen = choose_held_out(benign, patients[:10], 0.2, seed) != NONE
        assert chosen.tolist() == hold_out(keys, benign.targets, 0.2, seed).tolist()


def write_groups(root: Path, **groups: str) -> Path:
    """Write four scenes of each class, and `labels.csv` with a letter for the group of each of them."""
    write_scenes(root, each=4)
    rows = [f"{label}/{number}.png,{label},{label} {group}"
            for label, letters in groups.items() for number, group in enumerate(letters)]  # fmt: skip
    (root / "labels.csv").write_text("\n".join(["file,classes,group", *rows]), encoding="utf-8")
    return root


class Warnings(Callback):
    """Records the warnings of a run."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def on_warning(self, message: str) -> None:
        self.lines.append(message)


def test_a_class_of_one_group_is_named_and_not_held_out(tmp_path: Path):
    root = write_groups(tmp_path / "photos", cat="aaaa", dog="aabb")
    warnings = Warnings()
    recipe = read_recipe("photos-dsop", [f"data.path={root}", *TINY])
    split = divide_images(recipe, open_folder(recipe.data.path), None, Strategy(CPU)).data

    assert split.held_out.class_counts().tolist() == [0, 2]

    found = train_recipe(recipe, tmp_path / "run", callback=warnings).procedure.top1
    assert any(line.startswith("cat: ") for line in warnings.lines)
    assert found == Rate.of(found.right, 2, 1)  # both images are one group


@pytest.mark.parametrize("kind", ["loop", "fine_tune"])
def test_the_loop_does_not_start_if_every_class_is_one_group(tmp_path: Path, kind: str):
    root = write_groups(tmp_path / "photos", cat="aaaa", dog="aaaa")
    warnings = Warnings()
    recipe = read_recipe("photos-dsop", [f"data.path={root}", *TINY, f"procedure.kind={kind}"])
    problem = "cat, dog: all images"

    if kind == "loop":
        with pytest.raises(DataError, match=problem):
            set_up_run(recipe, RunFolder(tmp_path / "run", Strategy(CPU)), None, warnings)
        assert not (tmp_path / "run").exists()
    else:  # it keeps the network of the few-shot procedure
        set_up_run(recipe, RunFolder(tmp_path / "run", Strategy(CPU)), None, warnings)
        assert any(line.startswith(problem) for line in warnings.lines)


@pytest.mark.slow
def test_the_loop_holds_out_no_copies_of_training_images(tmp_path: Path):
    root = write_scenes(tmp_path, copies=1)
    recipe = read_recipe("photos-dsop", [f"data.path={root}"])
    before = open_folder(recipe.data.path)
    split = divide_images(recipe, before, None, Strategy(CPU)).data
    parts = [set(true_groups(part.paths)) for part in (split.train, split.held_out)]

    assert not parts[0] & parts[1]
    assert len(split.train) + len(split.held_out) == 48


def test_the_loop_fits_its_threshold_to_one_image_of_each_group(tmp_path: Path):
    colors = np.random.default_rng(0).integers(0, 255, (2, 2, 30, 3))
    for place, (part, copies) in enumerate((("train", 1), ("val", 2))):
        for name, color in np.ndenumerate(colors[place, ..., 0]):
            folder = tmp_path / part / "ab"[name[0]] / str(name[1])
            folder.mkdir(parents=True)
            for copy in range(copies):
                Image.new("RGB", (16, 16), (int(color), *colors[place, *name, 1:])).save(
                    folder / f"{copy}.png"
                )
    said = [f"data.path={tmp_path}", "data.classes_from=folders"]
    recipe = read_recipe("photos-dsop", [*said, *TINY])
    result = train_recipe(recipe, tmp_path / "run")

    assert result.held_out_count == 120
    assert result.decision.calibration.num_images == 60


@pytest.mark.parametrize(("is_sample", "count"), [(False, "2 of 3"), (True, "at least 2 of 3")])
def test_images_of_a_bundle_with_a_sample_are_at_least_so_many(is_sample: bool, count: str):
    images = ArrayImages(
        ("a",), np.arange(12, dtype=np.uint8).reshape(3, 2, 2), np.zeros(3, np.int64)
    )
    found = describe_seen(images, hash_images(images)[:2], is_sample=is_sample)

    assert found.startswith(f"{count} images ")


def test_copies_in_two_held_out_parts_are_not_in_the_training_data(tmp_path: Path):
    for part in ("train", "val", "test"):
        for number, label in enumerate(("cat", "dog")):
            (tmp_path / part / label).mkdir(parents=True)
            shade = (60 if part == "train" else 0) + 20 * number
            Image.new("L", (9, 9), shade).save(tmp_path / part / label / "1.png")
    found = check_data(tmp_path).duplicates

    assert [(len(group.files), group.across) for group in found] == [(2, False)] * 2


@pytest.mark.slow
def test_near_duplicates_are_listed_once_weights_of_the_default_network_are_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    root = write_scenes(tmp_path / "photos")
    for part in ("train", "val"):
        (root / part).mkdir()
    for label in ("cat", "dog"):
        (root / label).rename(root / "train" / label)
        (root / "val" / label).mkdir()
        scene(200 + len(label)).save(root / "val" / label / "own.png")
    ImageOps.mirror(scene(3)).save(root / "val" / "dog" / "mirror.png")

    def near() -> tuple[list[tuple[set[str], bool, bool]] | None, list[str]]:
        shown = CliRunner().invoke(app, ["train", "--dry-run", "--data", str(root), "--json"])
        report = json.loads(shown.stdout)
        groups = report["near"] and [
            (
                {Path(file).name for file in group["files"]},
                group["across"],
                group["labels_differ"],
            )
            for group in report["near"]
        ]
        return groups, report["notes"]

    assert near() == ([({"3.png", "mirror.png"}, True, True)], [])

    monkeypatch.setattr("sopdeploy.data.folders.check.MAX_FEATURES", 24)
    assert near() == (None, [NOT_COMPARED])
    monkeypatch.undo()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("sopdeploy.weights.published.PACKAGES", {})
    assert near() == (None, [NOT_COMPARED])


@pytest.fixture
def photos(tmp_path):
    """Write photos with a copy in val/, and duplicate pixels in another class."""
    root = write_photos(tmp_path / "photos")
    (root / "val" / "cat" / "copy.jpg").write_bytes(
        (root / "train" / "cat" / "0.jpg").read_bytes()
    )
    Image.open(root / "train" / "cat" / "1.jpg").save(root / "train" / "dog" / "same.png")
    Image.new("RGB", (200, 20)).save(root / "train" / "dog" / "thin.png")
    deep = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)
    Image.fromarray(deep).save(root / "train" / "dog" / "deep.png")
    frames = [Image.fromarray(np.full((40, 40), shade, dtype=np.uint8)) for shade in (9, 99)]
    frames[0].save(
        root / "train" / "dog" / "moving.gif", save_all=True, append_images=frames[1:]
    )
    return root


def test_parts_formats_sizes_and_duplicates_are_reported(photos) -> None:
    found = check_data(photos)
    assert {part.name: part.classes for part in found.parts} == {
        "train": {"cat": 4, "dog": 8},
        "val": {"cat": 3, "dog": 2},
    }
    assert found.parts[0].bytes == sum(
        file.stat().st_size for file in (photos / "train").rglob("*.*")
    )
    assert found.formats == {"JPEG": 13, "PNG": 3, "GIF": 1}
    assert found.shorter_side == (20, 32, 64)
    assert found.longer_side == (40, 40, 200)

    copied, same = found.duplicates
    assert copied.across is True
    assert copied.labels_differ is False
    assert same.across is False
    assert same.labels_differ is True
    assert [file.rpartition("photos/")[2] for file in same.files] == [
        "train/cat/1.jpg",
        "train/dog/same.png",
    ]

    found.must_be_usable()


def test_every_unreadable_file_and_every_class_of_one_image_is_named(
    photos, tmp_path, monkeypatch
) -> None:
    (photos / "train" / "cat" / "2.jpg").write_bytes(b"text")
    (photos / "val" / "dog" / "1.jpg").write_bytes(jpeg(3)[:-200])
    found = check_data(photos)
    assert len(found.unreadable) == 2
    with pytest.raises(DataError) as caught:
        found.must_be_usable()
    for name in ("train/cat/2.jpg", "val/dog/1.jpg"):
        assert name in str(caught.value)
    with pytest.raises(DataError, match=r"one image.*: .*/a, .*/b"):
        check_data(write_classes(tmp_path / "single", ("a", "b"), 1)).must_be_usable()

    # Training leaves out a class of one image, and needs two others.
    one = write_classes(tmp_path / "one", ("a",), 1)
    with pytest.raises(DataError, match=r"one/a: only"):
        check_data(write_classes(one, ("b",), 2)).must_be_usable()
    check_data(write_classes(one, ("c",), 2)).must_be_usable()

    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match=r"70000000 pixels.*b/0\.jpg"):
        check_data(tmp_path / "single").must_be_usable()


def test_empty_and_mismatched_class_folders_are_listed_with_all_other_findings(photos) -> None:
    (photos / "train" / "cow").mkdir()
    (photos / "train" / "eel").mkdir()
    (photos / "train" / "eel" / "scan.tif").write_bytes(b"text")
    (photos / "val" / "fox").mkdir()
    (photos / "train" / "cat" / "2.jpg").write_bytes(b"text")
    found = CliRunner().invoke(app, ["train", "--dry-run", "--data", str(photos)])

    assert found.exit_code == 2
    for printed in (found.stdout, found.stderr):
        assert "train/eel: " in printed
        assert "(.tif 1)" in printed
    assert "train/cat/2.jpg: " in found.stderr
    assert "1 in both" in found.stdout
    assert check_data(photos).parts[0].classes == {"cat": 4, "dog": 8}


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("turns", range(4))
def test_copies_in_eight_orientations_are_found_and_other_scenes_are_not(
    turns: int, *, mirrored: bool
):
    scenes = [np.asarray(scene(seed).resize((120, 120))) for seed in range(20)]
    turned = np.rot90(scenes[7][:, ::-1] if mirrored else scenes[7], turns)
    copy = Image.open(io.BytesIO(encoded(Image.fromarray(turned).resize((72, 72)), 60)))
    darker = np.asarray(ImageEnhance.Brightness(copy).enhance(0.85).resize((120, 120)))
    small = np.stack(
        [shrink(Image.fromarray(np.ascontiguousarray(one))) for one in (*scenes, darker)]
    )

    assert find_turned(small).T.tolist() == [[7, 20]]


def test_plain_images_are_not_copies_of_each_other():
    plain = [np.full((32, 32, 3), level, np.uint8) for level in (0, 90, 91, 255)]
    scenes = [np.asarray(scene(seed).resize((32, 32))) for seed in range(6)]
    small = np.stack([shrink(Image.fromarray(one)) for one in (*plain, *scenes)])

    assert not find_turned(small).size
