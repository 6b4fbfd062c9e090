"""What the folder of kept photos decides: whose a photo is, what makes room, and what a record says."""

import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sopdeploy.base import files as base_files
from sopdeploy.bundle.decision import Decision
from sopdeploy.data.photos.kept import LABEL_CONFIG, NOT_OURS
from sopdeploy_service import keep
from sopdeploy_service.keep import Keeper
from sopdeploy_service.kept_folder import KeptFolder
from sopdeploy_service.observability.metrics import Metrics
from sopdeploy_service.settings import Settings
from tests.service.test_keep import PAIR, PHOTO, fields, kept_folder, name_of, numbers
from tests.support.service import deciding

NAME = name_of(1)
RECORD = Path(NAME).with_suffix(".json").name


@pytest.fixture(autouse=True)
def _no_flush(monkeypatch) -> None:
    """Flushing files to the disk would take most of the time."""
    monkeypatch.setattr(base_files, "flush", lambda _file: None)


def files(folder: Path) -> set[str]:
    return {
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()
    }


def read(record: Path) -> dict[str, object]:
    return dict(json.loads(record.read_text())["data"])


def move(*names: str, to: str, copy: bool = False) -> Callable[[Path], object]:
    """What a person does: move or copy *names* of the folder `cat`."""

    def act(root: Path) -> None:
        (root / to).mkdir(parents=True, exist_ok=True)
        for name in names:
            (shutil.copy2 if copy else shutil.move)(root / "cat" / name, root / to / name)

    return act


def write_record(text: str) -> Callable[[Path], object]:
    return lambda root: (root / "cat" / RECORD).write_text(text)


def record_of(predicted: object, reasons: object = "sample") -> str:
    return json.dumps({"data": {"predicted": predicted, "reasons": reasons}})


def delete(*names: str) -> Callable[[Path], object]:
    return lambda root: [(root / "cat" / name).unlink() for name in names]


def link(root: Path) -> None:
    (root / "mine.jpg").write_bytes(PHOTO)
    (root / "cat" / NAME).unlink()
    (root / "cat" / RECORD).unlink()
    (root / "cat" / NAME).symlink_to(root / "mine.jpg")


AS_IT_WAS = {f"cat/{NAME}", f"cat/{RECORD}"}
NEW = {f"dog/{NAME}", f"dog/{RECORD}"}

# What happens to a photo that was kept as a cat, and the files after the network predicts a dog for it.
WHOSE = {
    "nothing": (lambda _root: None, NEW),
    "the photo moved": (move(NAME, to="eel"), {f"cat/{RECORD}", f"eel/{NAME}"}),
    "both moved": (move(NAME, RECORD, to="eel"), {f"eel/{NAME}", f"eel/{RECORD}"}),
    "moved to the class predicted now": (
        move(NAME, to="dog"),
        {f"cat/{RECORD}", f"dog/{NAME}"},
    ),
    "both moved there": (move(NAME, RECORD, to="dog"), NEW),
    "moved to a folder in a folder": (
        move(NAME, RECORD, to="cat/small"),
        {f"cat/small/{NAME}", f"cat/small/{RECORD}"},
    ),
    "moved beside the folders": (move(NAME, to="."), {NAME, f"cat/{RECORD}"}),
    "copied": (move(NAME, to="eel", copy=True), {*AS_IT_WAS, f"eel/{NAME}"}),
    "both copied": (
        move(NAME, RECORD, to="eel", copy=True),
        {*AS_IT_WAS, f"eel/{NAME}", f"eel/{RECORD}"},
    ),
    "the folder renamed": (
        lambda root: (root / "cat").rename(root / "eel"),
        {f"eel/{NAME}", f"eel/{RECORD}"},
    ),
    "deleted": (delete(NAME, RECORD), NEW),
    "the photo deleted": (delete(NAME), {*NEW, f"cat/{RECORD}"}),
    "the record deleted": (delete(RECORD), {f"cat/{NAME}"}),
    "a link in its place": (link, {f"cat/{NAME}", "mine.jpg"}),
    "put into a trash": (move(NAME, RECORD, to=".Trash-1000"), {*NEW, *(f".Trash-1000/{n}" for n in (NAME, RECORD))}),
    "a hidden file beside it": (
        lambda root: (root / "cat" / f"._{NAME}").write_bytes(b"1"),
        {*NEW, f"cat/._{NAME}"},
    ),
    "a record that ends early": (write_record("{"), AS_IT_WAS),
    "a record that is another thing": (write_record("[]"), AS_IT_WAS),
    "a deep record": (write_record("[" * 100_000), AS_IT_WAS),
    "a record of another class": (write_record(record_of("eel")), AS_IT_WAS),
    "a record of a number": (write_record(record_of(5)), AS_IT_WAS),
    "a record of a list": (write_record(record_of([*"cat"])), AS_IT_WAS),
    "a record of half a character": (write_record(record_of("\ud800")), AS_IT_WAS),
    "a record without reasons": (write_record(record_of("cat", None)), AS_IT_WAS),
    "a record of its class": (write_record(record_of("cat")), NEW),
}  # fmt: skip


@pytest.mark.parametrize(("act", "expected"), WHOSE.values(), ids=WHOSE)
def test_only_what_nobody_has_moved_follows_the_network(tmp_path: Path, act, expected) -> None:
    kept = kept_folder(tmp_path)
    assert kept.add(NAME, PHOTO, fields("cat")) == "kept"
    act(tmp_path)
    kept.delete_surplus()

    assert kept.add(NAME, PHOTO, fields("dog")) == "kept"
    assert files(tmp_path) == expected

    # Another server sees the same, and a third prediction changes no more.
    other = kept_folder(tmp_path)
    assert other.add(NAME, PHOTO, fields("dog")) == "kept"
    assert files(tmp_path) == expected


def test_a_photo_that_another_process_deletes_is_nobodys(tmp_path: Path, monkeypatch) -> None:
    kept = kept_folder(tmp_path)
    kept.add(NAME, PHOTO, fields("cat"))
    find = KeptFolder._find

    def find_first(folder: KeptFolder, name: str) -> list[Path]:
        found = find(folder, name)
        delete(NAME, RECORD)(tmp_path)
        return found

    monkeypatch.setattr(KeptFolder, "_find", find_first)
    assert kept.add(NAME, PHOTO, fields("dog")) == "kept"
    assert files(tmp_path) == NEW


# Whether the photo was of the sample at first, and is when it comes again; and its name then.
AGAIN = {
    (False, False): NAME,
    (False, True): name_of(1, sample=True),
    (True, False): name_of(1, sample=True),
    (True, True): name_of(1, sample=True),
}


@pytest.mark.parametrize("label", ["cat", "dog"])
@pytest.mark.parametrize(("samples", "name"), AGAIN.items())
def test_a_photo_is_kept_once_and_what_was_drawn_once_stays_in_the_sample(
    tmp_path: Path, label: str, samples, name: str
) -> None:
    for is_sample, predicted in zip(samples, ("cat", label), strict=True):
        # keep_sample is another one in the second run of the server
        new = kept_folder(tmp_path)
        assert new.add(name_of(1, sample=is_sample), PHOTO, fields(predicted)) == "kept"
    assert files(tmp_path) == {f"{label}/{name}", f"{label}/{Path(name).stem}.json"}


def test_what_older_versions_kept_twice_becomes_one_photo_of_the_sample(tmp_path: Path) -> None:
    kept = kept_folder(tmp_path / "kept")
    kept.add(name_of(1, sample=True), PHOTO, fields("eel", suggested="fox"))
    (tmp_path / "kept" / "eel").rename(tmp_path / "eel")
    kept.add(NAME, PHOTO, fields("cat"))
    (tmp_path / "eel").rename(tmp_path / "kept" / "eel")

    kept.add(NAME, PHOTO, fields("dog"))
    name = name_of(1, sample=True)
    record = f"dog/{Path(name).stem}.json"
    assert files(tmp_path / "kept") == {f"dog/{name}", record}
    assert read(tmp_path / "kept" / record)["suggested"] == "fox"


@pytest.mark.parametrize("samples", AGAIN)
def test_a_person_moves_a_photo_under_either_name(tmp_path: Path, samples) -> None:
    first, second = (name_of(1, sample=is_sample) for is_sample in samples)
    kept = kept_folder(tmp_path)
    kept.add(first, PHOTO, fields("cat"))
    move(first, to="eel")(tmp_path)
    kept.add(second, PHOTO, fields("dog"))
    assert files(tmp_path) == {f"eel/{first}", f"cat/{Path(first).stem}.json"}


# The reasons and suggestions of a photo that comes twice, and what its record says then.
SUGGESTIONS = [
    ("dog", "eel", "eel"),
    ("dog", None, "dog"),
    (None, "eel", "eel"),
    (None, None, None),
]
REASONS = [
    (["low margin"], ["low margin"], "low margin"),
    (["sample"], ["reported"], "sample, reported"),
    (["sample", "unknown"], ["unknown", "low margin"], "sample, unknown, low margin"),
]  # fmt: skip


@pytest.mark.parametrize("label", ["cat", "dog"])
@pytest.mark.parametrize(("first", "second", "expected"), SUGGESTIONS)
def test_the_later_suggestion_counts(tmp_path: Path, label, first, second, expected) -> None:
    kept = kept_folder(tmp_path)
    kept.add(NAME, PHOTO, fields("cat", suggested=first))
    kept.add(NAME, PHOTO, fields(label, suggested=second))
    assert read(tmp_path / label / RECORD)["suggested"] == expected


@pytest.mark.parametrize("label", ["cat", "dog"])
@pytest.mark.parametrize(("first", "second", "expected"), REASONS)
def test_a_record_has_the_reasons_of_both(
    tmp_path: Path, label, first, second, expected
) -> None:
    kept = kept_folder(tmp_path)
    kept.add(NAME, PHOTO, fields("cat", reasons=first))
    kept.add(NAME, PHOTO, fields(label, reasons=second))
    assert read(tmp_path / label / RECORD)["reasons"] == expected


# What the bundle tells, the classes that it predicts, and the classes that are proposed to a person.
PROPOSED = {
    "known": (True, ["cat"], ["cat"]),
    "no threshold": (None, ["cat"], ["cat"]),
    "unknown": (False, ["cat"], [NOT_OURS]),
    "several": (None, ["cat", "dog"], ["cat", "dog"]),
    "none": (None, [], None),
    "none and unknown": (False, [], [NOT_OURS]),
}


@pytest.mark.parametrize(("known", "choices", "expected"), PROPOSED.values(), ids=PROPOSED)
def test_a_person_is_proposed_what_the_bundle_predicts(
    tmp_path: Path, known, choices, expected
) -> None:
    kept_folder(tmp_path).add(NAME, PHOTO, fields(known=known, choices=choices))
    (prediction,) = json.loads((tmp_path / "cat" / RECORD).read_text())["predictions"]
    found = [result["value"]["choices"] for result in prediction["result"]]
    assert found == ([] if expected is None else [expected])


# Photos in their order: o, or s of the sample; O and S were moved by a person. Then the room, in photos,
# and which remain.
ROOM = {
    "all fit": ("oso", 3, [0, 1, 2]),
    "the oldest": ("oooo", 3, [1, 2, 3]),
    "a sample of less than half": ("soooo", 3, [0, 3, 4]),
    "a sample of half": ("ssssoooo", 4, [2, 3, 6, 7]),
    "only a sample": ("ssss", 2, [2, 3]),
    "not the moved one": ("Oooo", 3, [0, 2, 3]),
    "not the moved one of the sample": ("Ssss", 3, [0, 2, 3]),
    "neither of both": ("OSoso", 3, [0, 1, 3]),
    "all that can": ("OOOo", 3, [0, 1, 2]),
    "nothing else is left": ("OOOOo", 3, [0, 1, 2, 3]),
}


def keep_all(root: Path, photos: str) -> None:
    large = kept_folder(root, 100)
    for number, kind in enumerate(photos):
        name = name_of(number, sample=kind in "sS")
        large.add(name, PHOTO, fields())
        os.utime(root / "cat" / name, (time.time() - 100 + number,) * 2)
        if kind in "OS":
            move(name, f"{Path(name).stem}.json", to="eel")(root)


@pytest.mark.parametrize(("photos", "room", "remaining"), ROOM.values(), ids=ROOM)
def test_the_oldest_that_nobody_has_moved_makes_room(
    tmp_path: Path, photos: str, room: int, remaining: list[int]
) -> None:
    keep_all(tmp_path, photos)
    small = kept_folder(tmp_path, room)
    if len(remaining) <= room:
        small.delete_surplus()
    else:
        with pytest.raises(OSError, match="keep_bytes"):
            small.delete_surplus()
    assert numbers(tmp_path) == remaining


def test_what_another_process_deletes_makes_room(tmp_path: Path, monkeypatch) -> None:
    keep_all(tmp_path, "ooooo")
    first, second = kept_folder(tmp_path, 3), kept_folder(tmp_path, 3)
    find = KeptFolder._list

    def list_first(folder: KeptFolder):
        found = [*find(folder)]
        if folder is first:
            second.delete_surplus()
        return iter(found)

    monkeypatch.setattr(KeptFolder, "_list", list_first)
    first.delete_surplus()
    assert numbers(tmp_path) == [2, 3, 4]


@pytest.mark.parametrize("kind", "osOS")
def test_every_photo_expires(tmp_path: Path, kind: str) -> None:
    keep_all(tmp_path, kind)
    age = time.time() - kept_folder(tmp_path, days=30)._max_seconds
    (photo,) = tmp_path.rglob("*.jpg")
    for seconds, remaining in ((60, [0]), (-60, [])):
        os.utime(photo, (age + seconds,) * 2)
        kept_folder(tmp_path, days=30).delete_surplus()
        assert numbers(tmp_path) == remaining


def test_moved_photos_that_fill_the_folder_stop_keeping_until_they_leave(
    tmp_path: Path, monkeypatch
) -> None:
    keep_all(tmp_path, "OOOO")
    small = kept_folder(tmp_path, 3)
    for number in (4, 5):
        with pytest.raises(OSError, match="keep_bytes"):
            small.add(name_of(number), PHOTO, fields())
        monkeypatch.setattr(KeptFolder, "_list", None)  # no second look is needed
    assert numbers(tmp_path) == [0, 1, 2, 3]

    monkeypatch.undo()
    (tmp_path / "eel").rename(tmp_path.parent / f"{tmp_path.name}-photos")
    small.delete_surplus()
    assert small.add(name_of(6), PHOTO, fields()) == "kept"
    assert numbers(tmp_path) == [6]


# Bytes of the folder, and what becomes of a photo that takes nine tenths of 40,960 with its record.
SIZES = {"below": (40_970, "kept"), "at": (40_960, "kept"), "above": (40_950, "dropped")}


@pytest.mark.parametrize(("limit", "expected"), SIZES.values(), ids=SIZES)
def test_a_photo_larger_than_the_room_is_dropped(tmp_path: Path, limit: int, expected) -> None:
    assert KeptFolder(tmp_path, limit, 86_400.0).add(NAME, PHOTO * 8, fields()) == expected


# Two photos of the sample and two others, a folder with room for three; half of it, in photos.
SHARES = {"below": (2.1, [0, 1, 3]), "at": (2.0, [0, 1, 3]), "above": (1.9, [1, 2, 3])}


@pytest.mark.parametrize(("half", "remaining"), SHARES.values(), ids=SHARES)
def test_a_sample_of_more_than_half_makes_room(tmp_path: Path, half: float, remaining) -> None:
    keep_all(tmp_path, "ssoo")
    KeptFolder(tmp_path, round(2 * half * PAIR), 86_400.0).delete_surplus()
    assert numbers(tmp_path) == remaining


@pytest.mark.parametrize("name", ["lost+found", "cat", "cat/deep"])
def test_a_folder_that_cannot_be_read_is_left_out_with_one_warning(
    tmp_path: Path, monkeypatch, caplog, name: str
) -> None:
    keep_all(tmp_path, "ooooO")
    (tmp_path / name).mkdir(exist_ok=True)
    scandir = os.scandir

    def refuse(path: str | Path):
        if Path(path) == tmp_path / name:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    caplog.set_level(logging.WARNING, "sopdeploy.keep")
    kept = kept_folder(tmp_path, 3)
    for _ in range(3):
        kept.delete_surplus()
        assert kept.add(name_of(9), PHOTO, fields("gnu")) == "kept"
    assert len(caplog.records) == 1
    assert {4, 9} <= {*numbers(tmp_path)}


def test_only_the_class_whose_folder_cannot_be_written_is_not_kept(
    tmp_path: Path, monkeypatch, caplog
) -> None:
    keep_all(tmp_path, "o")
    monkeypatch.setattr(os, "access", lambda path, _mode: Path(path) != tmp_path / "cat")
    caplog.set_level(logging.WARNING, "sopdeploy.keep")
    kept = kept_folder(tmp_path)
    for number, label, result in (
        (1, "cat", "failed"),
        (2, "dog", "kept"),
        (3, "cat", "failed"),
    ):
        assert kept.add(name_of(number), PHOTO, fields(label)) == result
    assert len(caplog.records) == 1
    assert numbers(tmp_path) == [0, 2]


PAGE = '<View><Header value="Look"/><Choices name="kind" hotkeys="1"><!-- mine -->{}</Choices></View>'
MISSING = '<Choice value="a"/><Choice value="b"/>'

# What a person made of the description of the classes, what it must contain then, and the warnings.
CONFIGS = {
    "nothing": (None, ['choice="single-radio"', f'value="{NOT_OURS}"'], 0),
    "their own page": (PAGE.format(MISSING), ['"Look"', "hotkeys", "<!-- mine -->", '"b"'], 0),
    "no classes": (PAGE.format(""), ['"Look"', f'value="{NOT_OURS}"'], 0),
    "no choices": ("<View/>", ["<View/>"], 1),
    "a mistake": ("<View><Choices>", ["<View><Choices>"], 1),
    "an empty file": ("", [""], 1),
}


@pytest.mark.parametrize(("content", "parts", "warnings"), CONFIGS.values(), ids=CONFIGS)
def test_what_a_person_writes_into_the_description_stays(
    tmp_path: Path, bundle, caplog, content, parts: list[str], warnings: int
) -> None:
    file = tmp_path / LABEL_CONFIG
    kept = kept_folder(tmp_path)
    if content is not None:
        file.write_text(content)
    for _ in range(2):
        kept.list_classes(bundle)
        kept.delete_surplus()

    found = file.read_text()
    assert all(part in found for part in parts)
    assert len(caplog.records) == warnings
    if warnings:
        assert found == content
    else:
        assert all(found.count(f'value="{label}"') == 1 for label in bundle.labels)


def test_a_bundle_with_several_classes_per_image_lets_a_person_choose_several(
    tmp_path: Path, bundle
) -> None:
    several = deciding(bundle, Decision(activation="sigmoid", thresholds=(0.5,) * 7))
    kept_folder(tmp_path).list_classes(several)
    assert 'choice="multiple"' in (tmp_path / LABEL_CONFIG).read_text()


# Seconds after a burst, and how many of a thousand that come at once are kept then.
BURSTS = {
    "none": (0.0, 0),
    "less than a pause": (0.49, 0),
    "a pause": (0.5, 1),
    "two pauses": (1.0, 2),
    "a minute": (60.0, 120),
    "a day": (86_400.0, 121),
}


@pytest.mark.parametrize(("quiet", "expected"), BURSTS.values(), ids=BURSTS)
def test_as_many_come_at_once_as_the_time_before_allows(
    tmp_path: Path, monkeypatch, quiet: float, expected: int
) -> None:
    now = [1000.0]
    monkeypatch.setattr(keep.time, "monotonic", lambda: now[0])
    keeper = Keeper(tmp_path, Settings(), Metrics(), copy=lambda image: (image, ".jpg"))
    at_start = sum(keeper._is_in_time() for _ in range(1000))
    assert at_start == 121
    now[0] += quiet
    assert sum(keeper._is_in_time() for _ in range(1000)) == expected
