"""`label` moves photos that Label Studio has labelled, by the CSV file that it exports."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from sopdeploy.data.photos.kept import NOT_OURS, image_id
from sopdeploy.errors import DataError
from sopdeploy_commands.app import app
from sopdeploy_commands.label import label

NAMES = [f"{image_id(b'%d' % number)}{'-sample' * (number % 2)}.jpg" for number in range(6)]


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Six photos that a server has kept as cats, with their records."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kept" / "big cat").mkdir(parents=True)
    for name in NAMES:
        photo = tmp_path / "kept" / "big cat" / name
        photo.write_bytes(name.encode())
        photo.with_suffix(".json").write_text("{}")
    return Path("kept")


def export(**labels: str) -> Path:
    """An export of Label Studio with *labels* by the numbers of the photos, such as `_1="dog"`."""
    rows = [
        f'3,1,"{text}",2026-11-30T12:00:00Z,{number},'
        f'"/data/local-files/?d=kept/big%20cat/{NAMES[int(number[1:])]}",1.5,"sample, unknown"'
        for number, text in labels.items()
    ]
    file = Path("project-1.csv")
    heading = "annotation_id,annotator,class,created_at,id,image,lead_time,reasons"
    file.write_text("\n".join([heading, *rows]))
    return file


def files(folder: str) -> dict[str, str]:
    return {
        path.name: path.parent.relative_to(folder).as_posix()
        for path in Path(folder).rglob("*")
        if path.is_file()
    }


def test_photos_move_to_the_folders_of_their_labels(kept: Path) -> None:
    labels = {"_0": "dog", "_1": "Ähre", "_2": NOT_OURS, "_3": "", "_4": "dog"}
    moved = label(export(**labels), kept)
    assert moved.moved == {"photos/dog": 2, "photos/Ähre": 1, "photos-unknown": 1}
    assert moved.missing == 0
    assert files("photos") == {NAMES[0]: "dog", NAMES[1]: "Ähre", NAMES[4]: "dog"}
    assert files("photos-unknown") == {NAMES[2]: "."}
    assert len(files("kept")) == 4  # two photos without a label, and their records

    # A later export has the same labels, a corrected one, and one of a photo that is gone.
    (kept / "big cat" / NAMES[5]).unlink()
    moved = label(export(**labels | {"_1": "dog", "_5": "dog"}), kept)
    assert moved.moved == {"photos/dog": 1}
    assert moved.missing == 1
    assert set(files("photos").values()) == {"dog"}


WRONG = {
    "a path": "../../etc",
    "a hidden folder": ".git",
    "a folder above": "..",
    "several classes": '{""choices"": [""a"", ""b""]}',
    "no visible character": "\N{ZERO WIDTH SPACE}",
    "longer than the name of a folder": "é" * 128,
    "too long": "x" * 1001,
}


@pytest.mark.parametrize("text", WRONG.values(), ids=WRONG)
def test_nothing_moves_if_a_label_cannot_be_the_name_of_a_folder(kept: Path, text: str) -> None:
    before = files(".")

    with pytest.raises(DataError, match="line 3"):
        label(export(_0="dog", _1=text), kept)
    assert files(".") == before | {"project-1.csv": "."}


@pytest.mark.parametrize(
    "content", ["", "a,b\n1,2\n", "image,class\n", 'image,class\n"', "\xff"]
)
def test_a_file_that_is_not_an_export_is_an_error(kept: Path, content: str) -> None:
    Path("other.csv").write_bytes(content.encode("latin-1"))
    for path in ("other.csv", "absent.csv", "kept"):
        with pytest.raises(DataError):
            label(Path(path), kept)


def test_a_folder_that_is_missing_is_an_error(kept: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        label(export(_0="dog"), kept / "absent")


ID = image_id(b"1")
ONE, TWO = f"{ID}-sample.jpg", f"{image_id(b'2')}.jpg"
LOCAL = "/data/local-files/?d=kept/big%20cat/"

# Rows (image, class), and how many photos moved, have several labels, are not ours, or are in place.
ROWS = {
    "one": ([(LOCAL + ONE, "dog")], (1, 0, 0, 0)),
    "two that agree": ([(LOCAL + ONE, "dog"), (LOCAL + ONE, "dog")], (1, 0, 0, 0)),
    "two that disagree": ([(LOCAL + ONE, "dog"), (LOCAL + ONE, "eel")], (0, 1, 0, 0)),
    "one says none of ours": ([(LOCAL + ONE, "dog"), (LOCAL + ONE, NOT_OURS)], (0, 1, 0, 0)),
    "one of both is empty": ([(LOCAL + ONE, "dog"), (LOCAL + ONE, "")], (1, 0, 0, 0)),
    "kept under both names": (
        [(LOCAL + ONE, "dog"), (f"{LOCAL}{ID}.jpg", "eel")],
        (0, 1, 0, 0),
    ),
    "another photo": ([(LOCAL + ONE, "dog"), (LOCAL + TWO, "eel")], (2, 0, 0, 0)),
    "spaces": ([(LOCAL + ONE, " dog "), (LOCAL + ONE, "dog")], (1, 0, 0, 0)),
    "where it is": ([(LOCAL + ONE, "here")], (0, 0, 0, 1)),
    "uploaded": ([(f"/data/upload/3/1a2b3c4d-{ONE}", "dog")], (0, 0, 1, 0)),
    "another image": ([("/data/local-files/?d=kept/cat/a.jpg", "dog")], (0, 0, 1, 0)),
    "a record": ([(f"{LOCAL}{ID}-sample.json", "dog")], (0, 0, 1, 0)),
    "a copy of a person": ([(f"{LOCAL}{ID}-sample (1).jpg", "dog")], (0, 0, 1, 0)),
    "no image": ([("", "dog")], (0, 0, 1, 0)),
    "the folder itself": ([(f"/data/local-files/?d={ONE}", "dog")], (1, 0, 0, 0)),
    "a bucket": ([(f"s3://bucket/kept/cat/{ONE}", "dog")], (1, 0, 0, 0)),
    "a signed address": ([(f"https://host/kept/{ONE}?X-Sign=a.b%2Fc", "dog")], (1, 0, 0, 0)),
    "Windows": ([(f"/data/local-files/?d=kept%5Ccat%5C{ONE}", "dog")], (1, 0, 0, 0)),
    "nothing labelled": ([(LOCAL + ONE, "")], (0, 0, 0, 0)),
    "a link": ([(f"{LOCAL}{'c' * 32}.jpg", "dog")], (0, 0, 0, 0)),
}


@pytest.mark.parametrize(("rows", "expected"), ROWS.values(), ids=ROWS)
def test_each_row_is_counted_once(tmp_path: Path, rows, expected) -> None:
    here = tmp_path / "photos" / "here"
    here.mkdir(parents=True)
    (tmp_path / "kept" / "cat").mkdir(parents=True)
    (tmp_path / "kept" / "cat" / TWO).write_text("2")
    (tmp_path / "kept" / "cat" / f"{'c' * 32}.jpg").symlink_to(tmp_path / "secret")
    place = here if expected[3] else tmp_path / "kept" / "cat"
    (place / ONE).write_text("1")

    table = tmp_path / "export.csv"
    lines = [f'"{image}","{text}"' for image, text in rows]
    table.write_text("\n".join(["image,class", *lines]))
    found = label(table, tmp_path / "kept", photos=tmp_path / "photos")

    counts = (sum(found.moved.values()), len(found.conflicts), len(found.not_ours))
    assert (*counts, found.in_place) == expected
    assert found.rows == len(rows)
    if not expected[0]:
        assert (place / ONE).read_text() == "1"


def test_a_photo_stays_in_a_folder_of_its_class(kept: Path) -> None:
    place = Path("photos/dog/night")
    place.mkdir(parents=True)
    record = Path(NAMES[1]).with_suffix(".json").name
    for name in (NAMES[1], record):
        (kept / "big cat" / name).rename(place / name)
    found = label(export(_1="dog"), kept)
    assert (found.moved, found.in_place) == ({}, 1)

    # Kept again, and labelled again
    (kept / "big cat" / NAMES[1]).write_text("again")
    assert label(export(_1="dog"), kept).moved == {"photos/dog": 1}
    assert files("photos") == {NAMES[1]: "dog/night", record: "dog/night"}
    assert NAMES[1] not in files("kept")


@pytest.mark.parametrize(("text", "code"), [("dog", 0), ("", 1)])
def test_the_exit_code_tells_whether_anything_moved(kept: Path, text: str, code: int) -> None:
    result = CliRunner().invoke(app, ["label", str(export(_0=text)), str(kept)])
    assert result.exit_code == code


# Where copies of a photo are, and the label; then the files.
COPIES = {
    "labelled a second time": (["photos/hat/-sample", "kept/dress/-sample"], "shoe", "-sample"),
    "kept again": (["photos/shoe/-sample", "kept/dress/-sample"], "shoe", "-sample"),
    "in two classes": (["photos/hat/", "photos/dress/"], "shoe", ""),
    "drawn later": (["photos/hat/", "kept/dress/-sample"], "shoe", "-sample"),
    "drawn before": (["photos/hat/-sample", "kept/dress/"], "shoe", "-sample"),
    "drawn later, in place": (["photos/shoe/", "kept/dress/-sample"], "shoe", "-sample"),
    "twice in place": (["photos/shoe/", "photos/shoe/-sample"], "shoe", "-sample"),
    "unknown before": (["photos-unknown/-sample", "kept/hat/-sample"], "shoe", "-sample"),
}


@pytest.mark.parametrize(("places", "text", "mark"), COPIES.values(), ids=COPIES)
def test_a_photo_has_one_class(
    tmp_path: Path, monkeypatch, places, text: str, mark: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for place in ["kept/other/", *places]:
        folder, _, end = place.rpartition("/")
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / f"{ID if place in places else '0' * 32}{end}.jpg").write_text(place)
        (Path(folder) / f"{ID if place in places else '0' * 32}{end}.json").write_text("{}")
    Path("e.csv").write_text(f"image,class\n{LOCAL}{ONE},{text}\n")

    assert label(Path("e.csv"), Path("kept")).moved == {f"photos/{text}": 1}
    found = [*Path().rglob(f"{ID}*.jpg")]
    assert found == [Path("photos", text, f"{ID}{mark}.jpg")]
    assert found[0].read_text() in places
    assert not [*Path("kept").rglob(f"{ID}*")]

    again = label(Path("e.csv"), Path("kept"))
    assert (again.moved, again.in_place) == ({}, 1)
    assert [*Path().rglob(f"{ID}*.jpg")] == found


@pytest.mark.parametrize("photos", [".", "kept", "kept/.", "kept/photos"])
def test_folders_may_lie_in_each_other(kept: Path, photos: str) -> None:
    (kept / NAMES[1]).write_text("beside the folders")
    (kept / "big cat" / NAMES[1]).unlink()
    label(export(_1="dog"), kept, photos=Path(photos))
    assert (Path(photos) / "dog" / NAMES[1]).read_text() == "beside the folders"
