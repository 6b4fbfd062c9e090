"""`forget` deletes every copy of a photograph that it is told of, and nothing else."""

import hashlib
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from sopdeploy.errors import DataError
from sopdeploy_commands.app import app
from sopdeploy_commands.bulk.output import OutputFolder
from sopdeploy_commands.second_week.forget import forget
from tests.commands.bulk.conftest import OPTIONS, SETTINGS, classify
from tests.support.service import picture_bytes

BODY, OTHER = picture_bytes(), picture_bytes() + b"other"
ID, OTHER_ID = (hashlib.sha256(body).hexdigest()[:32] for body in (BODY, OTHER))
FILES = {  # a kept copy has other bytes than the file that was sent
    f"kept/{ID}.jpg": b"copy", f"kept/{ID}.json": b"{}", f"kept/{ID}.skipped": b"",
    f"kept/0/{ID}.png": b"copy", f"photos/hat/{ID}.jpg": b"copy",
    "photos/hat/mine.jpg": BODY, "photos/shoes/sent.JPG": OTHER,
    f"kept/{OTHER_ID}.jpg": b"other", f"kept/{OTHER_ID}.json": b"{}", "photos/notes.json": b"{}",
}  # fmt: skip
OF_BODY = {name for name in FILES if ID in name or name == "photos/hat/mine.jpg"}


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    monkeypatch.chdir(tmp_path)
    for name, content in FILES.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(content)
    Path("sent.jpg").write_bytes(BODY)
    return [Path("kept"), Path("photos")]


def remaining() -> set[str]:
    return {str(path) for folder in ("kept", "photos") for path in Path(folder).rglob("*") if path.is_file()}


CASES = {
    "the file that was sent": ("sent.jpg", OF_BODY),
    "the name of a kept one": (f"{ID}.jpg", OF_BODY - {"photos/hat/mine.jpg"}),
    "its id": (ID, OF_BODY - {"photos/hat/mine.jpg"}),
    "the name of a labelled one": ("mine.jpg", {"photos/hat/mine.jpg"}),
}


@pytest.mark.parametrize("case", CASES)
def test_every_copy_and_record_is_deleted_and_no_other_file(case: str, folders: list[Path]) -> None:
    photograph, deleted = CASES[case]
    assert {str(path) for path in forget(photograph, folders)} == deleted
    assert remaining() == FILES.keys() - deleted
    assert Path("sent.jpg").exists()


def test_rows_of_classify_are_emptied_and_the_table_keeps_its_parts(
    bundle_path: Path, folders: list[Path], tmp_path: Path
) -> None:
    classify(bundle_path, ["photos"], tmp_path / "out", SETTINGS, OPTIONS)
    out = OutputFolder(tmp_path / "out")
    before = out.sizes()
    forget("sent.jpg", [*folders, tmp_path / "out"])
    tables = [pq.read_table(path) for path in sorted((tmp_path / "out").rglob("*.parquet"))]
    assert all(
        ID not in str(table.to_pylist()) and "mine.jpg" not in str(table.to_pylist()) for table in tables
    )
    assert all("sent.JPG" in str(table.to_pylist()) for table in tables)
    assert out.sizes() == before
    assert [out.num_errors(part, size) is not None for part, size in enumerate(before)] == [True] * len(
        before
    )


def test_what_is_not_there_is_one_line(folders: list[Path]) -> None:
    with pytest.raises(DataError, match=r"nobody\.jpg: not found in kept, photos; check the name"):
        forget("nobody.jpg", folders)
    with pytest.raises(DataError, match="nowhere: no such folder"):
        forget("sent.jpg", [Path("nowhere")])
    assert remaining() == FILES.keys()
    result = CliRunner().invoke(app, ["forget", "mine.jpg", "photos", "--json"])
    assert json.loads(result.stdout) == {"deleted": ["photos/hat/mine.jpg"]}
