"""`label` moves photos that Label Studio has labelled, by the CSV file that it exports."""

from pathlib import Path

import pytest

from sopdeploy.data.photos.kept import NOT_OURS, image_id
from sopdeploy.errors import DataError
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
