"""Comparing two bundles on photographs, and moving the link to the better one."""

import json
import os
import re
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sopdeploy.bundle.folder import read_manifest
from sopdeploy.bundle.live import LOG
from sopdeploy.bundle.manifest import FileRecord
from sopdeploy.decision import Decision, Rejection
from sopdeploy.errors import ConfigError, DataError, PromotionError, SopdeployError
from sopdeploy.evaluation.permission import Counts, Rule, rule_of_all
from sopdeploy.files import sha256
from sopdeploy.photos.change import write_change
from sopdeploy.photos.evaluation_images import open_any_images
from sopdeploy.photos.file_checks import hash_images
from sopdeploy.photos.files import sampled_name
from sopdeploy.project import Origin, utc_now
from sopdeploy_commands.bundles.predict import predict
from sopdeploy_commands.bundles.scores import scores_of_bundle
from sopdeploy_commands.promotion import decided
from sopdeploy_commands.promotion.compare import _decide as decide
from sopdeploy_commands.promotion.compare import compare, compare_loaded
from sopdeploy_commands.promotion.comparison import BundleComparison, Check, count_needed
from sopdeploy_commands.promotion.photographs import are_recent as are_recent_images
from sopdeploy_commands.promotion.photographs import read_times
from sopdeploy_commands.promotion.promote import promote
from sopdeploy_service.inference.loader import LoadedModel, load_model
from sopdeploy_service.settings import Settings
from tests.support.service import write_bundle


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
    names, counts = (
        {"run": "r", "run_id": "0", "data": "d"},
        {"num_images": len(hashes), "num_classes": 7},
    )
    origin = Origin(started=utc_now(), sample=hashes, **names, **counts)
    return with_manifest(bundle, destination, origin=origin)


def test_the_figures_are_those_of_the_predictions(bundles, labelled) -> None:
    first, second = bundles
    photos = labelled(second)
    strangers = labelled(first, count=6, first=500)
    done: list[tuple[int, int]] = []
    found = compare(
        first, second, photos, unknown=strangers, on_image=lambda *counts: done.append(counts)
    )
    paths = sorted(photos.rglob("*.png"))
    answers = [
        [one.classes[0].label for one in predict(bundle, paths, threads=1)]
        for bundle in bundles
    ]
    right = sum(one == path.parent.name for one, path in zip(answers[0], paths, strict=True))
    assert (found.num_images, found.first.top1.right, found.second.top1.right) == (
        40,
        right,
        40,
    )
    assert (found.wins, found.losses, found.difference) == (40 - right, 0, (40 - right) / 40)
    assert found.verdict == "better"
    assert found.summary.startswith(
        f"passes: of 40 recent photos 40 right, the live one {right}: "
    )
    assert [one.label for one in found.classes] == sorted(set(answers[1]))
    assert sum(one.num_images for one in found.classes) == 40
    assert found.first.accepted is None
    known = [one.known for one in predict(second, paths, threads=1)]
    unknown = [
        one.known for one in predict(second, sorted(strangers.rglob("*.png")), threads=1)
    ]
    assert (found.second.accepted.right, found.second.rejected.right) == (
        sum(known),
        6 - sum(unknown),
    )
    assert done[-1] == (92, 92)
    assert all("not recorded" in note or "no images of" in note for note in found.notes)
    back = compare(second, first, photos)
    assert (back.verdict, back.wins, back.difference) == ("worse", 0, -found.difference)

    # The class that loses most is compared with the others, if there are any.
    assert "loses most" in back.summary
    loser = max(back.classes, key=lambda change: change.losses - change.wins)
    others = tuple(change for change in back.classes if change is not loser)
    exchange = re.compile(r"; (\w+ loses most: .*?, the live one \d+): ")
    of_new = back.model_copy(update={"classes": (loser,), "new": others})
    assert exchange.findall(of_new.summary) == exchange.findall(back.summary) != []
    alone = back.model_copy(update={"classes": (loser,), "new": ()})
    assert "loses most" not in alone.summary


def test_a_bundle_compared_with_itself_has_no_difference_and_asks_for_no_labels(
    bundles, labelled
) -> None:
    first, second = bundles
    text = compare(second, second, labelled(second, count=6)).summary
    assert text.startswith(
        "no difference, both are the same bundle: of 6 recent photos 6 right"
    )
    other = compare(first, second, labelled(second, count=6)).summary
    assert other.startswith(
        "undecided; 6 photos, fewer than 20; label about 35 more to decide, two fifths of which"
    )


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
    assert (after.num_images, after.wins + after.losses) == (
        before.num_images,
        before.wins + before.losses,
    )
    assert (after.low, after.high, after.p) == (before.low, before.high, before.p)


def test_photographs_of_the_training_and_their_copies_decide_nothing(
    bundles, labelled, tmp_path, monkeypatch
) -> None:
    first, second = bundles
    photos = labelled(second, count=30)
    seen = tmp_path / "seen"
    shutil.copytree(photos, seen)
    kept = sorted(seen.rglob("*.png"))[12:]
    for path in kept:
        path.unlink()
    trained = trained_on(second, tmp_path / "trained", seen)
    (one, *_) = sorted(seen.rglob("*.png"))
    (photos / one.relative_to(seen)).with_name("copy.jpg").write_bytes(b"")
    Image.open(one).save((photos / one.relative_to(seen)).with_name("copy.jpg"), quality=70)
    found = compare(first, trained, photos)
    assert (found.trained_on, found.num_images, found.num_copies) == (13, 18, 0)
    assert not any("trained" in note for note in found.notes if "first" not in note)
    monkeypatch.setattr(
        "sopdeploy_commands.promotion.photographs.MAX_RECORDED", 12
    )  # so the record may be incomplete
    assert (
        f"{read_manifest(trained).name}: may have been trained on more of these photos than its "
        "record tells"
    ) in compare(first, trained, photos).notes
    with pytest.raises(DataError, match="was trained on all of these photos"):
        compare(first, trained, seen)


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


def test_a_refusal_names_a_new_class_that_no_photograph_shows(
    bundles, labelled, tmp_path
) -> None:
    first, second = bundles
    photos = labelled(first)
    name = min(path.name for path in photos.iterdir())
    newer = relabelled(second, tmp_path / "newer", name, "yak")
    shutil.rmtree(photos / name)

    found = compare(first, newer, photos)
    assert (found.unseen, found.passes) == (("yak",), False)
    assert "; no photo shows the new class yak, so what the new bundle" in found.summary
    assert compare(first, second, photos).unseen == ()


def test_a_new_class_counts_and_the_others_are_bounded_alone(
    bundles, labelled, tmp_path
) -> None:
    first, second = bundles
    photos = labelled(second)
    classes = {path.name: len(list(path.iterdir())) for path in photos.iterdir()}
    name = min(classes, key=classes.__getitem__)
    newer = relabelled(second, tmp_path / "newer", name, "yak")
    (photos / name).rename(photos / "yak")
    found = compare(first, newer, photos)
    assert found.num_images == 40
    assert {one.of: one.num_images for one in found.checks} == {
        "all": 40,
        "old": 40 - classes[name],
    }
    assert [(one.label, one.first, one.second) for one in found.new] == [
        ("yak", 0, classes[name])
    ]
    assert f"; new class yak {classes[name]} of {classes[name]}" in found.summary
    assert (found.removed, "yak" in [one.label for one in found.classes]) == ((name,), False)
    (photos / "cow").mkdir()
    photograph(0).save(photos / "cow" / "0.png")
    more = compare(first, newer, photos)
    assert (more.num_images, more.new) == (found.num_images, found.new)
    assert [note for note in more.notes if "cow" in note] == [
        f"{photos}: left out, of no class: cow"
    ]


# (of, photographs, wins, losses, lower bound, limit) of each check -> verdict
VERDICTS: dict[str, tuple[list[tuple[Any, ...]], str]] = {
    "old classes lose as much as a new class may cost": (
        [("all", 100, 8, 8, -0.075, -0.05), ("old", 92, 0, 6, -0.090, -0.103)],
        "undecided",
    ),
    "old classes lose more than that": (
        [("all", 100, 8, 8, -0.075, -0.05), ("old", 92, 1, 9, -0.120, -0.103)],
        "worse",
    ),
    "all lose more than the limit": ([("all", 100, 1, 9, -0.12, -0.05)], "worse"),
    "all lose by chance": ([("all", 100, 5, 7, -0.08, -0.05)], "undecided"),
    "all pass": ([("all", 100, 8, 8, -0.04, -0.05)], "not worse"),
}


@pytest.mark.parametrize("case", VERDICTS)
def test_a_loss_within_its_limit_is_no_reason_to_refuse(case: str) -> None:
    rows, verdict = VERDICTS[case]
    checks = [
        Check(
            of=of, num_images=images, wins=wins, losses=losses, low=low, limit=limit,
            difference=(wins - losses) / images,
        )
        for of, images, wins, losses, low, limit in rows
    ]  # fmt: skip
    assert decide(checks, None) == verdict


# (photographs, estimate of how many more) of each failed check -> what is asked for
ASKED: dict[str, tuple[list[tuple[int, int | None]], str | None]] = {
    "an estimate": ([(100, 30)], "label about 75 more to decide, two fifths"),
    "the larger of two": ([(100, 30), (80, 40)], "label about 100 more to decide, two fifths"),
    "none, of many": ([(60, None)], None),
    "none, of few": (
        [(40, None)],
        "label about 50 more to see whether labels can help, two fifths",
    ),
    "none, of all but one": (
        [(59, None)],
        "label about 3 more to see whether labels can help, two fifths",
    ),
    "one of few, one with an estimate": (
        [(70, 30), (50, None)],
        "label about 75 more to see whether labels can help, two fifths",
    ),
    "one of few, one of many": ([(70, None), (50, None)], None),
}


@pytest.mark.parametrize("case", ASKED)
def test_few_photographs_ask_for_labels_that_show_whether_others_can_decide(case: str) -> None:
    rows, asked = ASKED[case]
    checks = [
        Check(
            of="all", num_images=images, wins=0, losses=6, low=-0.2, limit=-0.05,
            difference=-6 / images, num_more_images=more,
        )
        for images, more in rows
    ]  # fmt: skip
    passing = checks[0].model_copy(update={"num_images": 10, "low": 0.0})

    needed = count_needed([*checks, passing])
    assert (needed and needed.line.split(" of which")[0]) == asked


def test_only_unknown_photographs_of_the_sample_are_compared_and_those_that_no_server_kept(
    bundles, labelled, tmp_path
) -> None:
    first, second = bundles
    photos, unknown = labelled(second), tmp_path / "photos-unknown"
    names = [f"{number:032x}.png" for number in range(7)]
    for number, name in enumerate(
        [*names[:5], *(f"sample/{name}" for name in names[5:]), "own.png"]
    ):
        (unknown / name).parent.mkdir(parents=True, exist_ok=True)
        photograph(500 + number).save(unknown / name)
    found = compare(first, second, photos, unknown=unknown)
    assert found.second.rejected.count == 3
    assert any("5 photos left out, because a server kept them" in note for note in found.notes)
    (unknown / "own.png").unlink()
    shutil.rmtree(unknown / "sample")
    assert compare(first, second, photos, unknown=unknown).unknown is None


def test_a_bundle_that_rejects_fewer_unknown_images_is_worse(
    bundles, labelled, tmp_path
) -> None:
    first, second = bundles
    unknown = labelled(first, count=12, first=500)
    rules = (Rejection(threshold=threshold) for threshold in (1e9, -1e9))
    strict, loose = (
        with_manifest(second, tmp_path / name, decision=Decision(rejection=rule))
        for name, rule in zip(("strict", "loose"), rules, strict=True)
    )
    photos = labelled(second)
    found = compare(strict, loose, photos, unknown=unknown)
    assert (found.wins, found.losses, found.verdict) == (0, 0, "worse")
    assert (found.unknown.wins, found.unknown.losses) == (0, 12)
    assert "; rejects 12 fewer unknown images: " in found.summary
    assert not compare(loose, strict, photos, unknown=unknown).unknown.is_worse
    assert compare(strict, loose, photos).unknown is None
    (one, *others) = sorted(unknown.rglob("*.png"))
    for number, path in enumerate(others):  # copies of one image are no evidence
        Image.open(one).save(path.with_name(f"copy {number}.png"))
        path.unlink()
    found = compare(strict, loose, photos, unknown=unknown)
    assert (found.unknown.losses, found.unknown.is_worse, found.num_copies) == (1, False, 11)
    assert found.second.rejected.count == 1


@pytest.fixture
def shelf(bundles, tmp_path) -> Path:
    """A folder with both bundles and the link `live` to the first."""
    for bundle in bundles:
        shutil.copytree(bundle, tmp_path / "shelf" / bundle.name)
    promote(tmp_path / "shelf" / bundles[0].name, tmp_path / "shelf" / "live", None)
    return tmp_path / "shelf"


def log_of(shelf: Path) -> list[dict]:
    return [json.loads(line) for line in (shelf / LOG).read_text().splitlines()]


def test_a_better_bundle_is_promoted_and_the_log_says_why(bundles, labelled, shelf) -> None:
    first, second = (bundle.name for bundle in bundles)
    move = promote(shelf / second, shelf / "live", labelled(bundles[1]))
    assert ((shelf / "live").readlink().name, move.before, move.after) == (
        second,
        first,
        second,
    )
    created, moved = log_of(shelf)
    assert (created["reason"], created["before"]) == ("first bundle", None)
    assert moved["reason"].startswith("passes: of 40 recent photos 40 right, ")
    assert moved["comparison"]["first"]["bundle"] == first
    assert moved["user"]
    assert promote(back=shelf / "live").after == first
    assert promote(back=shelf / "live").after == second
    assert [line["after"] for line in log_of(shelf)] == [first, second, first, second]


def test_what_is_worse_or_undecided_is_refused_unless_forced(bundles, labelled, shelf) -> None:
    first, second = (bundle.name for bundle in bundles)
    for photos, message in (
        (
            labelled(bundles[0]),
            r"not promoted, worse; may lose up to .*; \w+ loses most: 0 of \d+ right, the live one "
            r"\d+, and \d+ of \d+ of the others, the live one \d+: .*; worse in",
        ),
        (
            labelled(bundles[1], count=3),
            r"not promoted, undecided; 3 photos, fewer than 20; label about \d+ more to decide",
        ),
    ):
        with pytest.raises(PromotionError, match=message):
            promote(shelf / second, shelf / "live", photos)
    with pytest.raises(ConfigError, match="no photos to compare with"):
        promote(shelf / second, shelf / "live", None)
    with pytest.raises(ConfigError, match="or --back LINK alone"):
        promote(back=shelf / "live", force="not recorded")
    assert ((shelf / "live").readlink().name, len(log_of(shelf))) == (first, 3)
    promote(
        shelf / second, shelf / "live", labelled(bundles[0]), force="rollback of the camera"
    )
    promote(shelf / first, shelf / "live", None, force="once more")
    assert [line["reason"] for line in log_of(shelf)[3:]] == [
        "rollback of the camera",
        "once more",
    ]
    assert log_of(shelf)[3]["comparison"]["verdict"] == "worse"


def test_a_refusal_with_many_long_names_is_recorded_and_a_long_reason_is_cut(
    bundles, labelled, shelf, monkeypatch
) -> None:
    names = tuple(f"{number:04} {'class ' * 150}" for number in range(900))

    def compare_without(*arguments: Any, **options: Any) -> BundleComparison:
        return compare_loaded(*arguments, **options).model_copy(update={"removed": names})

    monkeypatch.setattr("sopdeploy_commands.promotion.promote.compare_loaded", compare_without)
    second, live, photos = (
        shelf / bundles[1].name,
        shelf / "live",
        labelled(bundles[1], count=3),
    )
    with pytest.raises(PromotionError, match="and 890 more"):
        promote(second, live, photos)
    assert log_of(shelf)[-1]["refused"]
    assert log_of(shelf)[-1]["comparison"]["removed"] == [*names]
    with pytest.raises(ConfigError, match=r"live: this move cannot be recorded, reason: "):
        promote(second, live, None, force="\udcff")
    assert promote(second, live, photos, force="x" * 10_001).reason == "x" * 10_000


def test_each_further_attempt_needs_more_evidence(
    bundles, labelled, shelf, monkeypatch
) -> None:
    second, few = shelf / bundles[1].name, labelled(bundles[1], count=3)
    for _ in range(3):  # the same comparison again is not another one
        announced = compare(shelf / "live", second, few).summary
        with pytest.raises(PromotionError, match="undecided") as refusal:
            promote(second, shelf / "live", few)
        assert announced in str(refusal.value)
    assert [(line["refused"], (line["comparison"] or {}).get("attempt")) for line in log_of(shelf)] == [
        (False, None), (True, 1), (True, 1), (True, 1),
    ]  # fmt: skip
    with pytest.raises(PromotionError, match="names no bundle before"):
        promote(back=shelf / "live")
    photos = labelled(bundles[1], count=24)
    module = "sopdeploy_commands.promotion.promote.count_comparisons"
    with monkeypatch.context() as patched:
        patched.setattr(module, lambda _link: 10**12)
        with pytest.raises(PromotionError, match=r"undecided; .* attempt 1000000000001"):
            promote(second, shelf / "live", photos)
    assert promote(second, shelf / "live", photos).comparison.attempt == 2


def test_a_move_that_was_recorded_and_not_made_is_repeated_as_the_same_attempt(
    bundles, labelled, shelf
) -> None:
    second, live, photos = (
        shelf / bundles[1].name,
        shelf / "live",
        labelled(bundles[1], count=24),
    )
    first = live.readlink()
    assert promote(second, live, photos).comparison.attempt == 1
    live.unlink()  # as if the process had ended before the move
    live.symlink_to(first)
    assert compare(live, second, photos).attempt == 1
    assert promote(second, live, photos).comparison.attempt == 1


def test_the_labels_that_are_asked_for_suffice_for_the_next_attempt(
    bundles, labelled, shelf, monkeypatch
) -> None:
    attempts = []

    def count_attempt(tolerance: float, attempt: int) -> Rule:
        attempts.append(attempt)
        return rule_of_all(tolerance, attempt)

    monkeypatch.setattr("sopdeploy_commands.promotion.compare.rule_of_all", count_attempt)
    few = labelled(bundles[1], count=15)
    [check] = compare(shelf / "live", bundles[0], few).checks
    counts = Counts(check.num_images, check.wins, check.losses)
    assert attempts == [1, 2]
    assert check.num_more_images == rule_of_all(5.0, 2).labels_to_pass(counts)
    assert check.num_more_images > rule_of_all(5.0, 1).labels_to_pass(counts)


def kept_at(folder: Path, number: int, day: float, *, is_kept: bool = True) -> None:
    name = f"{number:032x}.jpg" if is_kept else f"mine-{number}.jpg"
    path = folder / "hat" / name
    path.parent.mkdir(exist_ok=True)
    photograph(number).save(path)
    os.utime(path, (86_400 * day,) * 2)


# days of kept photographs, how many are needed, the day of a change: the days that count
RECENT = {
    "the last 14 days": ([1, 20, 22, 30], 2, None, [20, 22, 30]),
    "more if these are too few": ([1, 5, 9, 30], 3, None, [5, 9, 30]),
    "all if there are few": ([1, 30], 2, None, [1, 30]),
    "since a change": ([20, 22, 28, 29, 30], 2, 28, [28, 29, 30]),
    "more if these are too few since a change": ([20, 22, 29, 30], 3, 29, [22, 29, 30]),
}


@pytest.mark.parametrize("case", RECENT)
def test_recent_photographs_are_those_of_the_last_days_and_those_that_no_server_kept(
    tmp_path, monkeypatch, case
) -> None:
    days, needed, changed, expected = RECENT[case]
    monkeypatch.setattr("sopdeploy_commands.promotion.photographs.MIN_RECENT", needed)
    for number, day in enumerate(days):
        kept_at(tmp_path, number, day)
    kept_at(tmp_path, 99, 0, is_kept=False)
    images = open_any_images(tmp_path)
    changed_at = None if changed is None else datetime.fromtimestamp(86_400 * changed, UTC)
    are_recent = are_recent_images(read_times(images), changed_at)
    recent = [images.path(index) for index in np.flatnonzero(are_recent)]
    found = sorted(round(path.stat().st_mtime / 86_400) for path in recent)
    assert found == [0, *expected]


def as_kept(photos: Path, *, days_ago: int = 0, newest: int = 0) -> Path:
    """Name the photographs as `label` does, every second one as of the sample.

    *newest* of them are of 1 January 2026, the others earlier.
    """
    begin = datetime(2026, 1, 1, tzinfo=UTC).timestamp()
    for number, path in enumerate(sorted(photos.rglob("*.png"))):
        end = "-sample" if number % 2 else ""
        kept = path.with_name(f"{number:032x}{end}.png")
        path.rename(kept)
        at = begin if number < newest else begin - 86_400 * days_ago
        os.utime(kept, (at, at))
    return photos


@pytest.mark.parametrize("num_newest", [0, 7])
def test_what_has_decided_about_a_live_bundle_is_trained_on_but_the_newest(
    bundles, labelled, shelf, monkeypatch, num_newest: int
) -> None:
    """Photographs that no server kept stay. What moves is named as of the sample, also if 0.2.0 held it out."""
    monkeypatch.setattr(decided, "KEEP_DECIDING", num_newest)
    held_out = as_kept(labelled(bundles[1])).rename(shelf / "photos-held-out")
    label = min(path.name for path in held_out.iterdir())
    (held_out / label / "own.png").write_bytes(
        min((held_out / label).iterdir()).read_bytes() + b"\0"
    )
    (shelf / "photos").mkdir()
    kept = [path for path in sorted(held_out.rglob("*.png")) if path.name != "own.png"]
    names = {sampled_name(path) for path in kept}
    for number, path in enumerate(kept):
        os.utime(path, (86_400 * (1_000 + number % 20),) * 2)

    move = promote(shelf / bundles[1].name, shelf / "live", held_out)
    assert move.num_trained == len(kept) - num_newest
    left = [path.stat().st_mtime for path in held_out.rglob("*.png") if path.name != "own.png"]
    assert len(left) == num_newest
    trained = list((shelf / "photos").rglob("*.png"))
    assert len(trained) == len(kept) - num_newest
    assert {path.name for path in trained} <= names
    assert not left or min(left) >= max(path.stat().st_mtime for path in trained)


def test_a_refused_bundle_leaves_what_decided(bundles, labelled, shelf) -> None:
    held_out = as_kept(labelled(bundles[0])).rename(shelf / "photos-held-out")
    (shelf / "photos").mkdir()
    with pytest.raises(PromotionError):
        promote(shelf / bundles[1].name, shelf / "live", held_out)
    assert not list((shelf / "photos").rglob("*.png"))


def test_an_attempt_on_few_photographs_does_not_count(bundles, labelled, shelf) -> None:
    for _ in range(2):
        with pytest.raises(PromotionError, match="fewer than"):
            promote(shelf / bundles[1].name, shelf / "live", labelled(bundles[1], count=4))
    assert (
        promote(
            shelf / bundles[1].name, shelf / "live", labelled(bundles[1])
        ).comparison.attempt
        == 1
    )


CHANGED = datetime(2025, 12, 31, 12, tzinfo=UTC)


def test_during_an_alarm_the_photographs_since_it_began_decide_if_there_are_enough(
    bundles, labelled, monkeypatch
) -> None:
    photos = as_kept(labelled(bundles[1]), days_ago=3, newest=25)
    write_change(photos, CHANGED)
    found = compare(*bundles, photos)
    assert (found.num_images, found.periods[0].num_images) == (40, 25)
    assert found.change_problem == ""

    monkeypatch.setattr("sopdeploy_commands.promotion.photographs.MIN_RECENT", 25)
    assert compare(*bundles, photos).num_images == 25


def test_during_an_alarm_a_bundle_that_shows_no_gain_is_refused(
    bundles, labelled, shelf
) -> None:
    photos = as_kept(labelled(bundles[0]), days_ago=3, newest=25)
    write_change(photos, CHANGED)
    with pytest.raises(PromotionError, match="no better since the traffic changed"):
        promote(shelf / bundles[1].name, shelf / "live", photos)


def test_early_in_an_alarm_all_recent_photographs_decide_and_the_note_says_so(
    bundles, labelled
) -> None:
    """With little traffic, there are too few since the change, whatever is labelled."""
    photos = as_kept(labelled(bundles[1]), days_ago=3, newest=5)
    write_change(photos, CHANGED)
    found = compare(*bundles, photos)
    assert (found.num_images, found.periods[0].num_images) == (40, 5)
    assert found.change_problem == ""
    assert found.change_note.startswith("only 5 photos since the traffic changed, ")
    assert found.change_note.endswith("label about 38 more when they have come")


def test_accuracy_is_told_for_the_newest_photographs_and_by_week(bundles, labelled) -> None:
    found = compare(*bundles, as_kept(labelled(bundles[1]), days_ago=7, newest=10))
    assert [(one.of, one.num_images) for one in found.periods] == [
        ("newest photos", 30),
        ("week of 2025-12-22", 30),
        ("week of 2025-12-29", 10),
    ]
    newest = found.periods[0]
    assert newest.line == (
        f"newest photos: of 30 photos {newest.second} right, the live one {newest.first}"
    )


def test_a_bundle_that_lacks_a_class_or_has_another_name_is_refused(
    bundles, labelled, shelf, tmp_path
) -> None:
    photos = labelled(bundles[1])
    name = min(path.name for path in photos.iterdir())
    narrower = relabelled(bundles[1], tmp_path / "narrower", name, "yak")
    with pytest.raises(PromotionError, match=f"without the classes {name}"):
        promote(narrower, shelf / "live", photos)
    renamed = with_manifest(bundles[1], tmp_path / "renamed", project="other")
    with pytest.raises(PromotionError, match="its name is other, but clients use tiny"):
        promote(renamed, shelf / "live", photos)


def test_a_damaged_bundle_never_becomes_live(bundles, shelf) -> None:
    second = shelf / bundles[1].name
    (second / "model.onnx").write_bytes(b"damaged")
    for force in (None, "urgent"):
        with pytest.raises(Exception, match=r"model\.onnx"):
            promote(second, shelf / ("live" if force else "new"), None, force=force)
    assert ((shelf / "live").readlink().name, (shelf / "new").is_symlink()) == (
        bundles[0].name,
        False,
    )


def move_away(new: Path, settings: Settings, shelf: Path) -> LoadedModel:
    (shelf / "live").unlink()
    (shelf / "live").symlink_to("elsewhere")
    return load_model(new, settings)


def refuse(*_arguments: object) -> None:
    raise PermissionError(1, "Operation not permitted")


def test_what_is_no_link_a_move_in_between_and_a_disk_without_links_change_nothing(
    bundles, shelf, monkeypatch
) -> None:
    module = "sopdeploy_commands.promotion.promote"
    first, second, live = (*(shelf / bundle.name for bundle in bundles), shelf / "live")
    for function, change, new, over, message in (
        ("read_promotions", None, second, first, "not a link"),
        ("read_promotions", None, live, live, "leads to this bundle already"),
        ("move_link", refuse, second, live, "cannot be written"),
        (
            "load_model",
            lambda *given: move_away(*given, shelf),
            second,
            live,
            "was moved by another process",
        ),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(f"{module}.{function}", change)
            with pytest.raises(SopdeployError, match=message):
                promote(new, over, None, force="x")
        assert len(log_of(shelf)) == 1
    assert live.readlink().name == "elsewhere"


def test_a_live_link_to_a_link_that_moves_is_moved_back_to_the_bundle_that_was_live(
    bundles, labelled, shelf
) -> None:
    """`latest` leads to the newer bundle when somebody rolls back."""
    first, second = (bundle.name for bundle in bundles)
    live, latest = shelf / "live", shelf / "latest"
    latest.symlink_to(first)
    live.unlink()
    live.symlink_to("latest")
    with pytest.raises(PromotionError, match="undecided"):
        promote(shelf / second, live, labelled(bundles[1], count=3))
    assert promote(shelf / second, live, labelled(bundles[1])).comparison.attempt == 1
    latest.unlink()
    latest.symlink_to(second)
    assert promote(back=live).after == first
    assert live.resolve().name == first


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"before": ""}, "before: .*; repair or remove this line"),
        ({"before": "a\nb"}, "before: .*; repair or remove this line"),
        ({"before": "a\x00b"}, "before: .*; repair or remove this line"),
        ({"before": "x" * 5000}, "before: .*; repair or remove this line"),
        (
            {"reason": {"text": "x"}, "written_by": "9.8"},
            "reason: .*; read it with sopdeploy 9.8",
        ),
        ({"version": 2, "written_by": "9.8"}, "version: 2, .*; read it with sopdeploy 9.8"),
        ({"comparison": {"votes": 3}}, "comparison.*; repair or remove this line"),
    ],
)
def test_a_line_of_the_log_that_cannot_be_read_is_refused_and_another_links_is_skipped(
    bundles, shelf, changes: dict[str, object], message: str
) -> None:
    promote(shelf / bundles[1].name, shelf / "live", None, force="x")
    first, line = log_of(shelf)
    (shelf / LOG).write_text(f"{json.dumps(first)}\n{json.dumps({**line, **changes})}\n")
    with pytest.raises(ConfigError, match=rf"{LOG}: line 2: {message}"):
        promote(back=shelf / "live")
    (shelf / LOG).write_text(
        f"{json.dumps({**line, **changes, 'link': 'other'})}\n{json.dumps(line)}\n"
    )
    assert promote(back=shelf / "live").after == bundles[0].name


@pytest.mark.parametrize("written_by", [{}, {"written_by": "9.8"}])
def test_a_version_goes_back_over_a_line_that_a_later_version_wrote(
    bundles, labelled, shelf, written_by: dict[str, str]
) -> None:
    """Also if a table within the line has a field that this version does not know."""
    promote(shelf / bundles[1].name, shelf / "live", labelled(bundles[1]))
    first, line = log_of(shelf)
    line = {**line, **written_by, "votes": 3, "comparison": {**line["comparison"], "votes": 3}}
    (shelf / LOG).write_text(f"{json.dumps(first)}\n{json.dumps(line)}\n")
    assert promote(back=shelf / "live").after == bundles[0].name


def test_a_record_of_0_2_with_the_best_earlier_bundle_stays_readable(
    bundles, labelled, shelf
) -> None:
    promote(shelf / bundles[1].name, shelf / "live", labelled(bundles[1]))
    first, line = log_of(shelf)
    comparison = line["comparison"]
    check = {**comparison["checks"][0], "of": "anchor"}
    line = {
        **line,
        "anchor": bundles[0].name,
        "comparison": {**comparison, "checks": [check], "suspects": ["trained"]},
    }

    (shelf / LOG).write_text(f"{json.dumps(first)}\n{json.dumps(line)}\n")
    assert promote(back=shelf / "live").after == bundles[0].name


def test_a_torn_line_of_the_log_is_skipped(bundles, shelf) -> None:
    promote(shelf / bundles[1].name, shelf / "live", None, force="x")
    with (shelf / LOG).open("a") as log:
        log.write('{"time": "2026-')
    assert promote(back=shelf / "live").after == bundles[0].name
    assert promote(back=shelf / "live").after == bundles[1].name


def test_the_evaluation_of_a_bundle_tells_how_many_images_it_was_trained_on(
    bundles, labelled, tmp_path
) -> None:
    photos = labelled(bundles[0])
    count, notes = len(list(photos.rglob("*.png"))), []
    trained = trained_on(bundles[0], tmp_path / "trained", photos)
    for bundle in (trained, bundles[0]):
        scores_of_bundle(bundle, photos, on_image=lambda *_: None, log=notes.append)
    warnings = [note for note in notes if "training images" in note]
    assert [note.partition(" are ")[0] for note in warnings] == [
        f"{photos}: {count} of {count} images"
    ]
