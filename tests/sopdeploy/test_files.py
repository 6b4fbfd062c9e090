"""Atomic writes keep the old file or create the new one, and leave no other files."""

from contextlib import suppress
from pathlib import Path

import pytest

from sopdeploy.files import atomic_write, expand_user


@pytest.mark.parametrize("shared", [False, True])
def test_a_file_is_replaced_after_it_was_written(tmp_path: Path, shared: bool) -> None:
    path = tmp_path / "a.csv"
    path.write_text("before")
    with atomic_write(path, shared=shared) as partial:
        partial.write_text("after")
        assert partial.parent == tmp_path
        assert path.read_text() == "before"
    assert path.read_text() == "after"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("problem", [OSError("full"), KeyboardInterrupt()])
def test_an_error_keeps_the_old_file(tmp_path: Path, problem: BaseException) -> None:
    path = tmp_path / "a.csv"
    path.write_text("before")
    with suppress(OSError, KeyboardInterrupt), atomic_write(path) as partial:
        partial.write_text("half")
        raise problem
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", [".", "runs"])
def test_a_folder_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(IsADirectoryError), atomic_write(Path(name)) as partial:
        partial.write_text("text")
    assert list(tmp_path.iterdir()) == [tmp_path / "runs"]


def test_the_home_of_an_unknown_user_is_not_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    paths = {"~/a": "/home/ann/a", "~nobody-here/a": "~nobody-here/a", "a/~": "a/~"}
    assert {path: str(expand_user(path)) for path in paths} == paths
