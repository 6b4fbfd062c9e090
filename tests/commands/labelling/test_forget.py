"""`forget` deletes every copy of a photograph that it is told of, and nothing else."""

import hashlib
import json
import os
import shutil
import signal
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from sopdeploy.bundle.folder import read_manifest
from sopdeploy.errors import DataError
from sopdeploy.evaluation.drift import Answers
from sopdeploy.file_systems import lock_file
from sopdeploy.photos.photo import Photo
from sopdeploy.project import Origin, utc_now
from sopdeploy_commands.app import app
from sopdeploy_commands.bulk.output import LIST_SCHEMA, OutputFolder
from sopdeploy_commands.labelling.forget import forget
from sopdeploy_service.inference.drift import Block, write_block
from tests.commands.bulk.conftest import OPTIONS, SETTINGS, classify
from tests.support.children import kills_itself
from tests.support.service import picture_bytes, write_bundle

BODY, OTHER = picture_bytes(), picture_bytes() + b"other"
ID, OTHER_ID = (hashlib.sha256(body).hexdigest()[:32] for body in (BODY, OTHER))
FILES = {  # a kept copy has other bytes than the file that was sent
    f"kept/{ID}.jpg": b"copy", f"kept/{ID}.json": b"{}", f"kept/{ID}.skipped": b"",
    f"kept/0/{ID}.png": b"copy", f"photos/hat/{ID}.jpg": b"copy",
    f"photos/hat/{ID}-2.jpg": b"copy", f"photos/hat/{ID} (1).jpg": b"copy", "photos/hat/other-2.jpg": OTHER,
    "photos/hat/mine.jpg": BODY, "photos/shoes/sent.JPG": OTHER,
    f"kept/{OTHER_ID}.jpg": b"other", f"kept/{OTHER_ID}.json": b"{}", "photos/notes.json": b"{}",
    "photos/.partial": b"",  # no temporary file of another one
}  # fmt: skip
OF_BODY = {name for name in FILES if ID in name or name == "photos/hat/mine.jpg"}


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, content in FILES.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(content)
    Path("sent.jpg").write_bytes(BODY)
    return [Path("kept"), Path("photos")]


def remaining() -> set[str]:
    return {
        str(path)
        for folder in ("kept", "photos")
        for path in Path(folder).rglob("*")
        if path.is_file()
    }


CASES = {
    "the file that was sent": ("sent.jpg", OF_BODY),
    "the name of a kept one": (f"{ID}.jpg", OF_BODY - {"photos/hat/mine.jpg"}),
    "its id": (ID, OF_BODY - {"photos/hat/mine.jpg"}),
    "the name of a labelled one": ("mine.jpg", {"photos/hat/mine.jpg"}),
}


@pytest.mark.parametrize("case", CASES)
def test_every_copy_and_record_is_deleted_and_no_other_file(
    case: str, folders: list[Path]
) -> None:
    photograph, deleted = CASES[case]
    assert {str(path) for path in forget(photograph, folders).deleted} == deleted
    assert remaining() == FILES.keys() - deleted
    assert Path("sent.jpg").exists()


def test_tables_of_other_programs_stay_as_they_are(folders: list[Path]) -> None:
    table = Path("photos/annotations.parquet")
    pq.write_table(
        pa.table({"path": ["photos/hat/mine.jpg"], "number": [7], "label": ["hat"]}), table
    )
    before = table.read_bytes()
    assert table not in forget("mine.jpg", folders).deleted
    assert table.read_bytes() == before


def test_a_table_that_was_made_of_rows_of_classify_needs_no_paths(folders: list[Path]) -> None:
    pq.write_table(
        pa.table({"known": [True]}, metadata=LIST_SCHEMA.metadata), "photos/known.parquet"
    )
    assert forget("mine.jpg", folders).deleted == [Path("photos/hat/mine.jpg")]


def test_rows_of_classify_are_emptied_and_the_table_keeps_its_parts(
    bundle_path: Path, folders: list[Path], tmp_path: Path
) -> None:
    classify(bundle_path, ["photos"], tmp_path / "out", SETTINGS, OPTIONS)
    out = OutputFolder(tmp_path / "out")
    before = out.sizes()
    forget("sent.jpg", [*folders, tmp_path / "out"])
    tables = [pq.read_table(path) for path in sorted((tmp_path / "out").rglob("*.parquet"))]
    assert all(
        ID not in str(table.to_pylist()) and "mine.jpg" not in str(table.to_pylist())
        for table in tables
    )
    assert all("sent.JPG" in str(table.to_pylist()) for table in tables)
    assert out.sizes() == before
    assert [out.num_errors(part, size) is not None for part, size in enumerate(before)] == [
        True
    ] * len(before)


def test_the_page_names_files_with_the_photograph_that_remain() -> None:
    page = (Path(__file__).parents[3] / "docs" / "keep.md").read_text(encoding="utf-8")
    remains = page.partition("`forget` cannot find ")[2].partition(".")[0]
    assert [file for file in ("CSV files", "backups") if file not in remains] == []


def test_what_is_not_there_is_one_line(folders: list[Path]) -> None:
    with pytest.raises(
        DataError,
        match=r"nobody\.jpg: nothing of it is in kept, photos; it was deleted already, or",
    ):
        forget("nobody.jpg", folders)
    with pytest.raises(DataError, match="nowhere: no such folder"):
        forget("sent.jpg", [Path("nowhere")])
    assert remaining() == FILES.keys()
    result = CliRunner().invoke(app, ["forget", "mine.jpg", "photos", "--json"])
    assert json.loads(result.stdout) == {"deleted": ["photos/hat/mine.jpg"], "remains": []}


def test_what_remains_is_named_with_the_command_that_removes_it(
    folders: list[Path], bundle_path: Path
) -> None:
    texts = {
        "runs/7/predictions.csv": f"hat/{ID}.jpg,hat", "runs/8/predictions.csv": f"hat/{OTHER_ID}.jpg,hat",
        "cache/sopdeploy/features/1.features": "",
    }  # fmt: skip
    for name, text in texts.items():
        Path(name).parent.mkdir(parents=True)
        Path(name).write_text(text)
    shutil.copytree(bundle_path, "bundles/one")
    cache = Path.cwd() / "cache/sopdeploy/features"
    shown = CliRunner().invoke(app, ["forget", "sent.jpg", *map(str, folders)])
    assert [line for line in shown.output.splitlines() if line.startswith("remains: ")] == [
        "remains: runs/7, named in predictions.csv; remove it: rm -r runs/7",
        f"remains: {cache}, perhaps with its features and a gray thumbnail; remove it: rm -r {cache}",
    ]
    with pytest.raises(
        DataError, match=r"deleted already, .*may remain in runs/7 \(rm -r runs/7\)"
    ):
        forget("sent.jpg", folders)


def test_a_bundle_that_was_trained_on_the_photograph_is_named(
    folders: list[Path], tmp_path: Path
) -> None:
    file_hash = Photo("", Path("photos/hat/mine.jpg").read_bytes()).file_hash
    origin = Origin(
        run="7", run_id="7", started=utc_now(), data="photos", num_images=1, num_classes=1,
        sample=(file_hash,),
    )  # fmt: skip
    bundle = write_bundle(tmp_path / "bundles")
    manifest = read_manifest(bundle).model_copy(update={"origin": origin})
    (bundle / "manifest.json").write_bytes(manifest.to_bytes())
    remains = [one.path.name for one in forget("mine.jpg", folders).remains]
    assert remains == [bundle.name]


def test_the_inputs_of_consecutive_answers_go_with_the_photograph(folders: list[Path]) -> None:
    blocks = []
    for number, identity in enumerate((ID, OTHER_ID)):
        path = Path(f"kept/.traffic/tiny/{number:08}.npz")
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.zeros((1, 16, 16, 3), np.uint8)
        answers = Answers.of(np.zeros((1, 2), np.float32), np.zeros((1, 3), np.float32))
        write_block(
            path,
            Block("one", answers, np.asarray([identity]), 0.0),
            pixels,
        )
        blocks.append(path)
    assert blocks[0] in forget("sent.jpg", folders).deleted
    assert [path.exists() for path in blocks] == [False, True]


def rows(out: Path) -> set[str]:
    """The paths in the rows and in the list of a run; both must be equal."""
    (listing,) = out.rglob("_list.parquet")
    listed = pq.read_table(listing)["path"].to_pylist()
    parts = [
        pq.read_table(path)["path"].to_pylist() for path in sorted(out.rglob("part-*.parquet"))
    ]
    assert listed == [path for part in parts for path in part]
    return set(listed) - {"forgotten"}


@pytest.fixture(scope="module")
def classified(bundle_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs with equal names in folders and in an archive, and the rows of all; `classify` ran here."""
    root = tmp_path_factory.mktemp("classified")
    contents = {"x/1.jpg": BODY, "y/1.jpg": OTHER, "y/2.jpg": OTHER + b"2", "y/copy.jpg": BODY}
    for name, content in contents.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(content)
    with tarfile.open(root / "a.tar", "w") as archive:
        for name in ("x/1.jpg", "y/1.jpg"):
            archive.add(root / name, f"{name[0]}{name}")
    before = Path.cwd()
    os.chdir(root)
    try:
        classify(bundle_path, ["x", "y", "a.tar"], root / "out", SETTINGS, OPTIONS)
    finally:
        os.chdir(before)
    return root


ALL = {"x/1.jpg", "y/1.jpg", "y/2.jpg", "y/copy.jpg", "a.tar/xx/1.jpg", "a.tar/yy/1.jpg"}
OF_X = {"x/1.jpg", "y/copy.jpg", "a.tar/xx/1.jpg"}  # also under other names and in an archive
ROWS: dict[str, tuple[str, Callable[[], object], set[str]]] = {
    "a file": ("x/1.jpg", lambda: None, OF_X),
    "a file of the same name": ("y/1.jpg", lambda: None, {"y/1.jpg", "a.tar/yy/1.jpg"}),
    "its absolute path": ("{root}/x/1.jpg", lambda: None, OF_X),
    "its id": (ID, lambda: None, OF_X),
    "a file with a name of another one": (
        "2.jpg",
        lambda: shutil.copy("x/1.jpg", "2.jpg"),
        OF_X,
    ),
    "a file that is gone, by its folder": (
        "y/2.jpg",
        lambda: Path("y/2.jpg").unlink(),
        {"y/2.jpg"},
    ),
    "a name that is used once": ("2.jpg", lambda: None, {"y/2.jpg"}),
    "a member of an archive": ("yy/1.jpg", lambda: None, {"a.tar/yy/1.jpg"}),
    "a link to a file": ("z.jpg", lambda: Path("z.jpg").symlink_to("y/2.jpg"), {"y/2.jpg"}),
}


@pytest.mark.parametrize(("photograph", "change", "emptied"), ROWS.values(), ids=ROWS)
def test_only_the_rows_of_the_photograph_are_emptied(
    classified: Path, tmp_path: Path, monkeypatch, photograph: str, change, emptied: set[str]
) -> None:
    shutil.copytree(classified / "out", tmp_path / "out")
    for name in (
        "x",
        "y",
    ):  # in the folder in which `classify` ran, so that places in the list are right
        shutil.copytree(classified / name, tmp_path / name)
    monkeypatch.chdir(classified)
    try:
        change()
        forget(photograph.format(root=classified), [tmp_path / "out"])
    finally:
        for name in ("z.jpg", "2.jpg"):
            Path(name).unlink(missing_ok=True)
        for name in ("x", "y"):
            shutil.rmtree(name)
            shutil.copytree(tmp_path / name, name)
    assert rows(tmp_path / "out") == ALL - emptied


def test_a_name_of_different_photographs_deletes_nothing(
    classified: Path, tmp_path: Path, monkeypatch
) -> None:
    shutil.copytree(classified / "out", tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    message = (
        r"^1\.jpg: is the name of different photos \(.*x/1\.jpg.*\); name one with its folder$"
    )
    with pytest.raises(DataError, match=message):
        forget("1.jpg", [tmp_path / "out"])
    assert rows(tmp_path / "out") == ALL


@pytest.mark.parametrize("content", [OTHER + b"2", BODY])
def test_a_file_and_a_row_of_one_name_are_one_photograph_if_their_content_is_equal(
    classified: Path, tmp_path: Path, monkeypatch, content: bytes
) -> None:
    shutil.copytree(classified / "out", tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    image = Path("photos/hat/2.jpg")
    image.parent.mkdir(parents=True)
    image.write_bytes(content)

    if content == BODY:
        with pytest.raises(DataError, match="is the name of different photos"):
            forget("2.jpg", [Path("photos"), Path("out")])
    else:
        forget("2.jpg", [Path("photos"), Path("out")])
    is_left = content == BODY
    assert (image.exists(), "y/2.jpg" in rows(Path("out"))) == (is_left, is_left)


def test_rows_without_a_hash_are_found_by_the_path_of_the_file(
    classified: Path, tmp_path: Path, monkeypatch
) -> None:
    """As those of files that could not be read."""
    shutil.copytree(classified / "out", tmp_path / "out")
    for path in (tmp_path / "out").rglob("part-*.parquet"):
        table = pq.read_table(path)
        column = table.schema.get_field_index("sha256")
        empty = pa.nulls(len(table), pa.string())
        pq.write_table(table.set_column(column, table.schema.field(column), empty), path)

    monkeypatch.chdir(classified)
    forget("x/1.jpg", [tmp_path / "out"])
    assert rows(tmp_path / "out") == ALL - {"x/1.jpg"}


def test_rows_are_not_changed_while_a_run_writes_them(
    classified: Path, tmp_path: Path, monkeypatch
) -> None:
    shutil.copytree(classified / "out", tmp_path / "out")
    monkeypatch.chdir(classified)
    lock = lock_file(tmp_path / "out" / ".lock")
    with pytest.raises(DataError, match="a run of `classify` is writing to it; wait for it"):
        forget("x/1.jpg", [tmp_path / "out"])
    os.close(lock.file)
    assert rows(tmp_path / "out") == ALL


def kill_at(last: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process kill itself in its step number *last* that changes files."""
    steps = iter(range(1, last))

    def killed(original: Callable[..., object]) -> Callable[..., object]:
        def step(*values: object, **options: object) -> object:
            if next(steps, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*values, **options)

        return step

    for name in ("unlink", "replace"):
        monkeypatch.setattr(Path, name, killed(getattr(Path, name)))


@pytest.mark.slow
@pytest.mark.parametrize("photograph", ["sent.jpg", "photos/hat/mine.jpg", f"{ID}.jpg"])
def test_after_a_kill_at_any_step_the_same_command_completes(
    classified: Path, folders: list[Path], tmp_path: Path, monkeypatch, photograph: str
) -> None:
    shutil.copytree(classified / "out", "photos/out")
    for name in list(FILES)[:5]:
        Path("start", name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree("kept", "start/kept", dirs_exist_ok=True)
    shutil.copytree("photos", "start/photos", dirs_exist_ok=True)
    forget(photograph, folders)
    complete, complete_rows = remaining(), rows(Path("photos"))

    def stopped(last: int) -> None:
        kill_at(last, monkeypatch)
        forget(photograph, folders)

    for last in range(1, 100):
        for folder in folders:
            shutil.rmtree(folder)
            shutil.copytree(Path("start", folder), folder)
        killed = kills_itself(partial(stopped, last))
        if killed:
            forget(photograph, folders)
        assert (remaining(), rows(Path("photos"))) == (complete, complete_rows), last
        if not killed:
            break
    assert 3 < last < 99


LEFT = {
    "a record without its photograph": f"kept/{ID}.json",
    "a mark without its photograph": f"kept/{ID}.skipped",
    "a copy that was not finished": f"photos/hat/{ID}.jpg.0123abcd.partial",
    "a record that was not finished": f"kept/{ID}.json.0123abcd.partial",
    "a copy in a hidden folder": f"photos/.trash/{ID}.jpg",
    "a link to a copy": f"photos/shoes/{ID}.jpeg",
}


@pytest.mark.parametrize("name", LEFT.values(), ids=LEFT)
def test_what_was_left_of_a_photograph_is_deleted(name: str, folders: list[Path]) -> None:
    Path(name).parent.mkdir(exist_ok=True)
    if name.endswith(".jpeg"):
        Path(name).symlink_to(Path("sent.jpg").absolute())
    else:
        Path(name).write_bytes(b"left")
    forget("sent.jpg", folders)
    assert remaining() == FILES.keys() - OF_BODY
    assert not os.path.lexists(name)


@pytest.mark.parametrize("photograph", ["sent.jpg", ID, "photos/hat/mine.jpg"])
def test_a_photograph_that_is_labelled_while_it_is_forgotten_is_deleted(
    photograph: str, folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    unlink = Path.unlink

    def label_before(path: Path, **options: bool) -> None:
        kept = Path(f"kept/{ID}.jpg")
        if kept.exists():
            kept.rename(f"photos/shoes/{ID}.jpg")
        unlink(path, **options)

    monkeypatch.setattr(Path, "unlink", label_before)
    forget(photograph, folders)
    assert not [name for name in remaining() if ID in name]


@pytest.mark.parametrize("photograph", ["photos/hat/a.jpg", "sent.jpg"])
def test_a_photograph_in_a_folder_is_deleted_with_its_kept_copy(
    photograph: str, folders: list[Path]
) -> None:
    shutil.copy("sent.jpg", "photos/hat/a.jpg")
    Path("photos/hat/b.jpg").write_bytes(OTHER + b"another one")
    forget(photograph, [Path("photos"), Path("kept")])
    assert remaining() == (FILES.keys() - OF_BODY) | {"photos/hat/b.jpg"}
