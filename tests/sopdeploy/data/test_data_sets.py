"""CIFAR, Places365 and downsampled ImageNet in the layouts of their official files."""

import pickle  # noqa: TID251  # the official files are pickles

import h5py
import numpy as np
import pydantic
import pytest

from sopdeploy.data.sources import DataConfig, open_data
from sopdeploy.errors import ConfigError, DataError
from tests.sopdeploy.data.small_data import (
    planes,
    tar_of,
    write_cifar,
    write_pickle,
    write_places,
    write_small_imagenet,
)


def open_at(kind, path, **settings):
    config = {"kind": kind, "path": path, **settings}
    return open_data(pydantic.TypeAdapter(DataConfig).validate_python(config))


@pytest.mark.parametrize(
    ("kind", "classes", "train", "test", "key"),
    [("cifar10", 10, 20, "test_batch", "labels"), ("cifar100", 100, 4, "test", "fine_labels")],
)
def test_the_official_cifar_layout_is_read_and_a_changed_file_is_not_unpickled(
    tmp_path, monkeypatch, kind, classes, train, test, key
) -> None:
    folder = write_cifar(tmp_path, kind, monkeypatch)
    split = open_at(kind, tmp_path)
    assert split.train.labels == tuple(f"class {number}" for number in range(classes))
    assert (len(split.train), len(split.held_out)) == (train, 4)
    stored = pickle.loads((folder / test).read_bytes())  # noqa: S301
    image, label = split.held_out[2]
    assert np.array_equal(np.asarray(image).transpose(2, 0, 1).reshape(-1), stored["data"][2])
    assert label == stored[key][2]
    (folder / ("data_batch_3" if kind == "cifar10" else "train")).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(DataError, match="holds no complete cifar-10"):
        open_at(kind, tmp_path)


def test_the_lists_of_places_define_training_and_validation_images(tmp_path) -> None:
    root = write_places(tmp_path / "places")
    split = open_at("places365", root)
    assert split.train.labels == ("abbey", "apartment-outdoor", "bar")
    assert (len(split.train), len(split.held_out)) == (12, 3)
    assert [split.train[5][1], split.held_out[2][1]] == [1, 2]
    assert split.train[5][0].size == (64, 64)
    expected = np.asarray(split.train[7][0])
    (root / "data_256").rename(tmp_path / "moved")  # the images can be an archive
    tar_of(tmp_path / "moved", root / "data_256.tar", "data_256")
    assert np.array_equal(np.asarray(open_at("places365", root).train[7][0]), expected)


CATEGORIES, VALIDATION = "categories_places365.txt", "places365_val.txt"
IMAGE_0 = "Places365_val_00000000.jpg"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (CATEGORIES, None, "cannot be read"),
        (CATEGORIES, b"/a/abbey 0\n/a/abbey 1\n", "needs different classes"),
        (CATEGORIES, b"/a/abbey 0\n/b/bar 2\n", "numbered from 0 without gaps"),
        (CATEGORIES, b"/a/abbey 0\n/b/bar 0\n", "number 0 occurs twice"),
        (CATEGORIES, b"abbey\n", "line 1 is not a name and a number"),
        (VALIDATION, f"{IMAGE_0} 7\n".encode(), "classes 7 are not in categories_places365"),
        (VALIDATION, f"{IMAGE_0} 0\n".encode(), "no images of the classes apartment-outdoor, bar"),
        (VALIDATION, b"\xff\xff 1\n", "cannot be read"),
    ],
)
def test_an_invalid_list_of_places_is_named(tmp_path, name, content, message) -> None:
    path = write_places(tmp_path / "places") / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message) as problem:
        open_at("places365", tmp_path / "places")
    assert str(path) in str(problem.value)


def upright(image: np.ndarray, side: int = 64) -> np.ndarray:
    return image.reshape(3, side, side).transpose(1, 2, 0)


def test_batches_of_small_imagenet_are_read_in_the_order_of_their_numbers(tmp_path) -> None:
    split = open_at("imagenet64", write_small_imagenet(tmp_path / "64"))
    assert (len(split.train), len(split.held_out)) == (12, 6)
    assert split.train.labels == ("0001", "0002", "0003")
    assert split.train.targets.tolist() == [0, 1, 2] * 4
    image, label = split.train[7]
    assert np.array_equal(np.asarray(image), upright(planes(6, 64, seed=2)[1]))
    assert label == 1
    for number in (10, 2, 1):
        content = {"data": planes(2, 32, number), "labels": [1, 2]}
        write_pickle(tmp_path / "32" / f"train_data_batch_{number}", content, protocol=2)
    np.savez(tmp_path / "32" / "val_data.npz", data=planes(2, 32), labels=np.array([1, 2]))
    train = open_at("imagenet32", tmp_path / "32").train
    assert np.array_equal(np.asarray(train[4][0]), upright(planes(2, 32, 10)[0], 32))
    np.savez(tmp_path / "32" / "train_data_batch_2.npz", data=planes(2, 32, 2), labels=np.array([1, 2]))
    assert len(open_at("imagenet32", tmp_path / "32").train) == 6  # both forms of a batch are read once


def test_class_names_of_small_imagenet_come_from_a_list(tmp_path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("tench\ngoldfish\nshark\n")
    split = open_at("imagenet64", write_small_imagenet(tmp_path / "data"), labels=names)
    assert split.train.labels == ("tench", "goldfish", "shark")
    names.write_text("tench\ngoldfish\n")
    with pytest.raises(DataError, match="needs 3 different names"):
        open_at("imagenet64", tmp_path / "data", labels=names)


def test_a_matlab_file_gives_the_same_upright_images(tmp_path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), dtype=np.uint8)
    with h5py.File(tmp_path / "imdb.mat", "w") as file:  # MATLAB 7.3 stores every axis reversed
        file["images/data"] = images.transpose(0, 3, 2, 1)
        file["images/labels"] = np.array([[1.0], [2], [1], [1], [2], [2]])
        file["images/set"] = np.array([[1.0], [1], [2], [1], [3], [1]])
    split = open_at("imagenet64", tmp_path / "imdb.mat")
    assert [np.asarray(split.train[i][0]).tolist() for i in range(4)] == images[[0, 1, 3, 5]].tolist()
    assert split.train.targets.tolist() == [0, 1, 0, 1]
    assert np.array_equal(np.asarray(split.held_out[1][0]), images[4])


def test_a_matlab_file_that_links_to_another_file_or_holds_text_is_refused(tmp_path) -> None:
    with h5py.File(tmp_path / "imdb.mat", "w") as file:
        file["images"] = h5py.ExternalLink("/etc/passwd", "/images")
    with pytest.raises(DataError, match=r"damaged MATLAB 7\.3 imdb .*link to another file"):
        open_at("imagenet64", tmp_path / "imdb.mat")
    (tmp_path / "text.mat").write_text("no HDF5")
    with pytest.raises(DataError, match=r"damaged MATLAB 7\.3 imdb"):
        open_at("imagenet64", tmp_path / "text.mat")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"labels": [1, 2, 3, 1, 2, 3]}, "holds no data and labels"),
        ({"data": planes(6, 32), "labels": [1] * 6}, "is it of another size than 64 x 64"),
        ({"data": planes(6, 64), "labels": [1] * 5}, "needs one class, counted from 1, for each of its 6"),
        ({"data": planes(6, 64), "labels": [0] * 6}, "needs one class, counted from 1"),
        ({"data": planes(6, 64), "labels": [5] * 6}, "no images of the classes 4"),
    ],
)
def test_an_invalid_batch_of_small_imagenet_is_named(tmp_path, content, message) -> None:
    write_small_imagenet(tmp_path)
    write_pickle(tmp_path / "val_data", content)
    with pytest.raises(DataError, match=message):
        open_at("imagenet64", tmp_path)


def test_missing_paths_and_files_are_named_with_advice(tmp_path) -> None:
    (write_places(tmp_path / "places") / "val_256").rename(tmp_path / "gone")
    (write_small_imagenet(tmp_path / "imagenet") / "val_data").unlink()
    nowhere = tmp_path / "nowhere"
    cases = [
        ("cifar10", None, r"data\.path: not set; give the folder that holds cifar-10"),
        ("cifar10", nowhere, r"no complete cifar-10.*; unpack https://.*\.tar\.gz there"),
        ("cifar100", nowhere, r"no complete cifar-100.*; unpack https://.*\.tar\.gz there"),
        ("places365", None, r"data\.path: not set; give the folder that holds categories"),
        ("places365", tmp_path / "places", "holds no val_256; unpack the images there"),
        ("imagenet64", None, r"data\.path: not set"),
        ("imagenet64", nowhere, r"no such folder or \.mat file"),
        ("imagenet64", tmp_path / "imagenet", "holds no val_data; put the official files there"),
    ]
    for kind, path, message in cases:
        with pytest.raises(ConfigError if path is None else DataError, match=message):
            open_at(kind, path)
