"""Places365 in its original layout."""

import numpy as np
import pytest

from sopdeploy.data.datasets.places import PlacesConfig, open_places
from sopdeploy.errors import ConfigError, DataError
from tests.sopdeploy.data.small_data import tar_of, write_places


def open_at(path):
    return open_places(PlacesConfig(kind="places365", path=path))


def test_the_lists_define_training_and_validation_images(tmp_path) -> None:
    split = open_at(write_places(tmp_path / "places"))
    assert split.train.labels == ("abbey", "apartment-outdoor", "bar")
    assert (len(split.train), len(split.held_out)) == (12, 3)
    assert [split.train[5][1], split.held_out[2][1]] == [1, 2]
    assert split.train[5][0].size == (64, 64)


def test_the_images_can_be_an_archive(tmp_path) -> None:
    root = write_places(tmp_path / "places")
    expected = np.asarray(open_at(root).train[7][0])
    tar_of(root / "data_256", root / "moved.tar", "data_256")
    (root / "data_256").rename(tmp_path / "gone")
    (root / "moved.tar").rename(root / "data_256.tar")
    assert np.array_equal(np.asarray(open_at(root).train[7][0]), expected)


BROKEN = [
    ("categories_places365.txt", None, "cannot be read"),
    ("categories_places365.txt", "/a/abbey 0\n/a/abbey 1\n", "needs different classes"),
    ("categories_places365.txt", "/a/abbey 0\n/b/bar 2\n", "numbered from 0 without gaps"),
    ("categories_places365.txt", "/a/abbey 0\n/b/bar 0\n", "number 0 occurs twice"),
    ("categories_places365.txt", "abbey\n", "line 1 is not a name and a number"),
    ("places365_val.txt", "Places365_val_00000000.jpg 7\n", "classes 7 are not in categories_places365"),
    (
        "places365_val.txt",
        "Places365_val_00000000.jpg 0\n",
        "no images of the classes apartment-outdoor, bar",
    ),
    ("places365_val.txt", b"\xff\xff 1\n", "cannot be read"),
]


@pytest.mark.parametrize(("name", "content", "message"), BROKEN, ids=[m for *_, m in BROKEN])
def test_an_invalid_list_is_named(tmp_path, name, content, message) -> None:
    path = write_places(tmp_path / "places") / name
    path.unlink()
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message) as problem:
        open_at(tmp_path / "places")
    assert str(path) in str(problem.value)


def test_missing_files_are_named(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"data\.path: not set; give the folder that holds categories"):
        open_at(None)
    (write_places(tmp_path / "places") / "val_256").rename(tmp_path / "gone")
    with pytest.raises(DataError, match="holds no val_256; unpack the images there"):
        open_at(tmp_path / "places")
