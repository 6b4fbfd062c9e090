"""Labels as moves between folders, and the order in which photographs are shown."""

import errno
import os
import stat
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import pytest

from sopdeploy.errors import ConfigError, DataError
from sopdeploy.files import LOCK
from sopdeploy.photos.files import kept_id
from sopdeploy_service.labelling.kept import read_labelled
from sopdeploy_service.labelling.label.class_names import check_class_name
from sopdeploy_service.labelling.label.folders import (
    LEASE_SECONDS,
    GoneError,
    LabelFolders,
)
from tests.service.labelling.label.conftest import LABELS, files_below


@pytest.mark.parametrize(
    ("reasons", "name", "folder", "end"),
    [
        (("low_margin",), "hat", "photos/hat", ""),
        (("unknown", "low_margin"), "scarf", "photos/scarf", ""),
        (("sample",), "hat", "photos-held-out/hat", "-sample"),
        (("unknown", "sample"), "scarf", "photos-held-out/scarf", "-sample"),
        (("unknown",), None, "photos-unknown", ""),
        (("sample",), None, "photos-unknown/sample", "-sample"),
    ],
)
def test_a_label_moves_the_photograph_to_the_folder_of_its_kind(
    tmp_path, keep, open_folders, reasons, name, folder, end
):
    one = keep(1, reasons=reasons)
    content = (tmp_path / "kept" / f"{one}.jpg").read_bytes()
    folders = open_folders()
    folders.label(one, name)
    assert files_below(tmp_path) == {f"{folder}/{one}{end}.jpg"}
    assert (tmp_path / folder / f"{one}{end}.jpg").read_bytes() == content
    assert not folders.waiting


@pytest.mark.parametrize(("name", "folder"), [("hat", "photos/hat"), (None, "photos-unknown")])
def test_the_half_of_the_sample_that_trains_goes_to_the_photographs_under_its_name(
    tmp_path, keep, open_folders, name, folder
) -> None:
    one = keep(1, reasons=("sample",), decides=False)
    kept = files_below(tmp_path)
    folders = open_folders()
    folders.label(one, name)
    assert files_below(tmp_path) == {f"{folder}/{one}-sample.jpg"}

    # Its label can be corrected and undone, and it is not asked for again.
    folders.read()
    assert not folders.waiting
    [labelled] = folders.labelled().values()
    folders.correct(labelled, "scarf")
    assert files_below(tmp_path) == {f"photos/scarf/{one}-sample.jpg"}
    [corrected] = folders.labelled().values()
    folders.correct(corrected, name)
    folders.undo()
    assert files_below(tmp_path) == kept


MORE = "; no photo that decides is left, and a larger keep_sample keeps more"


@pytest.mark.parametrize(
    ("earlier", "waiting", "said"),
    [
        (3, (), f"4 of the 30 that decide, 0 that train, from 1 day{MORE}"),
        (3, ("low_margin",), f"4 of the 30 that decide, 0 that train, from 1 day{MORE}"),
        (3, ("sample",), "4 of the 30 that decide, 0 that train, from 1 day"),
        (40, (), "41 that decide, 0 that train, from 1 day"),
    ],
)
def test_the_progress_counts_what_decides_also_of_earlier_sessions(
    tmp_path, keep, open_folders, earlier, waiting, said
) -> None:
    for number in range(earlier):
        path = tmp_path / "photos-held-out" / "hat" / f"{number:032x}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    one = keep(100, reasons=("sample",))
    if waiting:
        keep(101, reasons=waiting)

    folders = open_folders()
    folders.label(one, "hat")
    assert folders.progress() == said


def test_what_shows_the_same_as_one_that_decides_is_not_trained_on(
    tmp_path, keep, open_folders
) -> None:
    """Also after that one has its label: copies at any time, and frames of an object in a minute."""
    deciding = keep(1, reasons=("sample",), near_hash="00" * 8)
    copy = keep(2, near_hash="00" * 7 + "01", time=datetime(2026, 11, 25, tzinfo=UTC))
    frame = keep(3, near_hash="00" * 7 + "ff")
    alike = keep(4, near_hash="00" * 7 + "0f", time=datetime(2026, 11, 24, tzinfo=UTC))
    folders = open_folders()
    for one in (deciding, copy, frame, alike):
        folders.label(one, "hat")
        folders.read()
    # Only the first one is of the sample, which its name says.
    names = (f"{deciding}-sample", copy, frame)
    held_out = {f"photos-held-out/hat/{name}.jpg" for name in names}
    assert files_below(tmp_path) == {*held_out, f"photos/hat/{alike}.jpg"}


def test_the_server_and_later_sessions_find_the_record_of_a_label(
    tmp_path, keep, open_folders
) -> None:
    one = keep(1, near_hash="00" * 8)
    open_folders().label(one, "hat")
    [record] = read_labelled(tmp_path / "kept")
    assert record.near_hash == "00" * 8

    # A copy of it is asked for last.
    copy = keep(2, near_hash="00" * 8, time=datetime(2026, 11, 25, tzinfo=UTC))
    other = keep(3, time=datetime(2026, 11, 20, tzinfo=UTC))
    assert list(open_folders().waiting) == [other, copy]


def test_undo_restores_photographs_records_and_folders_in_reverse_order(
    tmp_path, keep, open_folders
):
    for number in range(4):
        keep(number)
    before = {path: (tmp_path / path).read_bytes() for path in files_below(tmp_path)}
    folders = open_folders()
    order = list(folders.waiting)
    folders.label(order[0], "hat")
    folders.skip(order[1])
    folders.label(order[2], None)
    assert list(open_folders().waiting) == order[3:]  # after a restart
    folders.label(order[3], "hat")
    for left in (order[3:], order[2:], order[1:], order):
        folders.undo()
        assert list(folders.waiting) == left
    assert {path: (tmp_path / path).read_bytes() for path in files_below(tmp_path)} == before
    assert not list((tmp_path / "photos").iterdir())
    assert not (tmp_path / "photos-unknown").exists()
    with pytest.raises(GoneError, match="nothing to undo"):
        folders.undo()


def test_a_class_folder_of_the_user_stays_after_an_undo_and_a_failed_move(
    tmp_path, keep, open_folders
) -> None:
    one, gone = keep(1), keep(2)
    (tmp_path / "photos" / "hat").mkdir(parents=True)
    folders = open_folders()
    folders.label(one, "hat")
    folders.undo()
    (tmp_path / "kept" / f"{gone}.jpg").unlink()
    with pytest.raises(GoneError):
        folders.label(gone, "hat")
    assert (tmp_path / "photos" / "hat").is_dir()


def test_an_undo_that_is_interrupted_leaves_no_record_without_its_photograph(
    tmp_path, keep, open_folders, monkeypatch
) -> None:
    """A server that starts would delete it."""
    one, folders = keep(1), open_folders()
    folders.label(one, "hat")

    def interrupt(*_args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as interrupted:
        interrupted.setattr("sopdeploy_service.labelling.label.folders._move", interrupt)
        with pytest.raises(KeyboardInterrupt):
            folders.undo()
    assert not (tmp_path / "kept" / f"{one}.json").exists()
    folders.undo()
    assert files_below(tmp_path) == {f"kept/{one}.jpg", f"kept/{one}.json"}


@pytest.mark.parametrize(
    "stop", ["before the record is renamed", "after a copy to another file system"]
)
def test_a_label_that_was_interrupted_is_complete_or_did_not_happen(
    tmp_path, keep, open_folders, monkeypatch, stop
):
    one = keep(1)
    folders = open_folders()

    def interrupt(*_args, **_options):
        raise KeyboardInterrupt

    if stop == "before the record is renamed":
        monkeypatch.setattr(LabelFolders, "_note_change", interrupt)
    else:
        other_file_system(monkeypatch)
        monkeypatch.setattr("shutil.copyfile", interrupt)
    with pytest.raises(KeyboardInterrupt):
        folders.label(one, "hat")
    monkeypatch.undo()
    waiting = set(open_folders().waiting)
    labelled = (tmp_path / "photos" / "hat" / f"{one}.jpg").is_file()
    assert waiting == (set() if labelled else {one})
    assert labelled is (stop == "before the record is renamed")


def other_file_system(monkeypatch) -> None:
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.parent != Path(target).parent:
            raise OSError(errno.EXDEV, "other file system")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)


def test_labels_and_undo_work_between_file_systems(tmp_path, keep, open_folders, monkeypatch):
    one = keep(1)
    (tmp_path / "kept" / f"{one}.jpg").chmod(0o600)
    os.utime(tmp_path / "kept" / f"{one}.jpg", (1000.0, 1000.0))
    other_file_system(monkeypatch)
    given = []  # if root labels, the files stay those of the server's user
    monkeypatch.setattr(os, "chown", lambda _file, *ids, **_options: given.append(ids))
    folders = open_folders()
    folders.label(one, "hat")
    assert files_below(tmp_path) == {f"photos/hat/{one}.jpg"}
    status = (tmp_path / "photos" / "hat" / f"{one}.jpg").stat()
    assert (stat.S_IMODE(status.st_mode), status.st_mtime) == (0o600, 1000.0)
    folders.undo()
    assert files_below(tmp_path) == {f"kept/{one}.jpg", f"kept/{one}.json"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "kept").iterdir()} == {
        0o600
    }
    status = (tmp_path / "kept").stat()
    assert given == 3 * [(status.st_uid, status.st_gid)]  # two moves and the record


def test_an_undo_on_a_full_disk_changes_nothing_and_can_follow(
    tmp_path, keep, open_folders, monkeypatch
):
    one, folders = keep(1), open_folders()
    before = files_below(tmp_path)
    folders.label(one, "hat")

    def fail(*_args: object, **_options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(Path, "write_text", fail)
        with pytest.raises(OSError, match="No space"):
            folders.undo()

    assert files_below(tmp_path) == {f"photos/hat/{one}.jpg"}
    folders.undo()
    assert (files_below(tmp_path), list(folders.waiting)) == (before, [one])


def test_a_photograph_that_another_process_has_labelled_or_deleted_is_refused(
    tmp_path, keep, open_folders
):
    labelled, deleted, unseen, skipped, other = (keep(number) for number in range(5))
    folders = open_folders()
    label = partial(folders.label, name="shoes")
    folders.skip(skipped)
    open_folders().label(labelled, "hat")
    for one in (deleted, unseen, skipped):
        (tmp_path / "kept" / f"{one}.jpg").unlink()
    for one, step in ((labelled, label), (deleted, label), (unseen, folders.skip)):
        with pytest.raises(GoneError, match="has a label already or is no longer kept"):
            step(one)
    with pytest.raises(GoneError, match="no longer there, so the last step cannot be undone"):
        folders.undo()
    with pytest.raises(GoneError, match="nothing to undo"):  # the step is forgotten
        folders.undo()
    assert not (tmp_path / "photos" / "shoes").exists()
    assert list(folders.waiting) == [other]


@pytest.mark.parametrize(
    "folder", ["photos/hat", "photos-held-out/hat", "photos-unknown", "photos-unknown/sample"]
)
def test_a_photograph_that_was_kept_again_is_not_asked_for_again(
    tmp_path, keep, open_folders, folder
):
    labelled, other = keep(1), keep(2)
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / f"{labelled}.jpg").write_bytes(b"")
    assert list(open_folders().waiting) == [other]


def test_sessions_get_different_photographs_until_a_lease_ends(
    keep, open_folders, monkeypatch
) -> None:
    for number in range(5):
        keep(number)
    folders = open_folders()
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    first = folders.upcoming("one", 2)
    assert first == list(folders.waiting)[:2]
    assert folders.upcoming("two", 2) == list(folders.waiting)[2:4]
    assert folders.upcoming("one", 2) == first
    assert folders.upcoming("three", 2) == list(folders.waiting)[4:]
    assert folders.upcoming("four", 2) == first  # none is free
    now += LEASE_SECONDS + 1
    assert folders.upcoming("two", 2) == first


def test_a_full_disk_names_the_folder(tmp_path, keep, open_folders, monkeypatch) -> None:
    photograph = keep(1)
    folders = open_folders()

    def fail(error: int) -> Callable[..., None]:
        def raise_error(*_: object) -> None:
            raise OSError(error, os.strerror(error))

        return raise_error

    monkeypatch.setattr(Path, "rename", fail(errno.EXDEV))
    monkeypatch.setattr("shutil.copyfile", fail(errno.ENOSPC))
    with pytest.raises(OSError, match="No space left on device") as raised:
        folders.label(photograph, "hat")
    assert raised.value.filename == str(tmp_path / "photos" / "hat")
    assert photograph in folders.waiting


def test_classes_are_those_of_the_bundles_and_of_the_folders(tmp_path, keep, open_folders):
    keep(1)
    keep(2, [0.0, 1.0], labels=["coat", "hat"])
    for folder in (
        "photos/scarf",
        "photos/.hidden",
        "photos-held-out/belt",
        "photos-unknown/none",
    ):
        (tmp_path / folder).mkdir(parents=True)
    assert open_folders().classes() == sorted([*LABELS, "coat", "scarf", "belt"])


def test_a_class_whose_folder_and_bundle_encode_its_name_differently_is_one(
    tmp_path, keep, open_folders
):
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    one = keep(1, [0.0, 1.0], labels=[composed, "hat"])
    (tmp_path / "photos" / decomposed).mkdir(parents=True)
    folders = open_folders()
    assert folders.classes() == [composed, "hat"]
    folders.label(one, composed)
    assert files_below(tmp_path) == {f"photos/{decomposed}/{one}.jpg"}


INVALID = {
    **dict.fromkeys(("", "  ", "a" * 101, "é" * 51), "1 to 100 bytes"),
    **dict.fromkeys(
        ("a/b", "../hat", "a\\b", "/etc", "a\nb", "a\x00b", "C:", "\u202etah"), "leave out"
    ),
    **dict.fromkeys(("a\x7f", "<img src=x>", "a|b", "a\ue000"), "leave out"),
    **dict.fromkeys(
        ("\u3164", "\u115f", "hat\u3164", "\u2800", "hat\u200b", "\uffa0", "\U000e0041"),
        "leave out",
    ),
    **dict.fromkeys(("\u0301", "\u200d", "\ufe0f"), "empty or invisible"),
    **dict.fromkeys((".", "..", ".hat", "hat.", "__MACOSX", "@eaDir"), "hidden"),
    **dict.fromkeys(("train", "Test", "val", "validation_set"), "a part of the data"),
    **dict.fromkeys(
        ("Hat", "HAT", "\N{FULLWIDTH LATIN SMALL LETTER H}at"), "use the class 'hat'"
    ),
}


def test_names_that_can_name_a_class_are_normalized():
    names = {
        "hat": "hat",
        "  red hat ": "red hat",
        "e\u0301toile": "\u00e9toile",
        "t-shirt": "t-shirt",
    }
    assert {name: check_class_name(name, list(LABELS)) for name in names} == names
    assert check_class_name("cafe\u0301", ["caf\u00e9"]) == "caf\u00e9"
    existing = ['say "ok"', "x" * 200, "hat "]
    assert [check_class_name(name, existing, existing) for name in existing] == existing


def test_names_that_cannot_name_a_class_are_refused_and_change_nothing(
    tmp_path, keep, open_folders
):
    one = keep(1)
    before, folders = files_below(tmp_path), open_folders()
    for name, message in INVALID.items():
        with pytest.raises(ConfigError, match=message) as caught:
            folders.label(one, name)
        assert "\n" not in str(caught.value)
    assert files_below(tmp_path) == before
    assert not (tmp_path / "photos").exists()


def test_folders_that_cannot_be_used_are_refused(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        LabelFolders(tmp_path / "none", tmp_path / "photos")
    (tmp_path / "classes" / "hat").mkdir(parents=True)
    with pytest.raises(DataError, match=r"holds no kept photos, but folders \(hat\); give"):
        LabelFolders(tmp_path / "classes", tmp_path / "photos")

    # A server writes to this one, which is empty so far.
    (tmp_path / "classes" / "hat" / LOCK).touch()
    assert not LabelFolders(tmp_path / "classes", tmp_path / "photos").waiting

    (tmp_path / "kept").mkdir()
    (tmp_path / "photos" / "train" / "hat").mkdir(parents=True)
    with pytest.raises(DataError, match=r"in the folder train; give .*photos/train"):
        LabelFolders(tmp_path / "kept", tmp_path / "photos")
    (tmp_path / "scenes").mkdir()
    (tmp_path / "scenes" / "labels.csv").write_text(
        "file,classes\n"
    )  # `train` would read no class folder
    with pytest.raises(
        DataError, match=r"reads its classes from labels.csv.*; give another folder"
    ):
        LabelFolders(tmp_path / "kept", tmp_path / "scenes")
    (tmp_path / "scenes" / "labels.csv").rename(tmp_path / "scenes" / "labels.xlsx")
    with pytest.raises(
        DataError, match=r"labels.xlsx: not read; save it as labels.csv"
    ):  # as `train` does
        LabelFolders(tmp_path / "kept", tmp_path / "scenes")


@pytest.mark.parametrize(
    ("file", "kind"),
    [
        ("manifest.json", "a bundle"),
        ("best.pt", "a run"),
        ("tiny-1/manifest.json", "a folder of bundles"),
        ("photos-1/best.pt", "a folder of runs"),
    ],
)
def test_golden_images_and_pictures_of_a_run_are_not_labelled(tmp_path, file, kind) -> None:
    path = tmp_path / "given" / file
    path.parent.mkdir(parents=True)
    path.touch()
    path.with_name("golden-0.jpg").touch()
    with pytest.raises(DataError, match=f"given: {kind}, not a folder of photos; give"):
        LabelFolders(tmp_path / "given", tmp_path / "photos")


def test_links_and_foreign_files_in_the_kept_folder_are_not_shown(tmp_path, keep, open_folders):
    one, link = keep(1), keep(2)
    image = (tmp_path / "kept" / f"{link}.jpg").rename(tmp_path / "secret.jpg")
    (tmp_path / "kept" / f"{link}.jpg").symlink_to(image)
    (tmp_path / "kept" / "notes.json").write_text("{}")
    assert list(open_folders().waiting) == [one]


def test_labels_of_earlier_sessions_are_corrected_and_the_held_out_stay_so(
    tmp_path, keep, open_folders
):
    trained, sampled, foreign = keep(1), keep(2, reasons=("sample",)), keep(3)
    first = open_folders()
    for one, name in ((trained, "hat"), (sampled, "hat"), (foreign, None)):
        first.label(one, name)
    later = open_folders()
    names = {kept_id(photo.path.name): (one, photo) for one, photo in later.labelled().items()}
    assert {one: photo.name for one, (_, photo) in names.items()} == {
        trained: "hat",
        sampled: "hat",
        foreign: None,
    }
    for one, name in ((trained, "t-shirt"), (sampled, None), (foreign, "a scarf ")):
        later.correct(names[one][1], name)
    assert files_below(tmp_path) == {
        f"photos/t-shirt/{trained}.jpg",
        f"photos-unknown/sample/{sampled}-sample.jpg",
        f"photos/a scarf/{foreign}.jpg",
    }
    assert not (tmp_path / "photos" / "hat").exists()
    with pytest.raises(GoneError, match="no longer there"):
        later.correct(names[trained][1], "shoes")
    with pytest.raises(ConfigError, match="T-Shirt"):
        later.correct(next(iter(later.labelled().values())), "T-Shirt")


def test_a_suggestion_in_other_letters_is_the_class_and_no_class_of_other_photographs(
    keep, open_folders
):
    one = keep(1, reasons=("reported",), suggested=" T-Shirt")
    new = keep(2, reasons=("reported",), suggested="a scarf")
    folders = open_folders()
    assert (folders.suggestion(one), folders.suggestion(new)) == ("t-shirt", "a scarf")
    assert "a scarf" not in folders.classes()
