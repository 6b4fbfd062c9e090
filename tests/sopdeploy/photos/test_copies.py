"""Groups of near-duplicates, their use in splits, and `sopdeploy data check`."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from huggingface_hub import constants
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps
from typer.testing import CliRunner

from sopdeploy.errors import DataError
from sopdeploy.evaluation.metrics import Rate, effective_count
from sopdeploy.models.registry import create_model
from sopdeploy.photos.check import EDGES_MISS, check_data
from sopdeploy.photos.class_folders import list_classes
from sopdeploy.photos.copies import (
    BY_FEATURES,
    NO_PAIRS,
    NearDuplicates,
    Nearest,
    connect,
    find_near_duplicates,
    find_turned,
    group_photographs,
    shrink,
    signature,
)
from sopdeploy.photos.file_checks import describe_seen, hash_images
from sopdeploy.photos.folder import open_folder
from sopdeploy.photos.photo import ArrayImages, Split
from sopdeploy.photos.split import (
    NONE,
    choose_held_out,
    divide,
    hold_out,
    record_choice,
    recorded_choice,
)
from sopdeploy.photos.table import UNSPLIT, read_label_table
from sopdeploy.training.callback import Callback
from sopdeploy.training.distributed import Strategy
from sopdeploy.training.recipe import read_recipe
from sopdeploy.training.run_folder import RunFolder
from sopdeploy.training.setup import divide_images, set_up_run
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
        x, y = random.integers(0, 130), random.integers(0, 100)
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


@pytest.mark.slow
@pytest.mark.parametrize("copies", [0, 1, 2])
def test_copies_are_grouped_and_different_scenes_are_not(tmp_path: Path, copies: int):
    images = list_classes(write_scenes(tmp_path, copies=copies)).images
    groups = group_photographs(images).groups
    scenes = true_groups(images.paths)
    assert groups.tolist() == [list(dict.fromkeys(scenes)).index(one) for one in scenes]


def compare(images: list[Image.Image], classes: list[int]) -> NearDuplicates:
    """Find the near-duplicates among *images*, by their edges as vectors."""
    small = np.stack([shrink(image) for image in images])
    views = np.stack([signature(one) for one in small])[:, None]
    hashes = [image.tobytes().hex() for image in images]
    return find_near_duplicates([views], small, np.asarray(classes), hashes, Nearest(8))


def pairs_of(found: NearDuplicates) -> list[list[int]]:
    """List the pairs, each once and in ascending order, sorted."""
    return np.unique(np.sort(found.pairs, axis=0), axis=1).T.tolist()


def captioned(image: Image.Image) -> Image.Image:
    """Cover the lowest part of *image*."""
    covered = image.copy()
    covered.paste("white", (0, 102, 160, 120))
    return covered


CHANGES = {
    "encoded": lambda image: Image.open(io.BytesIO(encoded(image))),
    "darker": lambda image: ImageEnhance.Brightness(image).enhance(0.8),
    "cropped": lambda image: image.crop((8, 6, 144, 108)),
    "turned by 3 degrees": lambda image: image.rotate(3, Image.Resampling.BICUBIC).crop(
        (10, 10, 150, 110)
    ),
    "captioned": captioned,
    "mirrored": ImageOps.mirror,
    "turned by 15 degrees": lambda image: image.rotate(15, Image.Resampling.BICUBIC),
    "squashed": lambda image: image.crop((20, 0, 140, 120)).resize((160, 120)),
    "padded": lambda image: ImageOps.pad(image, (160, 160), color="black"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_photograph_is_found_in_either_class_and_others_are_not(change: str):
    images = [scene(number) for number in range(20)]
    copies = [CHANGES[change](images[number]) for number in (3, 8)]
    assert pairs_of(compare(images + copies, [0, 1] * 11)) == [[3, 20], [8, 21]]


@pytest.mark.slow
def test_all_copies_of_a_photograph_are_its_group():
    names = ("encoded", "darker", "turned by 3 degrees", "mirrored")
    changes = [CHANGES[name] for name in names]
    images = [scene(number) for number in range(12)]
    copies = [change(image).resize((160, 120)) for image in images for change in changes]
    groups = connect(60, compare(images + copies, [number % 2 for number in range(60)]).pairs)
    assert groups.tolist() == [*range(12), *np.repeat(np.arange(12), 4)]


def test_objects_before_one_background_are_not_grouped_and_their_class_is_named():
    scenes, objects = [scene(number) for number in range(12)], [scene(50) for _ in range(12)]
    for number, image in enumerate(objects):
        image.paste((250, 10, 10), (10 * number, 50, 10 * number + 14, 64))
    found = compare(scenes + objects, [0] * 12 + [1] * 12)
    assert not found.pairs.size
    assert found.alike.tolist() == [False] * 12 + [True] * 12


def test_where_images_look_alike_only_nearly_equal_ones_are_copies():
    images = [scene(50) for _ in range(12)]
    for number, image in enumerate(images):  # two fifths of each image are its own
        image.paste(scene(number).resize((88, 87)), (36, 16))
    copies = [
        ImageEnhance.Brightness(images[0]).enhance(0.9),
        captioned(captioned(images[1]).rotate(180)),
    ]
    found = compare(images + copies, [0] * 14)
    assert pairs_of(found) == [[0, 12]]
    assert found.alike.all()


def test_three_photographs_before_one_background_do_not_make_their_class_look_alike():
    alike = [scene(50) for _ in range(3)]
    for number, image in enumerate(alike):  # a bit less than half of each image is its own
        image.paste(scene(number).resize((100, 96)), (30, 12))
    others = [scene(number) for number in range(20, 47)]
    versions = [version for image in alike for version in (image, CHANGES["darker"](image))]
    found = compare(others + versions, [0] * 20 + [1] * 13)
    assert pairs_of(found) == [[27, 28], [29, 30], [31, 32]]
    assert not found.alike.any()


def test_copies_that_are_not_confirmed_do_not_make_a_class_look_alike():
    versions = []
    for number in range(12):
        image = scene(number)
        versions += [image, CHANGES["darker"](image)]
        if number < 6:  # a quarter of this version is new
            image = image.copy()
            image.paste(scene(50 + number).resize((64, 68)), (48, 26))
            versions.append(image)
    assert not compare(versions, [0] * len(versions)).alike.any()


@pytest.mark.parametrize("count", [1, 2])
def test_a_folder_of_one_or_two_images_has_no_near_duplicates(count: int):
    assert not compare([scene(number) for number in range(count)], [0] * count).pairs.size


def test_an_image_that_resembles_a_corner_of_another_one_is_its_candidate():
    random = np.random.default_rng(0)
    views = random.normal(size=(60, 5, 64))
    views[24, 0] = views[3, 4] + 0.3 * random.normal(size=64)
    small = np.stack([shrink(scene(number)) for number in range(60)])
    small[24] = shrink(scene(3).crop((60, 45, 160, 120)))
    nearest = BY_FEATURES._replace(num_others=1)
    found = find_near_duplicates(
        [views], small, np.arange(60) % 4, list(map(str, range(60))), nearest
    )
    assert pairs_of(found) == [[3, 24]]


def test_pixels_are_compared_of_near_vectors_and_if_asked_for_of_two_parts_only(
    monkeypatch: pytest.MonkeyPatch,
):
    random = np.random.default_rng(0)
    views = random.normal(size=(24, 1, 64))
    views[[8, 20]] = views[3] + 0.3 * random.normal(size=(2, 1, 64))
    small = np.stack([shrink(scene(number)) for number in range(24)])
    compared = []

    def compare_none(_small: NDArray[np.uint8], pairs: NDArray[np.intp]) -> NDArray[np.float32]:
        compared.append({*map(tuple, pairs.T.tolist())})
        return np.zeros(pairs.shape[1], np.float32)

    monkeypatch.setattr("sopdeploy.photos.copies.compare_new", compare_none)
    arguments = ([views], small, np.arange(24) % 2, list(map(str, range(24))))
    find_near_duplicates(*arguments)
    find_near_duplicates(*arguments, parts=np.repeat([0, 1], 12))
    find_near_duplicates(*arguments, nearest=Nearest(8))
    of_copies = {(3, 8), (3, 20), (8, 20)}
    assert compared[0] >= of_copies
    assert len(compared[0]) < len(compared[2]) / 2
    assert compared[1] == {(one, other) for one, other in compared[0] if one < 12 <= other}


@pytest.mark.parametrize("choice", [[NONE, 0, NONE, 3, 0], [NONE] * 5])
def test_a_recorded_choice_is_found_again_in_another_order(choice: list[int]):
    hashes = np.asarray([5, -7, 9, 2, -7], np.int64)
    record = record_choice(np.asarray(choice, np.int64), hashes)
    assert recorded_choice(record, hashes[::-1]).tolist() == choice[::-1]
    assert recorded_choice(record, np.asarray([1, 99], np.int64)).tolist() == [NONE, NONE]


BROKEN = "an image that cannot be read"
NO_DUPLICATES = NearDuplicates(NO_PAIRS, np.zeros(0, np.bool_))


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
        monkeypatch.setattr("sopdeploy.photos.copies.MAX_SIGNATURES", 10)
    monkeypatch.setattr(
        "sopdeploy.photos.copies.find_near_duplicates", lambda *_: NO_DUPLICATES
    )
    images = list_classes(tmp_path).images
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
    images = list_classes(tmp_path).images
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
    targets, patients = np.repeat([0, 1], [10, 2]), np.asarray([*range(10), 8, 9])
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
    root, warnings = write_groups(tmp_path / "photos", cat="aaaa", dog="aabb"), Warnings()
    recipe = read_recipe("photos-dsop", [f"data.path={root}", *TINY])
    split = divide_images(recipe, open_folder(recipe.data.path), None, Strategy(CPU)).data
    assert split.held_out.class_counts().tolist() == [0, 2]
    found = train_recipe(recipe, tmp_path / "run", callback=warnings).procedure.top1
    assert any(line.startswith("cat: all images are one group") for line in warnings.lines)
    assert found == Rate.of(found.right, 2, 1)  # both images are one group


@pytest.mark.parametrize("kind", ["loop", "fine_tune"])
def test_the_loop_does_not_start_if_every_class_is_one_group(tmp_path: Path, kind: str):
    root, warnings = write_groups(tmp_path / "photos", cat="aaaa", dog="aaaa"), Warnings()
    recipe = read_recipe("photos-dsop", [f"data.path={root}", *TINY, f"procedure.kind={kind}"])
    problem = "cat, dog: all images are one group"
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
    recipe = read_recipe("photos-dsop", [f"data.path={tmp_path}", *TINY])
    result = train_recipe(recipe, tmp_path / "run")
    assert result.held_out_count == 120
    assert result.decision.calibration.num_images == 60


@pytest.mark.slow
def test_data_check_names_copies_across_parts_and_classes(tmp_path: Path):
    write_scenes(tmp_path / "train", each=6, copies=1)
    write_scenes(tmp_path / "val", each=1)
    for label, number in (("cat", 5), ("dog", 5)):
        (tmp_path / "val" / label / "leak.jpg").write_bytes(encoded(scene(number)))
    found = check_data(tmp_path, near=True)
    assert check_data(tmp_path).near is None
    across = [group for group in found.near if group.across]
    assert any(group.labels_differ for group in across)
    leaked = next(
        group.files for group in across if any("leak" in file for file in group.files)
    )
    assert {Path(file).name for file in leaked} == {"5.png", "5-0.jpg", "leak.jpg"}
    shown = CliRunner().invoke(app, ["data", "check", str(tmp_path), "--near"])
    assert "with at least 60 % of equal parts" in shown.stdout
    listed = CliRunner().invoke(app, ["data", "check", str(tmp_path), "--near", "--json"])
    assert len(json.loads(listed.stdout)["near"]) == len(found.near)


@pytest.mark.parametrize(("is_sample", "count"), [(False, "2 of 3"), (True, "at least 2 of 3")])
def test_images_of_a_bundle_that_records_a_sample_are_at_least_so_many(
    is_sample: bool, count: str
):
    images = ArrayImages(
        ("a",), np.arange(12, dtype=np.uint8).reshape(3, 2, 2), np.zeros(3, np.int64)
    )
    found = describe_seen(images, hash_images(images)[:2], is_sample=is_sample)
    assert found.startswith(f"{count} images are training images of this network")


def test_copies_in_two_held_out_parts_are_not_in_the_training_data(tmp_path: Path):
    for part in ("train", "val", "test"):
        for number, label in enumerate(("cat", "dog")):
            (tmp_path / part / label).mkdir(parents=True)
            shade = (60 if part == "train" else 0) + 20 * number
            Image.new("L", (9, 9), shade).save(tmp_path / part / label / "1.png")
    found = check_data(tmp_path).duplicates
    assert [(len(group.files), group.across) for group in found] == [(2, False)] * 2


def near_by_command(root: Path) -> tuple[list[set[str]], list[str]]:
    """Run `data check --near` on *root*; return the names of the files of each group, and the notes."""
    shown = CliRunner().invoke(app, ["data", "check", str(root), "--near", "--json"])
    report = json.loads(shown.stdout)
    return [{Path(file).name for file in group["files"]} for group in report["near"]], report[
        "notes"
    ]


@pytest.mark.slow
def test_data_check_compares_features_of_the_default_network_once_its_weights_are_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    root, cache = write_scenes(tmp_path / "photos"), tmp_path / "hub"
    ImageOps.mirror(scene(3)).save(root / "cat" / "mirror.png")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("sopdeploy.importers.published.PACKAGES", {})
    assert near_by_command(root) == ([{"3.png", "mirror.png"}], [EDGES_MISS])
    repository = cache / "models--timm--tf_efficientnet_lite0.in1k"
    weights = repository / "snapshots" / ("0" * 40) / "model.safetensors"
    for folder in (repository / "refs", weights.parent):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    torch.manual_seed(0)
    network = create_model("efficientnet-lite0", num_classes=1000)
    safetensors.torch.save_file(network.state_dict(), weights)

    def compare_features(views: list[np.ndarray], *_: np.ndarray) -> NearDuplicates:
        assert [view.shape[:2] for view in views] == [
            (25, 5)
        ] * 2  # of two maps: whole, corners
        assert all(np.ptp(part, axis=0).max() > 0 for part in views)
        # Features of random weights do not show which images are similar.
        return NearDuplicates(np.asarray([[0], [1]]), np.zeros(25, np.bool_))

    monkeypatch.setattr(
        "sopdeploy.training.few_shot.default_network.find_near_duplicates", compare_features
    )
    assert near_by_command(root) == ([{"0.png", "1.png"}], [])
    monkeypatch.setattr("sopdeploy.photos.check.MAX_FEATURES", 24)
    assert near_by_command(root) == ([{"3.png", "mirror.png"}], [EDGES_MISS])


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
    assert (copied.across, copied.labels_differ) == (True, False)
    assert (same.across, same.labels_differ) == (False, True)
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
    with pytest.raises(
        DataError, match=r"cat/2\.jpg: this is not an.*val/dog/1\.jpg: the image is truncated"
    ):
        found.must_be_usable()
    with pytest.raises(DataError, match=r"only one image; add another: .*/a, .*/b"):
        check_data(write_classes(tmp_path / "single", ("a", "b"), 1)).must_be_usable()

    # Training leaves out a class of one image, and needs two others.
    one = write_classes(tmp_path / "one", ("a",), 1)
    with pytest.raises(DataError, match=r"one/a: only one image; add another"):
        check_data(write_classes(one, ("b",), 2)).must_be_usable()
    check_data(write_classes(one, ("c",), 2)).must_be_usable()

    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(
        DataError, match=r"the image has more than 70000000 pixels, the limit; .*b/0\.jpg"
    ):
        check_data(tmp_path / "single").must_be_usable()


def test_empty_and_mismatched_class_folders_are_listed_with_all_other_findings(photos) -> None:
    (photos / "train" / "cow").mkdir()
    (photos / "train" / "eel").mkdir()
    (photos / "train" / "eel" / "scan.tif").write_bytes(b"text")
    (photos / "val" / "fox").mkdir()
    (photos / "train" / "cat" / "2.jpg").write_bytes(b"text")
    found = CliRunner().invoke(app, ["data", "check", str(photos)])
    assert found.exit_code == 2
    for finding in (
        "train/cow: no images in this class folder (also in eel); remove the folder, or convert them",
        "val: classes fox are not training classes, remove them or train on them",
        "val: training classes cow, eel are missing, add them",
        "val/fox: no images in this class folder; add some",
    ):
        assert finding in found.stdout
        assert finding in found.stderr
    assert "train/cat/2.jpg: this is not an image" in found.stderr
    assert "1 in both training and validation data" in found.stdout
    assert check_data(photos).parts[0].classes == {"cat": 4, "cow": 0, "dog": 8, "eel": 0}


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
    assert find_turned(small).pairs.T.tolist() == [[7, 20]]
