"""Downsampled ImageNet: pickles, .npz and GM-SOP's .mat."""

import numpy as np
import pytest

from sopdeploy.data.datasets.small_imagenet import SmallImageNetConfig, open_small_imagenet
from sopdeploy.errors import ConfigError, DataError
from tests.sopdeploy.data.small_data import planes, write_pickle, write_small_imagenet

h5py = pytest.importorskip("h5py")


def open_at(path, **settings):
    kind = settings.pop("kind", "imagenet64")
    return open_small_imagenet(SmallImageNetConfig(kind=kind, path=path, **settings))


def test_official_pickles_are_read_in_order(tmp_path) -> None:
    split = open_at(write_small_imagenet(tmp_path))
    assert (len(split.train), len(split.held_out)) == (12, 6)
    assert split.train.labels == ("0001", "0002", "0003")
    assert split.train.targets.tolist() == [0, 1, 2] * 4
    image, label = split.train[7]
    expected = planes(6, 64, seed=2)[1].reshape(3, 64, 64).transpose(1, 2, 0)
    assert np.array_equal(np.asarray(image), expected)
    assert label == 1


def test_batches_are_sorted_by_number(tmp_path) -> None:
    for number in (10, 2, 1):
        content = {"data": planes(2, 32, number), "labels": [1, 2]}
        write_pickle(tmp_path / f"train_data_batch_{number}", content, protocol=2)
    np.savez(tmp_path / "val_data.npz", data=planes(2, 32), labels=np.array([1, 2]))
    train = open_at(tmp_path, kind="imagenet32").train
    expected = planes(2, 32, 10)[0].reshape(3, 32, 32).transpose(1, 2, 0)
    assert np.array_equal(np.asarray(train[4][0]), expected)


def test_class_names_come_from_a_list(tmp_path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("tench\ngoldfish\nshark\n")
    split = open_at(write_small_imagenet(tmp_path / "data"), labels=names)
    assert split.train.labels == ("tench", "goldfish", "shark")
    names.write_text("tench\ngoldfish\n")
    with pytest.raises(DataError, match="needs 3 different names"):
        open_at(tmp_path / "data", labels=names)


def write_imdb(path, images, sets, labels) -> None:
    """Write *images* (N, height, width, 3) as MATLAB 7.3 does: every axis reversed."""
    with h5py.File(path, "w") as file:
        group = file.create_group("images")
        group["data"] = images.transpose(0, 3, 2, 1)
        group["labels"] = np.asarray(labels, dtype=np.float64)[:, None]
        group["set"] = np.asarray(sets, dtype=np.float64)[:, None]


def test_a_matlab_file_gives_the_same_upright_images(tmp_path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), dtype=np.uint8)
    write_imdb(tmp_path / "imdb.mat", images, [1, 1, 2, 1, 3, 1], [1, 2, 1, 1, 2, 2])
    split = open_at(tmp_path / "imdb.mat")
    assert [np.asarray(split.train[i][0]).tolist() for i in range(4)] == images[[0, 1, 3, 5]].tolist()
    assert split.train.targets.tolist() == [0, 1, 0, 1]
    assert np.array_equal(np.asarray(split.held_out[1][0]), images[4])


def test_a_matlab_file_that_links_to_another_file_is_refused(tmp_path) -> None:
    with h5py.File(tmp_path / "imdb.mat", "w") as file:
        file["images"] = h5py.ExternalLink("/etc/passwd", "/images")
    with pytest.raises(DataError, match=r"damaged MATLAB 7\.3 imdb .*link to another file"):
        open_at(tmp_path / "imdb.mat")
    (tmp_path / "text.mat").write_text("no HDF5")
    with pytest.raises(DataError, match=r"damaged MATLAB 7\.3 imdb"):
        open_at(tmp_path / "text.mat")


WRONG = [
    ({"labels": [1, 2, 3, 1, 2, 3]}, "holds no data and labels"),
    ({"data": planes(6, 32), "labels": [1] * 6}, "is it of another size than 64 x 64"),
    ({"data": planes(6, 64), "labels": [1] * 5}, "needs one class, counted from 1, for each of its 6"),
    ({"data": planes(6, 64), "labels": [0] * 6}, "needs one class, counted from 1"),
    ({"data": planes(6, 64), "labels": [5] * 6}, "no images of the classes 4"),
]


@pytest.mark.parametrize(("content", "message"), WRONG, ids=[message for _, message in WRONG])
def test_an_invalid_batch_is_named(tmp_path, content, message) -> None:
    write_small_imagenet(tmp_path)
    write_pickle(tmp_path / "val_data", content)
    with pytest.raises(DataError, match=message):
        open_at(tmp_path)


def test_missing_files_are_named(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"data\.path: not set"):
        open_at(None)
    with pytest.raises(DataError, match=r"no such folder or \.mat file"):
        open_at(tmp_path / "nowhere")
    write_small_imagenet(tmp_path / "data")
    (tmp_path / "data" / "val_data").unlink()
    with pytest.raises(DataError, match="holds no val_data; put the official files there"):
        open_at(tmp_path / "data")
