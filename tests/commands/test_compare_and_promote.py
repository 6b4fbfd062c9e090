"""Comparing two bundles on labelled images, and moving the link to the better one."""

import errno
import json
import os
import shutil
import threading
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.stats import binom

from sopdeploy.base.files import sha256
from sopdeploy.base.project import Origin, utc_now
from sopdeploy.bundle.decision import Decision, Rejection
from sopdeploy.bundle.folder import read_manifest
from sopdeploy.bundle.live import LOG
from sopdeploy.bundle.manifest import FileRecord
from sopdeploy.data.photos.any_images import open_any_images
from sopdeploy.data.photos.file_checks import hash_images
from sopdeploy.errors import (
    ConfigError,
    DataError,
    PromotionError,
    SopdeployError,
    StorageError,
)
from sopdeploy.evaluation.statistics import (
    Z_90,
    bound_difference,
    mcnemar,
    passing_gain,
    score_statistic,
)
from sopdeploy.images.preprocess import Preprocess
from sopdeploy_commands.compare import compare, narrow_tolerance
from sopdeploy_commands.predict import predict
from sopdeploy_commands.promote import promote
from sopdeploy_commands.scores import scores_of_bundle
from sopdeploy_service.inference.loader import LoadedModel, load_model
from sopdeploy_service.settings import Settings
from tests.support.forged import graph, write_computed
from tests.support.service import LABELS, write_bundle

PROMOTE = "sopdeploy_commands.promote"


def photograph(number: int) -> Image.Image:
    """A photograph of a colour of its own with edges of its own."""
    rng = np.random.default_rng(number)
    cells = np.kron(rng.random((5, 6)), np.ones((10, 10)))[..., None]
    return Image.fromarray((cells * 255 * rng.permutation([1.0, 0.6, 0.0])).astype(np.uint8))


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOPDEPLOY_THREADS", "1")


@pytest.fixture(scope="module")
def bundles(tmp_path_factory) -> tuple[Path, Path]:
    """Two bundles of different networks with the same classes."""
    folder = tmp_path_factory.mktemp("bundles")
    rule = Decision(rejection=Rejection(threshold=0.5))
    return write_bundle(folder, seed=0), write_bundle(folder, seed=1, decision=rule)


@pytest.fixture(scope="module")
def labelled(bundles, tmp_path_factory):
    """`labelled(by, count, first)` sorts photographs into the classes that the bundle *by* gives them."""

    def make(by: Path, count: int = 40, first: int = 0) -> Path:
        folder = tmp_path_factory.mktemp("photos")
        numbers = range(first, first + count)
        predictions = predict(by, [photograph(number) for number in numbers], threads=1)
        for number, prediction in zip(numbers, predictions, strict=True):
            path = folder / prediction.classes[0].label / f"{number}.png"
            path.parent.mkdir(exist_ok=True)
            photograph(number).save(path)
        return folder

    return make


def with_manifest(bundle: Path, destination: Path, **changes) -> Path:
    """Copy *bundle*, with other fields in its manifest."""
    shutil.copytree(bundle, destination)
    manifest = read_manifest(bundle).model_copy(update=changes)
    (destination / "manifest.json").write_bytes(manifest.to_bytes())
    return destination


def trained_on(bundle: Path, destination: Path, photos: Path) -> Path:
    """Copy *bundle*, as if it had been trained on *photos*."""
    hashes = tuple(np.unique(hash_images(open_any_images(photos))).tolist())
    names = {"run": "r", "run_id": "0", "data": "d"}
    counts = {"num_images": len(hashes), "num_classes": 7}
    origin = Origin(started=utc_now(), sample=hashes, **names, **counts)
    return with_manifest(bundle, destination, origin=origin)


def file_hash(path: Path) -> int:
    """The hash of the image at *path*, as records have it."""
    images = open_any_images(path.parent)
    names = [images.path(index).name for index in range(len(images))]
    return int(hash_images(images)[names.index(path.name)])


def test_the_figures_are_those_of_the_predictions(bundles, labelled) -> None:
    first, second = bundles
    photos = labelled(second)
    done: list[tuple[int, int]] = []
    found = compare(first, second, photos, on_image=lambda *counts: done.append(counts))
    paths = sorted(photos.rglob("*.png"))
    answers = [one.classes[0].label for one in predict(first, paths, threads=1)]
    right = sum(one == path.parent.name for one, path in zip(answers, paths, strict=True))

    assert found.num_images == 40
    assert found.first.top1.right == right
    assert found.second.top1.right == 40
    assert found.wins == 40 - right
    assert found.losses == 0
    assert found.difference == (40 - right) / 40
    assert found.low == bound_difference(40 - right, 0, 40, -1.0, Z_90)
    assert found.low < found.difference <= found.high
    assert found.p == mcnemar(40 - right, 0)
    assert found.passes
    assert sum(one.num_images for one in found.classes) == 40
    assert sum(one.first for one in found.classes) == right
    assert all(one.second == one.num_images for one in found.classes)
    assert 0 < found.first.seconds < 1
    assert done[-1] == (80, 80)

    back = compare(second, first, photos)
    assert back.wins == 0
    assert back.difference == -found.difference
    assert back.passes is False


# photographs, wins, losses: whether a loss of more than the tolerance is unlikely
BOUNDS = {
    (30, 0, 0): False,  # too few to show that 5 points are not lost
    (60, 0, 0): True,
    (100, 5, 5): False,
    (100, 6, 3): True,
    (1_000, 50, 50): True,
    (1_000, 40, 60): False,
    (1_000, 30, 40): True,
}


@pytest.mark.parametrize("counts", BOUNDS)
def test_a_bundle_passes_if_the_tolerance_is_hardly_lost(counts: tuple[int, int, int]) -> None:
    images, wins, losses = counts
    low = bound_difference(wins, losses, images, -1.0, Z_90)

    assert (low >= -narrow_tolerance(5.0, images) / 100) is BOUNDS[counts]


def test_the_tolerance_narrows_from_100_photographs_on() -> None:
    found = [narrow_tolerance(5.0, images) for images in (1, 100, 1_000, 10_000)]
    assert found == pytest.approx([5.0, 5.0, 2.5, 1.25])


@pytest.mark.slow
def test_copies_of_photographs_count_once(bundles, labelled) -> None:
    """A user who copies what the second bundle gets right would otherwise prove anything."""
    first, second = bundles
    photos = labelled(second, count=24)
    before = compare(first, second, photos)
    for path in sorted(photos.rglob("*.png"))[::2]:
        image = Image.open(path)
        for number, quality in enumerate((60, 80, 95)):
            image.resize((54, 45)).save(
                path.with_name(f"{path.stem}-{number}.jpg"), quality=quality
            )
    after = compare(first, second, photos)

    assert (before.num_copies, after.num_copies) == (0, 36)
    assert after.num_images == before.num_images
    assert after.wins == before.wins
    assert after.losses == before.losses
    assert after.low == before.low
    assert after.high == before.high
    assert after.p == before.p


# The features are the sums of both halves of an image, which do not change if they change places.
WITH_FEATURES = """
halves (uint8[n, 32, 32, 3] images) => (float[n, 7] logits, float[n, 1536] embedding)
<float[1536, 7] weights, int64[2] flat = {0, 1536}>
{
    wide = Cast <to = 1> (images)
    left, right = Split <axis = 2, num_outputs = 2> (wide)
    sums = Add (left, right)
    embedding = Reshape (sums, flat)
    logits = MatMul (embedding, weights)
}
"""


@pytest.mark.parametrize("newer", [False, True])
def test_edited_copies_count_once_if_a_bundle_has_features(
    bundles, labelled, tmp_path, newer: bool
) -> None:
    rng = np.random.default_rng(2)
    with_features = write_computed(
        tmp_path / "with-features",
        graph(WITH_FEATURES, weights=rng.normal(size=(1536, 7)).astype(np.float32) / 6400),
        rng.integers(0, 256, (2, 32, 32, 3), dtype=np.uint8),
        1e-2,
        preprocess=Preprocess(resize=32, crop=32),
        labels=LABELS,
    )
    photos = labelled(bundles[1], count=24)
    for path in sorted(photos.rglob("*.png"))[::2]:
        with Image.open(path) as image:
            pixels = np.asarray(image.crop((5, 0, 55, 50)))
        Image.fromarray(np.roll(pixels, 25, axis=1)).save(path.with_name(f"{path.stem}-2.png"))

    others = (bundles[0], bundles[1])
    pair = (bundles[0], with_features) if newer else (with_features, bundles[1])
    assert (compare(*others, photos).num_copies, compare(*pair, photos).num_copies) == (0, 12)


def test_photographs_of_the_training_and_their_copies_are_left_out(
    bundles, labelled, tmp_path, monkeypatch
) -> None:
    first, second = bundles
    photos = labelled(second, count=30)
    seen = tmp_path / "seen"
    shutil.copytree(photos, seen)
    for path in sorted(seen.rglob("*.png"))[12:]:
        path.unlink()
    trained = trained_on(second, tmp_path / "trained", seen)
    (one, *_) = sorted(seen.rglob("*.png"))
    Image.open(one).save((photos / one.relative_to(seen)).with_name("copy.jpg"), quality=70)
    found = compare(first, trained, photos)

    assert found.num_trained_on == 13
    assert found.num_images == 18
    assert found.num_copies == 0

    # So the record may be incomplete
    monkeypatch.setattr("sopdeploy_commands.compare.MAX_RECORDED", 12)
    assert len(compare(first, trained, photos).notes) == len(found.notes) + 1
    with pytest.raises(DataError):
        compare(first, trained, seen)


def keep_photographs(photos: Path) -> list[Path]:
    """Name six of *photos* as a server does: four of its sample, two of them with even digits 9 to 16."""
    names = [f"{number:08x}{number % 4:08x}{number:016x}" for number in range(6)]
    kept = []
    for number, (name, path) in enumerate(
        zip(names, sorted(photos.rglob("*.png")), strict=False)
    ):
        suffix = "-sample" if number < 4 else ""
        kept.append(path.rename(path.with_name(f"{name}{suffix}.png")))
    return kept


def test_of_kept_photographs_the_random_sample_counts(bundles, labelled, tmp_path) -> None:
    first, second = bundles
    photos = labelled(second, count=8)
    sample = keep_photographs(photos)[:4]
    found = compare(first, second, photos)
    assert (found.num_images, found.num_for_training, found.num_out_of_fold) == (6, 2, 0)

    # A bundle that was trained on all photos, with and without the answers of its cross-validation: the right
    # class, another one, and none because its classifiers did not know the class.
    trained = trained_on(second, tmp_path / "trained", photos)
    with pytest.raises(DataError):
        compare(first, trained, photos)
    origin = read_manifest(trained).origin
    labels = read_labels(second)
    hashes = {path: file_hash(path) for path in sample}
    right = [labels.index(path.parent.name) for path in sample]
    answers = [right[0], right[1], (right[2] + 1) % len(labels), -1]
    pairs = tuple(zip(hashes.values(), answers, strict=True))
    answering = with_manifest(
        second,
        tmp_path / "answering",
        origin=origin.model_copy(update={"out_of_fold": pairs}),
    )
    found = compare(second, answering, photos)

    assert (found.num_images, found.num_out_of_fold) == (3, 3)
    assert (found.first.top1.right, found.second.top1.right) == (3, 2)
    assert (found.num_trained_on, found.num_for_training) == (5, 0)


def test_of_a_partial_record_only_what_no_training_uses_counts(
    bundles, labelled, tmp_path, monkeypatch
) -> None:
    first, second = bundles
    photos = labelled(second, count=8)
    sample = keep_photographs(photos)[:4]
    trained = trained_on(second, tmp_path / "trained", photos)
    (recorded,) = {file_hash(sample[1])}  # its digits are odd
    origin = read_manifest(trained).origin.model_copy(update={"sample": (recorded,)})
    partial = with_manifest(second, tmp_path / "partial", origin=origin)
    monkeypatch.setattr("sopdeploy_commands.compare.MAX_RECORDED", 1)

    assert compare(first, partial, photos).num_images == 2 + 2


@pytest.mark.parametrize("images", [39, 120, 1000])
def test_a_gain_passes_in_8_of_10_cases(images: int) -> None:
    """By the binomial distributions of what changes, and of what is a win."""
    changed = 0.2
    tolerance = narrow_tolerance(5.0, images) / 100
    gain = passing_gain(changed, images, tolerance)
    is_win = (1 + gain / changed) / 2
    passing = 0.0
    for wins_and_losses in range(images + 1):
        share = binom.pmf(wins_and_losses, images, changed)
        if share < 1e-6:
            continue
        for wins in range(wins_and_losses + 1):
            losses = wins_and_losses - wins
            if score_statistic(wins, losses, images, -tolerance) >= Z_90:
                passing += share * binom.pmf(wins, wins_and_losses, is_win)

    assert 0.74 < passing < 0.86


def relabelled(bundle: Path, destination: Path, old: str, new: str) -> Path:
    """Copy *bundle* with another name of a class."""
    shutil.copytree(bundle, destination)
    path = destination / "labels.json"
    path.write_text(path.read_text().replace(f'"{old}"', f'"{new}"'))
    manifest = read_manifest(bundle)
    files = {
        **manifest.files,
        path.name: FileRecord(bytes=path.stat().st_size, sha256=sha256(path)),
    }
    (destination / "manifest.json").write_bytes(
        manifest.model_copy(update={"files": files}).to_bytes()
    )
    return destination


def test_a_class_that_only_the_second_bundle_has_counts(bundles, labelled, tmp_path) -> None:
    """The first one is wrong on it. Folders that are a class of neither are left out."""
    first, second = bundles
    photos = labelled(second)
    classes = {path.name: len(list(path.iterdir())) for path in photos.iterdir()}
    name = min(classes, key=classes.__getitem__)
    newer = relabelled(second, tmp_path / "newer", name, "yak")
    (photos / name).rename(photos / "yak")
    (photos / "cow").mkdir()
    photograph(0).save(photos / "cow" / "0.png")
    found = compare(first, newer, photos)

    assert found.num_images == 40
    assert found.removed == (name,)

    of_yak = [one for one in found.classes if one.label == "yak"]
    assert [(one.num_images, one.first, one.second) for one in of_yak] == [
        (classes[name], 0, classes[name])
    ]


def read_labels(bundle: Path) -> list[str]:
    return list(json.loads((bundle / "labels.json").read_text()))


@pytest.fixture
def shelf(bundles, tmp_path) -> Path:
    """A folder with both bundles and the link `live` to the first."""
    for bundle in bundles:
        shutil.copytree(bundle, tmp_path / "shelf" / bundle.name)
    promote(tmp_path / "shelf" / bundles[0].name, tmp_path / "shelf" / "live")
    return tmp_path / "shelf"


def log_of(shelf: Path) -> list[dict]:
    return [json.loads(line) for line in (shelf / LOG).read_text().splitlines()]


def test_a_better_bundle_is_promoted_and_taken_back(bundles, labelled, shelf) -> None:
    first, second = (bundle.name for bundle in bundles)
    move = promote(shelf / second, shelf / "live", labelled(bundles[1]))
    assert (shelf / "live").readlink().name == second
    assert move.before == first
    assert move.after == second

    created, moved = log_of(shelf)
    assert created["reason"] == "first bundle"
    assert created["before"] is None
    assert moved["reason"] == move.comparison.summary
    assert moved["refused"] is False
    assert moved["comparison"]["first"]["bundle"] == first
    assert moved["user"]
    assert promote(back=shelf / "live").after == first
    assert promote(back=shelf / "live").after == second
    assert [line["after"] for line in log_of(shelf)] == [first, second, first, second]


def test_without_images_nothing_is_compared(bundles, shelf) -> None:
    move = promote(shelf / bundles[1].name, shelf / "live")
    assert move.comparison is None
    assert (shelf / "live").readlink().name == bundles[1].name


def test_what_may_lose_too_much_is_refused_unless_forced(bundles, labelled, shelf) -> None:
    first, second = (bundle.name for bundle in bundles)
    for photos in (labelled(bundles[0]), labelled(bundles[1], count=3)):  # worse; too few
        with pytest.raises(PromotionError):
            promote(shelf / second, shelf / "live", photos)
        assert (shelf / "live").readlink().name == first
    assert [line["refused"] for line in log_of(shelf)] == [False, True, True]
    with pytest.raises(PromotionError):  # a refused bundle was not live
        promote(back=shelf / "live")

    move = promote(shelf / second, shelf / "live", labelled(bundles[0]), force="a camera")
    assert move.reason == "a camera"
    assert move.comparison.passes is False
    assert (shelf / "live").readlink().name == second


def test_a_missing_class_and_another_name_are_refused(bundles, shelf, tmp_path) -> None:
    """Also without images."""
    name = read_labels(bundles[1])[0]
    narrower = relabelled(bundles[1], shelf / "narrower", name, "yak")
    renamed = with_manifest(bundles[1], shelf / "renamed", project="other")

    for bundle in (narrower, renamed):
        with pytest.raises(PromotionError):
            promote(bundle, shelf / "live")
        assert log_of(shelf)[-1]["refused"]
        assert (shelf / "live").readlink().name == bundles[0].name
        assert promote(bundle, shelf / "live", force="x").after == bundle.name
        promote(back=shelf / "live")


def test_a_damaged_bundle_never_becomes_live(bundles, shelf) -> None:
    second = shelf / bundles[1].name
    (second / "model.onnx").write_bytes(b"damaged")
    for force in (None, "urgent"):
        with pytest.raises(SopdeployError, match=r"model\.onnx"):
            promote(second, shelf / ("live" if force else "new"), None, force=force)

    assert (shelf / "live").readlink().name == bundles[0].name
    assert not (shelf / "new").is_symlink()


def test_arguments_that_do_not_fit_change_nothing(bundles, shelf) -> None:
    first, second, live = (*(shelf / bundle.name for bundle in bundles), shelf / "live")
    cases: list[dict[str, Any]] = [
        {"back": live, "force": "not recorded"},
        {"new": second},
        {"new": second, "over": first},  # not a link
        {"new": live, "over": live},
        {"new": second, "over": live, "force": "\udcff"},
    ]
    for arguments in cases:
        with pytest.raises(ConfigError):
            promote(**arguments)

    assert (len(log_of(shelf)), live.readlink().name) == (1, first.name)
    assert promote(second, live, force="x" * 10_001).reason == "x" * 10_000


def replace_bundle(shelf: Path, bundles: tuple[Path, Path]) -> None:
    shutil.rmtree(shelf / bundles[1].name)
    with_manifest(bundles[1], shelf / bundles[1].name, project="other")


def move_link_away(shelf: Path, _bundles: tuple[Path, Path]) -> None:
    (shelf / "live").unlink()
    (shelf / "live").symlink_to("elsewhere")


@pytest.mark.parametrize("change", [replace_bundle, move_link_away])
def test_what_was_checked_and_then_changed_is_not_moved(
    bundles, shelf, monkeypatch, change
) -> None:
    def load_and_change(path: Path, settings: Settings) -> LoadedModel:
        loaded = load_model(path, settings)
        if path.name == "live":  # loaded last
            change(shelf, bundles)
        return loaded

    monkeypatch.setattr(f"{PROMOTE}.load_model", load_and_change)
    with pytest.raises(ConfigError):
        promote(shelf / bundles[1].name, shelf / "live")
    assert len(log_of(shelf)) == 1
    assert (shelf / "live").readlink().name != bundles[1].name


class FullDisk(FileIO):
    """Takes only the first bytes of what is written."""

    def write(self, content: Any) -> int:
        return super().write(content[:20])


def refuse(*_arguments: object) -> None:
    raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))


@pytest.mark.parametrize(
    ("name", "broken"), [("FileIO", FullDisk), ("flush", refuse), ("move_link", refuse)]
)
def test_a_move_that_fails_leaves_the_log_and_the_link(
    bundles, shelf, monkeypatch, name: str, broken: object
) -> None:
    before = (shelf / LOG).read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(f"{PROMOTE}.{name}", broken)
        with pytest.raises(StorageError):
            promote(shelf / bundles[1].name, shelf / "live")

    assert (shelf / LOG).read_bytes() == before
    assert (shelf / "live").readlink().name == bundles[0].name
    assert promote(shelf / bundles[1].name, shelf / "live").after == bundles[1].name


def test_of_two_promotions_at_once_one_moves_the_link(bundles, shelf, monkeypatch) -> None:
    """Both have read the link before one of them moves it."""
    barrier = threading.Barrier(2, timeout=60)

    def load_together(path: Path, settings: Settings) -> LoadedModel:
        if path.name == "live":
            barrier.wait()
        return load_model(path, settings)

    monkeypatch.setattr(f"{PROMOTE}.load_model", load_together)
    third = shelf / "third"
    shutil.copytree(bundles[1], third)
    outcomes: list[str] = []

    def promote_it(bundle: Path) -> None:
        try:
            outcomes.append(promote(bundle, shelf / "live").after)
        except ConfigError:
            outcomes.append("refused")

    threads = [
        threading.Thread(target=promote_it, args=(bundle,))
        for bundle in (shelf / bundles[1].name, third)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (moved,) = set(outcomes) - {"refused"}
    assert sorted(outcomes, key=lambda one: one == "refused")[1] == "refused"
    assert (shelf / "live").readlink().name == moved
    assert [line["after"] for line in log_of(shelf)] == [bundles[0].name, moved]


def test_a_recorded_move_that_was_not_made_is_made_again(bundles, shelf) -> None:
    """As if the process had been killed between both."""
    first, second = (bundle.name for bundle in bundles)
    promote(shelf / second, shelf / "live")
    (shelf / "live").unlink()
    (shelf / "live").symlink_to(first)

    with pytest.raises(PromotionError):  # nothing was live before the first bundle
        promote(back=shelf / "live")
    assert promote(shelf / second, shelf / "live").before == first
    assert promote(back=shelf / "live").after == first


def test_a_live_link_to_a_link_moves_back_to_the_live_bundle(bundles, shelf) -> None:
    """`latest` leads to the newer bundle when somebody rolls back."""
    first, second = (bundle.name for bundle in bundles)
    live = shelf / "live"
    latest = shelf / "latest"
    latest.symlink_to(first)
    live.unlink()
    live.symlink_to("latest")
    promote(shelf / second, live)
    latest.unlink()
    latest.symlink_to(second)

    assert promote(back=live).after == first
    assert live.resolve().name == first


@pytest.mark.parametrize(
    "line",
    [
        '{"time": "2026-',
        '{"link": "live", "after": 7, "before": ["x"]}',
        '{"link": "other", "before": "a", "after": "b"}',
        '{"link": "live", "before": "a", "after": "b", "version": 2, "votes": 3}',
    ],
)
def test_a_line_that_does_not_fit_does_not_stop_the_way_back(bundles, shelf, line: str) -> None:
    promote(shelf / bundles[1].name, shelf / "live")
    with (shelf / LOG).open("a") as log:
        log.write(line)

    assert promote(back=shelf / "live").after == bundles[0].name
    assert promote(back=shelf / "live").after == bundles[1].name


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"version": 3, "comparison": {"votes": 3}},
        {"anchor": "x", "comparison": {"checks": [{"of": "anchor"}], "verdict": "worse"}},
    ],
    ids=["of this version", "of a later one", "of 0.2"],
)
def test_the_way_back_reads_lines_of_other_versions(
    bundles, shelf, changes: dict[str, Any]
) -> None:
    promote(shelf / bundles[1].name, shelf / "live")
    first, line = log_of(shelf)
    (shelf / LOG).write_text(f"{json.dumps(first)}\n{json.dumps(line | changes)}\n")

    assert promote(back=shelf / "live").after == bundles[0].name


def test_the_way_back_leaves_out_refused_moves(bundles, shelf) -> None:
    promote(shelf / bundles[1].name, shelf / "live")
    moved = log_of(shelf)[-1]
    refused = moved | {"before": bundles[1].name, "refused": True}
    with (shelf / LOG).open("a") as log:
        log.write(f"{json.dumps(refused)}\n")

    assert promote(back=shelf / "live").after == bundles[0].name


def test_the_evaluation_of_a_bundle_tells_its_number_of_training_images(
    bundles, labelled, tmp_path
) -> None:
    photos = labelled(bundles[0])
    count = len(list(photos.rglob("*.png")))
    notes = []
    trained = trained_on(bundles[0], tmp_path / "trained", photos)
    for bundle in (trained, bundles[0]):
        scores_of_bundle(bundle, photos, on_image=lambda *_: None, log=notes.append)
    warnings = [note for note in notes if "training images" in note]

    assert [note.partition(" are ")[0] for note in warnings] == [
        f"{photos}: {count} of {count} images"
    ]
