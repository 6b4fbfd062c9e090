"""Groups of near-duplicates, their use in splits, and `sopdeploy data check`."""

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from huggingface_hub import constants
from PIL import Image, ImageEnhance, ImageOps
from typer.testing import CliRunner

from sopdeploy.errors import DataError
from sopdeploy.evaluation.metrics import Rate, effective_count
from sopdeploy.models.registry import create_model
from sopdeploy.photos.check import EDGES_MISS, check_data
from sopdeploy.photos.copies import (
    NO_PAIRS,
    Copies,
    NearDuplicates,
    _upper_bound,
    connect,
    find_pairs,
    find_turned,
    group_photographs,
    shrink,
)
from sopdeploy.photos.folder import list_classes, open_folder
from sopdeploy.photos.photo import ArrayImages, ImageFiles, Split, describe_seen, hash_images
from sopdeploy.photos.split import NONE, choose_held_out, divide, hold_out, record_choice, recorded_choice
from sopdeploy.photos.table import UNSPLIT, read_label_table
from sopdeploy.training.callback import Callback
from sopdeploy.training.distributed import Strategy
from sopdeploy.training.recipe import read_recipe
from sopdeploy.training.run_folder import RunFolder
from sopdeploy.training.start import divide_images, start_run
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
                other = ImageEnhance.Brightness(image.resize((100, 75))).enhance(0.9 - 0.1 * copy)
                (root / label / f"{number}-{copy}.jpg").write_bytes(encoded(other))
    return root


def true_groups(paths: np.ndarray) -> list[str]:
    """Name the scene of each path."""
    return [path.decode().split(".")[0].split("-")[0] for path in paths]


@pytest.mark.parametrize("copies", [0, 1, 2])
def test_copies_are_grouped_and_different_scenes_are_not(tmp_path: Path, copies: int):
    images = list_classes(write_scenes(tmp_path, copies=copies)).images
    groups = group_photographs(images).groups
    scenes = true_groups(images.paths)
    assert groups.tolist() == [list(dict.fromkeys(scenes)).index(one) for one in scenes]


def test_the_copies_that_measure_the_threshold_keep_85_or_70_percent_of_each_side_equally_often():
    keys = [f"image {number}" for number in range(80)]
    ramp = np.broadcast_to(np.arange(200, dtype=np.uint8), (80, 200, 200))
    copies = Copies.choose(ArrayImages(("a",), ramp, np.zeros(80, np.int64)), keys)
    pixels = [copies.photo(index).pixels.convert("L") for index in range(10)]
    spreads = [float(np.ptp(np.asarray(one, float))) for one in pixels]
    assert sorted(spread / 1.15 / 200 for spread in spreads) == pytest.approx(
        5 * [0.7] + 5 * [0.85], abs=0.02
    )


def test_an_added_image_changes_few_copies():
    ramp = np.random.default_rng(0).integers(0, 256, (89, 20, 20, 3), dtype=np.uint8)
    keys = [f"image {number}" for number in range(89)]
    before, after = (
        Copies.choose(ArrayImages(("a",), ramp[chosen], np.zeros(count, np.int64)), keys[chosen])
        for count, chosen in ((88, slice(1, None)), (89, slice(None)))
    )
    kept = {before.read(index) for index in range(10)} & {after.read(index) for index in range(10)}
    assert len(kept) >= 9


def test_vectors_that_do_not_tell_copies_from_other_images_group_nothing():
    random, classes = np.random.default_rng(0), np.arange(40) % 4
    vectors = np.eye(4, 16)[classes] + 0.01 * random.normal(size=(40, 16))
    originals = np.arange(8)
    copies = random.normal(size=(8, 16))
    pairs = find_pairs([vectors[:, None]], [copies], originals, classes, range(len(classes))).pairs
    assert (pairs[0] == pairs[1]).all()


def test_pairs_are_the_same_however_many_images_are_compared_at_once(monkeypatch: pytest.MonkeyPatch):
    random = np.random.default_rng(0)
    vectors = np.repeat(random.normal(size=(30, 3, 64)), 2, axis=0)  # three views
    found, classes = [], np.arange(60) % 4
    for cosines in (60 * 60, 60 * 7, 1):
        monkeypatch.setattr("sopdeploy.photos.copies._COSINES", cosines)
        found.append(find_pairs([vectors], [vectors[:8, 0]], np.arange(8), classes, range(60)).pairs.tolist())
    assert found[0] == found[1] == found[2]
    assert len(found[0][0]) >= 60


def test_a_few_copies_under_other_labels_do_not_raise_the_threshold():
    random, classes = np.random.default_rng(0), np.arange(60) % 4
    vectors = random.normal(size=(60, 64))
    vectors[1:25:8] = vectors[:24:8] + 0.05 * random.normal(size=(3, 64))  # 3 photographs in two classes
    originals = np.arange(30, 38)
    copies = vectors[originals] + 0.3 * random.normal(size=(8, 64))
    pairs = find_pairs([vectors[:, None]], [copies], originals, classes, range(len(classes))).pairs
    assert sorted(first for first, second in pairs.T.tolist() if second == first + 1) == [0, 8, 16]


@pytest.mark.parametrize(("scenes", "times"), [(3, 3), (3, 4), (2, 4), (12, 2)])
def test_copies_are_found_in_a_folder_with_one_class(scenes: int, times: int):
    random, count = np.random.default_rng(0), scenes * times
    vectors = np.repeat(random.normal(size=(scenes, 64)), times, axis=0)
    vectors += 0.05 * random.normal(size=vectors.shape)
    originals = np.arange(0, count, max(1, count // 8))
    copies = vectors[originals] + 0.3 * random.normal(size=(len(originals), 64))
    one_class = np.zeros(count, np.int64)
    pairs = find_pairs([vectors[:, None]], [copies], originals, one_class, range(count)).pairs
    assert connect(count, pairs).tolist() == [number // times for number in range(count)]


def test_identical_images_of_two_classes_do_not_raise_the_threshold():
    random, classes = np.random.default_rng(0), np.arange(60) % 2
    vectors = np.repeat(random.normal(size=(30, 64)), 2, axis=0)  # every image is in both classes
    vectors[1] += 0.05 * random.normal(size=64)  # but this one is a near-duplicate
    photographs = [0, 1, *np.repeat(np.arange(1, 30), 2) + 1]
    originals = np.arange(30, 38)
    copies = vectors[originals] + 0.3 * random.normal(size=(8, 64))
    pairs = find_pairs([vectors[:, None]], [copies], originals, classes, photographs).pairs
    expected = {(first, second) for first in range(60) for second in range(60) if first // 2 == second // 2}
    assert set(map(tuple, pairs.T.tolist())) == expected


# Clips of a class, frames of a clip, single photographs of the class, and what the clips of a class end with.
CLIPS = [(1, 30, 0, 0), (1, 4, 0, 0), (2, 12, 0, 0), (3, 10, 0, 0), (10, 4, 0, 0), (1, 15, 10, 0)]
CLIPS += [(2, 10, 5, 0), (0, 0, 30, 0), (2, 4, 0, 2)]


@pytest.mark.parametrize(("clips", "frames", "singles", "end"), CLIPS)
def test_the_frames_of_a_clip_are_a_group_however_many_pairs_of_a_class_they_are(
    clips: int, frames: int, singles: int, end: int
):
    random, vectors, classes, scenes = np.random.default_rng(0), [], [], []
    for one_class, center in enumerate(0.5 * random.normal(size=(3, 64))):
        last = end * random.normal(size=64) if end else 0
        for number in range(clips + singles):
            scene, drift = center + random.normal(size=64), 0.5 * random.normal(size=64) + last
            count = frames if number < clips else 1
            times = np.linspace(0, 1, count)[:, None]  # the camera moves
            vectors += [*(scene + times * drift + 0.1 * random.normal(size=(count, 64)))]
            classes += [one_class] * count
            scenes += [f"{one_class} {number}"] * count
    originals = np.arange(0, len(classes), max(1, len(classes) // 8))
    copies = np.asarray(vectors)[originals] + 0.4 * random.normal(size=(len(originals), 64))
    views = [np.asarray(vectors)[:, None]]
    found = find_pairs(views, [copies], originals, np.asarray(classes), range(len(classes)))
    groups = connect(len(classes), found.pairs)
    assert groups.tolist() == [list(dict.fromkeys(scenes)).index(scene) for scene in scenes]
    assert not found.alike.any()


def film(clips: int, frames: int, noise: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw *clips* of a standing camera in two classes: vectors, copies with *noise*, and their originals."""
    random = np.random.default_rng(0)
    vectors = np.repeat(random.normal(size=(2 * clips, 64)), frames, axis=0)
    vectors += 0.1 * random.normal(size=vectors.shape)
    originals = np.arange(0, len(vectors), len(vectors) // 8)
    return vectors, vectors[originals] + noise * random.normal(size=(len(originals), 64)), originals


def test_one_of_many_pairs_of_frames_does_not_join_clips_of_different_objects():
    clips, frames = 6, 10
    vectors, copies, originals = film(clips, frames, noise=1.5)
    vectors[5] += 0.7 * vectors[15]  # for a moment, a clip resembles another one of its class
    classes, numbers = np.arange(2 * clips * frames) // (clips * frames), range(2 * clips * frames)
    found = find_pairs([vectors[:, None]], [copies], originals, classes, numbers)
    assert connect(len(classes), found.pairs).tolist() == [number // frames for number in numbers]


def test_classes_of_one_clip_are_named_if_its_frames_could_be_different_objects():
    vectors, copies, originals = film(clips=1, frames=12, noise=0.4)
    classes = np.arange(24) // 12
    found = find_pairs([vectors[:, None]], [copies], originals, classes, range(24))
    assert connect(24, found.pairs).tolist() == [*range(24)]
    assert found.alike.all()


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
        for label, ending in (("cat", "png"), ("dog", "bmp" if case == "other bytes" else "png")):
            (tmp_path / label).mkdir(exist_ok=True)
            scene(number).save(tmp_path / label / f"{number}.{ending}")
    if case == BROKEN:
        (tmp_path / "cat" / "broken.png").write_bytes(b"no image")
    if case == "many images":
        monkeypatch.setattr("sopdeploy.photos.copies.MAX_SIGNATURES", 10)
    monkeypatch.setattr("sopdeploy.photos.copies.find_pairs", lambda *_: NO_DUPLICATES)
    images = list_classes(tmp_path).images
    choice = choose_held_out(images, group_photographs(images).groups, 0.3, 0)
    sides: dict[str, set[bool]] = {}
    for path, group in zip(images.paths, choice, strict=True):
        sides.setdefault(Path(path.decode()).stem, set()).add(bool(group != NONE))
    assert {len(side) for side in sides.values()} == {1}
    assert len(set(choice[choice != NONE].tolist())) == 9


def test_an_image_that_equals_a_corner_of_another_one_is_its_crop():
    random, classes = np.random.default_rng(0), np.arange(60) % 4
    views = random.normal(size=(60, 5, 64))
    views[24, 0] = views[3, 4] + 0.3 * random.normal(size=64)
    originals = np.arange(30, 38)
    copies = views[originals, 2] + 0.3 * random.normal(size=(8, 64))
    pairs = find_pairs([views], [copies], originals, classes, range(len(classes))).pairs
    assert [pair for pair in pairs.T.tolist() if pair[0] != pair[1]] == [[3, 24]]


def test_pairs_and_equal_keys_are_connected_and_groups_count_by_their_size():
    groups = connect(6, np.asarray([[0], [3]]), ["a", "b", "b", "c", "d", "e"], None, [1, 2, 3, 4, 4, 5])
    assert groups.tolist() == [0, 1, 1, 0, 0, 2]
    assert effective_count(groups) == pytest.approx(36 / 14)
    assert effective_count(np.arange(7)) == 7


def test_a_folder_per_object_and_the_column_group_are_never_divided(tmp_path: Path):
    for place, name in enumerate(("cat/tom", "cat/tim", "cat/tam", "dog/all")):
        (tmp_path / name).mkdir(parents=True)
        for number in range(4):
            scene(10 * place + number).save(tmp_path / name / f"{number}.png")
    images = list_classes(tmp_path).images
    assert len(set(images.groups.tolist())) == 3 + 4  # the only folder of a class is no group
    choice = choose_held_out(images, group_photographs(images).groups, 0.3, 0)
    held_out = divide(Split.undivided(images), choice).held_out
    assert len({path.split(b"/")[1] for path in held_out.paths if path.startswith(b"cat")}) == 1
    rows = [
        f"{path.decode()},{path.decode()[:3]},{'burst' * (number < 4)}"
        for number, path in enumerate(images.paths)
    ]
    (tmp_path / "labels.csv").write_text("\n".join(["file,classes,group", *rows]), encoding="utf-8")
    table = read_label_table(tmp_path)
    assert len(set(table.parts[UNSPLIT].groups.tolist())) == 1 + 12
    (tmp_path / "labels.csv").write_text("file,classes,burst\na.png,cat,1\n", encoding="utf-8")
    with pytest.raises(DataError, match="optionally split and group"):
        read_label_table(tmp_path)


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
            start_run(recipe, RunFolder(tmp_path / "run", Strategy(CPU)), None, warnings)
        assert not (tmp_path / "run").exists()
    else:  # it keeps the network of the few-shot procedure
        start_run(recipe, RunFolder(tmp_path / "run", Strategy(CPU)), None, warnings)
        assert any(line.startswith(problem) for line in warnings.lines)


def test_the_loop_holds_out_no_copies_of_training_images(tmp_path: Path):
    root = write_scenes(tmp_path, copies=1)
    recipe = read_recipe("photos-dsop", [f"data.path={root}"])
    before = open_folder(recipe.data.path)
    split = divide_images(recipe, before, None, Strategy(CPU)).data
    parts = [set(true_groups(part.paths)) for part in (split.train, split.held_out)]
    assert not parts[0] & parts[1]
    assert len(split.train) + len(split.held_out) == 48


def test_a_split_and_a_check_read_each_photograph_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root, reads, read = write_scenes(tmp_path, copies=1), list[int](), ImageFiles.read

    def count(images: ImageFiles, index: int) -> bytes:
        reads.append(index)
        return read(images, index)

    monkeypatch.setattr(ImageFiles, "read", count)
    recipe = read_recipe("photos-dsop", [f"data.path={root}"])
    for use in (
        lambda: divide_images(recipe, open_folder(root), None, Strategy(CPU)),
        lambda: group_photographs(list_classes(root).images),  # as `compare` does
        lambda: check_data(root, near=True),
    ):
        reads.clear()
        use()
        assert 48 <= len(reads) <= 48 + 8  # of eight, copies are made to measure how similar copies are


def test_train_lists_its_folder_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root, listed, scandir = write_classes(tmp_path / "photos", ("a", "b"), 4), [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: (listed.append(str(path)), scandir(path))[1])
    weights = tmp_path / "weights.pth"
    torch.manual_seed(0)
    network = create_model("efficientnet-lite0", num_classes=2)
    torch.save(network.state_dict(), weights)
    shown = CliRunner().invoke(
        app, ["train", "--data", str(root), "--weights", str(weights), "--out", str(tmp_path / "run")]
    )
    assert shown.exit_code == 0, shown.output
    assert [listed.count(str(root / name)) for name in "ab"] == [1, 1]


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


def test_data_check_names_copies_across_parts_and_classes(tmp_path: Path):
    write_scenes(tmp_path / "train", copies=1)
    write_scenes(tmp_path / "val", each=1)
    for label, number in (("cat", 5), ("dog", 5)):
        (tmp_path / "val" / label / "leak.jpg").write_bytes(encoded(scene(number)))
    found = check_data(tmp_path, near=True)
    assert check_data(tmp_path).near is None
    across = [group for group in found.near if group.across]
    assert any(group.labels_differ for group in across)
    leaked = next(group.files for group in across if any("leak" in file for file in group.files))
    assert {Path(file).name for file in leaked} == {"5.png", "5-0.jpg", "leak.jpg"}
    shown = CliRunner().invoke(app, ["data", "check", str(tmp_path), "--near"])
    assert "copies of one photograph" in shown.stdout
    listed = CliRunner().invoke(app, ["data", "check", str(tmp_path), "--near", "--json"])
    assert len(json.loads(listed.stdout)["near"]) == len(found.near)


@pytest.mark.parametrize(("is_sample", "count"), [(False, "2 of 3"), (True, "at least 2 of 3")])
def test_images_of_a_bundle_that_records_a_sample_are_at_least_so_many(is_sample: bool, count: str):
    images = ArrayImages(("a",), np.arange(12, dtype=np.uint8).reshape(3, 2, 2), np.zeros(3, np.int64))
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
    return [{Path(file).name for file in group["files"]} for group in report["near"]], report["notes"]


def test_data_check_compares_features_of_the_default_network_once_its_weights_are_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    root, cache = write_scenes(tmp_path / "photos"), tmp_path / "hub"
    ImageOps.mirror(scene(3)).save(root / "cat" / "mirror.png")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("sopdeploy.importers.published.PACKAGES", {})
    assert near_by_command(root) == ([], [EDGES_MISS])
    repository = cache / "models--timm--tf_efficientnet_lite0.in1k"
    weights = repository / "snapshots" / ("0" * 40) / "model.safetensors"
    for folder in (repository / "refs", weights.parent):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    torch.manual_seed(0)
    network = create_model("efficientnet-lite0", num_classes=1000)
    safetensors.torch.save_file(network.state_dict(), weights)

    def compare(views: list[np.ndarray], copies: list[np.ndarray], *_: np.ndarray) -> NearDuplicates:
        assert [view.shape[:2] for view in views] == [(25, 5)] * 2  # of two maps: whole, corners
        assert [len(part) for part in copies] == [8] * 2
        assert all(np.ptp(part, axis=0).max() > 0 for part in (*views, *copies))
        # Features of random weights do not show which images are copies.
        return NearDuplicates(np.asarray([[5], [12]]), np.zeros(25, np.bool_))

    monkeypatch.setattr("sopdeploy.training.few_shot.features.find_pairs", compare)
    assert near_by_command(root) == ([{"3.png", "mirror.png"}], [])
    monkeypatch.setattr("sopdeploy.photos.check.MAX_FEATURES", 24)
    assert near_by_command(root) == ([], [EDGES_MISS])


@pytest.fixture
def photos(tmp_path):
    """Write photos with a copy in val/, and duplicate pixels in another class."""
    root = write_photos(tmp_path / "photos")
    (root / "val" / "cat" / "copy.jpg").write_bytes((root / "train" / "cat" / "0.jpg").read_bytes())
    Image.open(root / "train" / "cat" / "1.jpg").save(root / "train" / "dog" / "same.png")
    Image.new("RGB", (200, 20)).save(root / "train" / "dog" / "thin.png")
    deep = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)
    Image.fromarray(deep).save(root / "train" / "dog" / "deep.png")
    frames = [Image.fromarray(np.full((40, 40), shade, dtype=np.uint8)) for shade in (9, 99)]
    frames[0].save(root / "train" / "dog" / "moving.gif", save_all=True, append_images=frames[1:])
    return root


def test_parts_formats_sizes_and_duplicates_are_reported(photos) -> None:
    found = check_data(photos)
    assert {part.name: part.classes for part in found.parts} == {
        "train": {"cat": 4, "dog": 8},
        "val": {"cat": 3, "dog": 2},
    }
    assert found.parts[0].bytes == sum(file.stat().st_size for file in (photos / "train").rglob("*.*"))
    assert found.formats == {"JPEG": 13, "PNG": 3, "GIF": 1}
    assert found.shorter_side == (20, 32, 64)
    assert found.longer_side == (40, 40, 200)
    copied, same = found.duplicates
    assert (copied.across, copied.labels_differ) == (True, False)
    assert (same.across, same.labels_differ) == (False, True)
    assert [file.rpartition("photos/")[2] for file in same.files] == ["train/cat/1.jpg", "train/dog/same.png"]
    found.must_be_usable()


def test_every_unreadable_file_and_every_class_of_one_image_is_named(photos, tmp_path, monkeypatch) -> None:
    (photos / "train" / "cat" / "2.jpg").write_bytes(b"text")
    (photos / "val" / "dog" / "1.jpg").write_bytes(jpeg(3)[:-200])
    found = check_data(photos)
    assert len(found.unreadable) == 2
    with pytest.raises(
        DataError, match=r"cat/2\.jpg: this is not an.*val/dog/1\.jpg: the image is truncated"
    ):
        found.must_be_usable()
    with pytest.raises(DataError, match=r"/a, .*/b: only one image; add another"):
        check_data(write_classes(tmp_path / "single", ("a", "b"), 1)).must_be_usable()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match=r"b/0\.jpg: the image has more than 70000000 pixels, the limit; "):
        check_data(tmp_path / "single").must_be_usable()


def test_empty_and_mismatched_class_folders_are_listed_with_all_other_findings(photos) -> None:
    (photos / "train" / "cow").mkdir()
    (photos / "train" / "eel").mkdir()
    (photos / "train" / "eel" / "notes.doc").write_bytes(b"text")
    (photos / "val" / "fox").mkdir()
    (photos / "train" / "cat" / "2.jpg").write_bytes(b"text")
    found = CliRunner().invoke(app, ["data", "check", str(photos)])
    assert found.exit_code == 2
    for finding in (
        "train/cow: no images in this class folder (also in eel); add some",
        "val: classes fox are not training classes, remove them or train on them",
        "val: training classes cow, eel are missing, add them",
        "val/fox: no images in this class folder; add some",
    ):
        assert finding in found.stdout
        assert finding in found.stderr
    assert "train/cat/2.jpg: this is not an image" in found.stderr
    assert "1 in both training and held-out data" in found.stdout
    assert check_data(photos).parts[0].classes == {"cat": 4, "cow": 0, "dog": 8, "eel": 0}


@pytest.mark.parametrize("copied", [0, 20, 60, 120])
def test_copies_are_found_however_many_have_other_labels(copied: int):
    random, classes = np.random.default_rng(0), np.arange(300) % 4
    vectors = random.normal(size=(300, 64))
    noise = 0.2 * random.normal(size=(copied + 1, 64))
    vectors[copied : 2 * copied] = np.roll(vectors[:copied], 1, axis=0) + noise[1:]  # with other labels
    vectors[-2] = vectors[-6] + noise[0]  # a copy within a class
    originals = np.arange(16)
    copies = vectors[originals] + 0.4 * random.normal(size=(16, 64))
    found = find_pairs([vectors[:, None]], [copies], originals, classes, range(300))
    groups = connect(300, found.pairs)
    assert groups[copied : 2 * copied].tolist() == np.roll(groups[:copied], 1).tolist()
    assert groups[-2] == groups[-6]
    assert len(set(groups.tolist())) == 300 - copied - 1


def test_photographs_of_classes_that_look_alike_are_not_named_as_copies_with_different_labels():
    random, classes = np.random.default_rng(0), np.arange(80) % 4
    vectors = random.normal(size=(80, 64))
    alike = np.arange(0, 40, 4)  # half of the first class resemble images of the next one
    vectors[alike + 1] = vectors[alike] + 0.9 * random.normal(size=(10, 64))
    vectors[2] = vectors[3] + 0.05 * random.normal(size=64)  # a copy with another label
    originals = np.arange(40, 56)
    copies = vectors[originals] + 0.4 * random.normal(size=(16, 64))
    certain = find_pairs([vectors[:, None]], [copies], originals, classes, range(80)).certain
    assert {(int(one), int(other)) for one, other in certain.T if one < other} == {(2, 3)}


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("turns", range(4))
def test_copies_in_eight_orientations_are_found_and_other_scenes_are_not(turns: int, *, mirrored: bool):
    scenes = [np.asarray(scene(seed).resize((120, 120))) for seed in range(20)]
    turned = np.rot90(scenes[7][:, ::-1] if mirrored else scenes[7], turns)
    copy = Image.open(io.BytesIO(encoded(Image.fromarray(turned).resize((72, 72)), 60)))
    darker = np.asarray(ImageEnhance.Brightness(copy).enhance(0.85).resize((120, 120)))
    small = np.stack([shrink(np.ascontiguousarray(one)) for one in (*scenes, darker)])
    assert find_turned(small).T.tolist() == [[7, 20]]


def test_plain_images_are_no_copies_of_each_other():
    plain = [np.full((32, 32, 3), level, np.uint8) for level in (0, 90, 91, 255)]
    scenes = [np.asarray(scene(seed).resize((32, 32))) for seed in range(6)]
    assert not find_turned(np.stack([shrink(one) for one in (*plain, *scenes)])).size


def test_a_bound_of_cosines_is_at_most_one():
    assert _upper_bound(np.asarray([0.1, 0.5, 0.9, 0.95, 0.99], np.float32)) == 1.0
