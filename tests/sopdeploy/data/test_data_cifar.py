import pickle  # noqa: TID251  # the official files are pickles

import numpy as np
import pytest

from sopdeploy.data.datasets.small import CifarConfig, open_cifar
from sopdeploy.errors import ConfigError, DataError
from tests.sopdeploy.data.small_data import write_cifar


@pytest.fixture(params=["cifar10", "cifar100"])
def small_cifar(request, tmp_path, monkeypatch):
    """Write a few random images in the official layout and let torchvision accept their checksums."""
    root = write_cifar(tmp_path, request.param, monkeypatch)
    return CifarConfig(kind=request.param, path=tmp_path), root


def test_the_official_cifar_layout_is_read(small_cifar) -> None:
    config, root = small_cifar
    split = open_cifar(config)
    classes = 10 if config.kind == "cifar10" else 100
    assert split.train.labels == tuple(f"class {number}" for number in range(classes))
    assert (len(split.train), len(split.held_out)) == (20 if classes == 10 else 4, 4)
    name = "test_batch" if classes == 10 else "test"
    stored = pickle.loads((root / name).read_bytes())  # noqa: S301
    image, label = split.held_out[2]
    assert np.array_equal(np.asarray(image).transpose(2, 0, 1).reshape(-1), stored["data"][2])
    assert label == stored["labels" if classes == 10 else "fine_labels"][2]


def test_a_modified_cifar_file_is_refused_before_it_is_unpickled(small_cifar) -> None:
    config, root = small_cifar
    name = "data_batch_3" if config.kind == "cifar10" else "train"
    (root / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(DataError, match="holds no complete cifar-10"):
        open_cifar(config)


@pytest.mark.parametrize("kind", ["cifar10", "cifar100"])
def test_a_missing_cifar_folder_is_named_with_its_url(tmp_path, kind) -> None:
    with pytest.raises(DataError, match=r"holds no complete cifar-10.*; unpack https://.*\.tar\.gz there"):
        open_cifar(CifarConfig(kind=kind, path=tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"data\.path: not set; give the folder that holds cifar-10"):
        open_cifar(CifarConfig(kind=kind))
