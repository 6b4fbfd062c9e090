"""A bundle is written whole or not at all, and opened in a fixed order that trusts nothing."""

import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sopdeploy.bundle.folder import (
    MANIFEST,
    MAX_MANIFEST_BYTES,
    REQUIRED,
    open_bundle,
    publish,
    read_manifest,
    seal,
    staging,
)
from sopdeploy.bundle.manifest import Manifest, to_json
from sopdeploy.errors import BundleError
from sopdeploy.files import sha256
from tests.forged import FIELDS, LABELS, fill, flip, forge, write_hollow

FILES = (*REQUIRED, "README.md")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hollow(tmp_path_factory.mktemp("bundles"))


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / whole.name))


def edit(bundle: Path, **changes: Any) -> None:
    """Put *changes* into the manifest of *bundle* and give it the id it then needs."""
    values = json.loads((bundle / MANIFEST).read_bytes())
    values.pop("id")
    values.update(changes)
    (bundle / MANIFEST).write_bytes(Manifest.model_validate_json(json.dumps(values)).to_bytes())


def rename_entry(bundle: Path, old: str, new: str) -> None:
    files = json.loads((bundle / MANIFEST).read_bytes())["files"]
    edit(bundle, files={new if name == old else name: record for name, record in files.items()})


def test_a_stage_is_hidden_beside_the_destination_and_gone_afterwards(tmp_path: Path) -> None:
    with staging(tmp_path / "out") as folder:
        assert folder.parent == tmp_path / "out"
        assert folder.name.startswith(".")
        (folder / "half").write_text("x")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("error", [BundleError("x"), ValueError("x"), KeyboardInterrupt()])
def test_nothing_is_left_of_a_stage_where_writing_fails(tmp_path: Path, error: BaseException) -> None:
    def write() -> None:
        with staging(tmp_path) as folder:
            fill(folder)
            raise error

    with pytest.raises(type(error)):
        write()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("below", ["file", "file/deeper"])
def test_a_destination_that_cannot_be_written_is_said(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(BundleError, match=r"file.*: cannot be written \("), staging(tmp_path / below):
        pass


def test_a_published_bundle_is_named_by_its_content_and_opens(tmp_path: Path) -> None:
    path = write_hollow(tmp_path)
    bundle = open_bundle(path)
    assert path.name == bundle.name == f"tiny-{bundle.manifest.id}"
    assert list(tmp_path.iterdir()) == [path]
    assert bundle.labels == tuple(LABELS)
    assert set(bundle.manifest.files) == set(FILES)
    assert (bundle.onnx, bundle.probes) == (path / "model.onnx", path / "probes.npz")


def test_others_may_read_a_published_bundle_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        path = write_hollow(tmp_path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o755
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == {0o644}


def test_the_same_content_published_twice_is_one_bundle(tmp_path: Path) -> None:
    first = write_hollow(tmp_path)
    born = (first / MANIFEST).stat().st_ino
    assert write_hollow(tmp_path) == first
    assert list(tmp_path.iterdir()) == [first]
    assert (first / MANIFEST).stat().st_ino == born


def test_other_content_is_another_bundle_beside_it(tmp_path: Path) -> None:
    first = write_hollow(tmp_path)
    assert write_hollow(tmp_path, opset=17) != first
    assert len(list(tmp_path.iterdir())) == 2


def test_a_damaged_bundle_under_the_same_name_is_not_passed_off_as_the_new_one(tmp_path: Path) -> None:
    flip(write_hollow(tmp_path) / "model.onnx", 0)
    with pytest.raises(BundleError, match=r"model\.onnx"):
        write_hollow(tmp_path)


def test_another_bundle_under_the_same_name_is_never_overwritten(tmp_path: Path) -> None:
    first = write_hollow(tmp_path)
    shutil.rmtree(first)
    write_hollow(tmp_path, opset=17).rename(first)
    with pytest.raises(BundleError, match="exists with another manifest; choose another --out"):
        write_hollow(tmp_path)


@pytest.mark.parametrize("name", REQUIRED)
def test_a_folder_without_a_required_file_is_not_sealed(tmp_path: Path, name: str) -> None:
    fill(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(BundleError, match=f"cannot be sealed, {name} is missing"):
        seal(tmp_path, FIELDS)
    assert not (tmp_path / MANIFEST).exists()


def test_the_same_files_are_sealed_with_the_same_bytes(tmp_path: Path) -> None:
    manifests = []
    for number in ("1", "2"):
        (tmp_path / number).mkdir()
        fill(tmp_path / number)
        seal(tmp_path / number, FIELDS)
        manifests.append((tmp_path / number / MANIFEST).read_bytes())
    assert manifests[0] == manifests[1]


def test_a_moved_and_renamed_bundle_is_still_whole(copy: Path) -> None:
    moved = copy.rename(copy.parent / "mine")
    assert open_bundle(moved).path == moved


def test_a_file_that_the_manifest_does_not_list_is_ignored(copy: Path) -> None:
    (copy / "notes.txt").write_text("mine")
    assert "notes.txt" not in open_bundle(copy).manifest.files


@pytest.mark.parametrize("place", [0, -1])
@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_in_a_file_is_found_and_the_file_named(copy: Path, name: str, place: int) -> None:
    flip(copy / name, place)
    with pytest.raises(BundleError, match=f"{name}: its sha256 is not the one in the manifest"):
        open_bundle(copy)


def test_one_flipped_bit_anywhere_in_the_manifest_is_found(copy: Path) -> None:
    manifest = copy / MANIFEST
    whole = manifest.read_bytes()
    for place in range(0, len(whole), 37):  # tests/sopdeploy/bundle/test_manifest.py flips every one
        flip(manifest, place)
        with pytest.raises(BundleError, match=MANIFEST):
            open_bundle(copy)
        manifest.write_bytes(whole)


@pytest.mark.parametrize("change", [b"", b"\n", b" ", b"\0"])
def test_bytes_cut_off_or_added_to_the_manifest_are_found(copy: Path, change: bytes) -> None:
    body = (copy / MANIFEST).read_bytes()
    (copy / MANIFEST).write_bytes(body + change if change else body[:-1])
    with pytest.raises(BundleError, match=f"{MANIFEST}: .*(edited or damaged|Extra data)"):
        open_bundle(copy)


def grow(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def turn_into_a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def turn_into_a_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def turn_into_a_link_to_itself(file: Path) -> None:
    file.unlink()
    file.symlink_to(file.name)


def turn_into_a_link_to_the_same_bytes(file: Path) -> None:
    elsewhere = file.parent.parent / file.name
    file.rename(elsewhere)
    file.symlink_to(elsewhere)


def turn_into_a_link_inside(file: Path) -> None:
    file.rename(file.with_name("kept"))
    file.symlink_to("kept")


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (Path.unlink, "missing|no manifest"),
    "too long": (grow, "bytes, the manifest says|Extra data"),
    "too short": (cut, "bytes, the manifest says|edited or damaged"),
    "a folder": (turn_into_a_folder, "missing|no manifest"),
    "a pipe": (turn_into_a_pipe, "missing|no manifest"),
    "a link in a circle": (turn_into_a_link_to_itself, "is a link|no manifest"),
    "a link to the same bytes outside": (turn_into_a_link_to_the_same_bytes, "is a link|no manifest"),
    "a link to the same bytes inside": (turn_into_a_link_inside, "is a link|no manifest"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", [MANIFEST, *FILES])
def test_a_file_that_is_not_what_was_written_is_refused_by_name(copy: Path, name: str, damage: str) -> None:
    change, message = DAMAGE[damage]
    change(copy / name)
    with pytest.raises(BundleError, match=message) as caught:
        open_bundle(copy)
    assert name in str(caught.value)
    assert str(copy) in str(caught.value)


@pytest.mark.parametrize("place", ["", "nowhere", "a/file"])
def test_a_path_without_a_bundle_is_said(tmp_path: Path, place: str) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_text("x")
    with pytest.raises(BundleError, match=r"no manifest\.json|no bundle here"):
        open_bundle(tmp_path / place)


NAMES = [
    "",
    ".",
    "..",
    "/",
    "../outside",
    "../../etc/passwd",
    "/etc/passwd",
    "deeper/file",
    "..\\outside",
    "C:\\outside",
    "nul\0byte",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_is_no_plain_file_name_is_refused(copy: Path, name: str) -> None:
    (copy.parent / "outside").write_bytes((copy / "README.md").read_bytes())
    (copy / "deeper").mkdir()
    (copy / "deeper" / "file").write_bytes((copy / "README.md").read_bytes())
    rename_entry(copy, "README.md", name)
    with pytest.raises(BundleError, match="not a plain file name"):
        open_bundle(copy)


@pytest.mark.parametrize("name", ["./README.md", "README.md/", "README.md//", ".//README.md"])
def test_another_spelling_of_a_plain_name_is_refused(copy: Path, name: str) -> None:
    rename_entry(copy, "README.md", name)
    with pytest.raises(BundleError, match="not a plain file name"):
        open_bundle(copy)


def test_a_name_longer_than_a_file_system_takes_is_refused(copy: Path) -> None:
    rename_entry(copy, "README.md", "a" * 5000)
    with pytest.raises(BundleError, match="not a plain file name"):
        open_bundle(copy)


@pytest.mark.parametrize("name", REQUIRED)
def test_a_manifest_that_leaves_out_a_required_file_is_refused(copy: Path, name: str) -> None:
    rename_entry(copy, name, "README.md")
    with pytest.raises(BundleError, match=f"the manifest lists no {name}"):
        open_bundle(copy)


RAW: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "an extra key": (lambda m: m.update(extra=1), "extra: unknown key"),
    "a newer version": (lambda m: m.update(version=2), "version: "),
    "another format": (lambda m: m.update(format="zip"), "format: "),
    "an extra key of a file": (lambda m: m["files"]["model.onnx"].update(mode=7), "mode: unknown key"),
    "no size": (lambda m: m["files"]["model.onnx"].pop("bytes"), "bytes: missing"),
    "a crop larger than resize": (lambda m: m["preprocess"].update(crop=99), r"crop \(99\) is larger"),
    "code for a value": (lambda m: m.update(model={"$eval": "1"}), "model: "),
}


@pytest.mark.parametrize("case", RAW)
def test_a_manifest_with_another_schema_is_refused(copy: Path, case: str) -> None:
    change, message = RAW[case]
    values = json.loads((copy / MANIFEST).read_bytes())
    change(values)
    (copy / MANIFEST).write_bytes(to_json(values))
    with pytest.raises(BundleError, match=message) as caught:
        open_bundle(copy)
    assert MANIFEST in str(caught.value)


@pytest.mark.parametrize(
    "body",
    [b"", b"\xff\xfe", b"null", b"[" * 100_000, b'{"a":' * 100_000, b"9" * 10_000],
    ids=["empty", "no text", "null", "deep lists", "deep tables", "a long number"],
)
def test_a_manifest_that_is_no_manifest_is_refused(copy: Path, body: bytes) -> None:
    (copy / MANIFEST).write_bytes(body)
    with pytest.raises(BundleError, match=r"manifest\.json: "):
        open_bundle(copy)


def test_a_huge_manifest_is_refused_before_it_is_read(copy: Path) -> None:
    with (copy / MANIFEST).open("wb") as file:
        file.truncate(1 << 40)  # a hole: takes no space, but reading it would take all memory
    with pytest.raises(BundleError, match=f"larger than {MAX_MANIFEST_BYTES} bytes"):
        read_manifest(copy)


LABEL_FILES: dict[str, tuple[bytes, str]] = {
    "one too few": (to_json(LABELS[:-1]), "2 class names for 3 outputs"),
    "one too many": (to_json([*LABELS, "dog"]), "4 class names for 3 outputs"),
    "a table": (to_json({"0": "ant"}), "not a list of class names"),
    "numbers": (to_json([1, 2, 3]), "not a list of class names"),
    "no JSON": (b"ant, bee, cat", ""),
    "no text": (b"\xff\xfe\xfd", ""),
    "a deep nest": (b"[" * 100_000, ""),
}


@pytest.mark.parametrize("case", LABEL_FILES)
def test_labels_that_do_not_fit_the_graph_are_refused_even_with_the_right_hash(copy: Path, case: str) -> None:
    body, message = LABEL_FILES[case]
    (copy / "labels.json").write_bytes(body)
    forge(copy)
    with pytest.raises(BundleError, match=rf"labels\.json: .*{message}"):
        open_bundle(copy)


@pytest.mark.parametrize("outputs", [[], [{"name": "logits", "dtype": "float32", "shape": []}]])
def test_a_graph_without_an_output_is_refused(copy: Path, outputs: list[Any]) -> None:
    values = json.loads((copy / MANIFEST).read_bytes())
    (copy / MANIFEST).write_bytes(to_json({**values, "outputs": outputs}))
    with pytest.raises(BundleError, match=r"outputs.*at least 1 item"):
        open_bundle(copy)


def test_checks_come_in_order_and_the_first_one_that_fails_is_told(copy: Path) -> None:
    """Everything is wrong at once; repaired one by one, each check in turn speaks."""
    whole = copy.parent / "whole"
    shutil.copytree(copy, whole)
    stages = []

    def told() -> str:
        with pytest.raises(BundleError) as caught:
            open_bundle(copy)
        return str(caught.value)

    (copy / "labels.json").write_bytes(to_json(["ant"]))
    forge(copy)
    flip(copy / "model.onnx", 3)
    grow(copy / "parity.json")
    good = (copy / MANIFEST).read_bytes()
    rename_entry(copy, "README.md", "../README.md")
    bad_path = (copy / MANIFEST).read_bytes()
    (copy / MANIFEST).write_bytes(bad_path + b" ")
    stages.append(told())
    (copy / MANIFEST).write_bytes(bad_path)
    stages.append(told())
    (copy / MANIFEST).write_bytes(good)
    stages.append(told())
    cut(copy / "parity.json")
    stages.append(told())
    flip(copy / "model.onnx", 3)
    stages.append(told())
    expected = ["edited or damaged", "not a plain", "bytes, the manifest says", "sha256", "class names for"]
    assert all(word in said for word, said in zip(expected, stages, strict=True)), stages


def test_nothing_is_hashed_before_every_size_is_right(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    monkeypatch.setattr(
        "sopdeploy.bundle.folder.sha256", lambda path: hashed.append(path.name) or sha256(path)
    )
    grow(copy / "README.md")
    with pytest.raises(BundleError, match="bytes, the manifest says"):
        open_bundle(copy)
    assert hashed == []


def test_nothing_is_parsed_before_every_hash_is_right(copy: Path) -> None:
    (copy / "labels.json").write_bytes(b"#" * (copy / "labels.json").stat().st_size)
    with pytest.raises(BundleError, match=r"labels\.json: its sha256"):
        open_bundle(copy)


@pytest.mark.parametrize("name", FILES)
def test_every_complaint_is_one_line(copy: Path, name: str) -> None:
    flip(copy / name, 0)
    with pytest.raises(BundleError) as caught:
        open_bundle(copy)
    assert "\n" not in str(caught.value)


def test_publishing_needs_no_more_than_a_rename(tmp_path: Path) -> None:
    with staging(tmp_path) as folder:
        fill(folder)
        manifest = seal(folder, FIELDS)
        inode = (folder / "model.onnx").stat().st_ino
        path = publish(folder, manifest, tmp_path)
    assert (path / "model.onnx").stat().st_ino == inode
