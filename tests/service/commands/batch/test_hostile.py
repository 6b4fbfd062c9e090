"""Hostile names, lists, archives and output folders, full disks, Ctrl-C: rows or one line, no traceback."""

import errno
import io
import tarfile
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sopdeploy.cli.app import app
from sopdeploy.errors import DataError, StorageError
from sopdeploy_service.commands.batch import classifier
from sopdeploy_service.commands.batch.output import OutputFolder
from sopdeploy_service.commands.batch.sources import list_sources
from tests.service.commands.batch.conftest import (
    OPTIONS,
    SETTINGS,
    classify,
    part_bytes,
    rows_of,
)
from tests.service.conftest import picture_bytes

BODY = picture_bytes()
MISSING = "cannot be read (No such file or directory)"
IN_FOLDER = {"broken.jpg": MISSING, "escape\x1b[31m.jpg": None, "new\nline.jpg": None}  # name: error


def errors_of(out: Path) -> list[tuple[str, str | None]]:
    """List the name and the error of every row."""
    return [(row["path"].rpartition("hostile/")[2], row["error_message"]) for row in rows_of(out)]


def test_files_with_hostile_names_have_rows_and_links_in_a_circle_are_not_followed(bundle_path, tmp_path):
    folder = tmp_path / "hostile"
    folder.mkdir()
    for name, error in IN_FOLDER.items():
        if error is None:
            (folder / name).write_bytes(BODY)
    (folder / "broken.jpg").symlink_to("nowhere.jpg")
    (folder / "again.jpg").symlink_to(folder)
    (folder / "folder.jpg").mkdir()
    found = classify(bundle_path, [str(folder)], tmp_path / "out", SETTINGS, OPTIONS)
    assert errors_of(tmp_path / "out") == list(IN_FOLDER.items())
    assert (found.num_images, found.num_errors) == (3, 1)


def test_members_of_an_archive_stay_below_its_name(tmp_path):
    archive = tmp_path / "x.tar"
    names = (
        "/abs.jpg",
        "../up.jpg",
        "x/../../y.jpg",
        "a.jpg",
        "a.jpg",
        "./b.jpg",
        ".hidden.jpg",
        "c\udce9.jpg",
    )
    with tarfile.open(archive, "w") as tar:
        for number, name in enumerate(names):
            member = tarfile.TarInfo(name)
            member.size = number
            tar.addfile(member, io.BytesIO(bytes(number)))
        for kind in (tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
            special = tarfile.TarInfo("special.jpg")
            special.type, special.linkname = kind, "/etc/passwd"
            tar.addfile(special)
    found = {entry.path: entry.size for entry in list_sources([str(archive)])}
    assert found == {f"{archive}/{name}": size for name, size in
                     {"abs.jpg": 0, "a.jpg": 4, "b.jpg": 5, "c�.jpg": 7}.items()}  # fmt: skip
    with tarfile.open(archive, "a") as tar:
        link = tarfile.TarInfo("twin.jpg")
        link.type, link.linkname = tarfile.LNKTYPE, "a.jpg"
        tar.addfile(link)
    with pytest.raises(DataError, match=r"twin\.jpg is a hard link; pack with `tar --hard-dereference`"):
        list(list_sources([str(archive)]))


def test_lines_of_a_list_that_are_no_images_have_errors(bundle_path, tmp_path):
    folder = tmp_path / "hostile"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(BODY)
    (folder / "list.txt").write_bytes(b"\r\na.jpg\r\n/etc/passwd\n.\nnull\0.jpg\n/dev/zero")
    classify(bundle_path, [str(folder / "list.txt")], tmp_path / "out", SETTINGS, OPTIONS)
    passwd, dot, null, zero = (message for _, message in errors_of(tmp_path / "out")[1:])
    assert "a.jpg" in errors_of(tmp_path / "out")[0]
    assert None not in (passwd, zero)
    assert (dot, null) == ("cannot be read (Is a directory)", "cannot be read (embedded null byte)")


def test_a_full_disk_is_a_one_line_error_and_the_run_continues(
    complete, bundle_path, photos, tmp_path, monkeypatch
):
    write = OutputFolder.write

    def full(folder: OutputFolder, part: int, rows: Any, schema: Any) -> None:
        if part == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(folder, part, rows, schema)

    monkeypatch.setattr(OutputFolder, "write", full)
    with pytest.raises(StorageError, match=r": cannot be written \(No space left on device\); check"):
        classify(bundle_path, [str(photos)], tmp_path, SETTINGS, OPTIONS)
    monkeypatch.undo()
    classify(bundle_path, [str(photos)], tmp_path, SETTINGS, OPTIONS)
    assert part_bytes(tmp_path) == part_bytes(complete)


def test_ctrl_c_says_in_one_line_how_to_continue(bundle_path, photos, tmp_path, monkeypatch):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(classifier.BatchClassifier, "write_parts", interrupted)
    found = CliRunner().invoke(app, ["classify", str(bundle_path), str(photos), "--out", str(tmp_path)])
    assert (found.exit_code, found.stderr) == (130, "stopped; run the same command again to continue\n")
    assert found.stdout == ""
