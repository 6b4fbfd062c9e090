"""A file is what it was or what it becomes, and nothing lies beside it."""

from pathlib import Path

import pytest

from sopdeploy.files import atomic_write


@pytest.mark.parametrize("shared", [False, True])
def test_a_file_takes_its_place_only_when_all_of_it_is_written(tmp_path: Path, shared: bool) -> None:
    path = tmp_path / "a.csv"
    path.write_text("before")
    with atomic_write(path, shared=shared) as partial:
        partial.write_text("after")
        assert partial.parent == tmp_path
        assert path.read_text() == "before"
    assert path.read_text() == "after"
    assert list(tmp_path.iterdir()) == [path]


def write_half(path: Path, problem: BaseException) -> None:
    with atomic_write(path) as partial:
        partial.write_text("half")
        raise problem


@pytest.mark.parametrize("problem", [OSError("full"), KeyboardInterrupt()])
def test_after_an_error_all_is_as_before(tmp_path: Path, problem: BaseException) -> None:
    path = tmp_path / "a.csv"
    path.write_text("before")
    with pytest.raises(type(problem)):
        write_half(path, problem)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_missing_is_the_callers_to_explain(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "none" / "a.csv") as partial:
        partial.write_text("text")
