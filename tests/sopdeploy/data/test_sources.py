"""CIFAR, FGVC-Aircraft, Stanford Cars and Places365 in their official layouts."""

import json
import pickle  # noqa: TID251  # the official files are pickles
from pathlib import Path

import numpy as np
import pydantic
import pytest
import torchvision
from typer.testing import CliRunner

from sopdeploy.data.folders.evaluation_images import class_aliases, open_evaluation_images
from sopdeploy.data.photos.photo import Split
from sopdeploy.data.sources import (
    DataConfig,
    DigitsConfig,
    FolderConfig,
    kind_of_folder,
    open_data,
)
from sopdeploy.errors import ConfigError, DataError
from sopdeploy.training.settings.recipe import read_recipe
from sopdeploy.training.settings.recipe_files import list_recipes
from sopdeploy_commands.app import app
from sopdeploy_commands.train_request import TrainOptions, configure, read_changes
from tests.support.small_data import write_aircraft, write_cifar, write_places


def open_at(kind, path, **settings):
    config = {"kind": kind, "path": path, **settings}
    return open_data(pydantic.TypeAdapter(DataConfig).validate_python(config))


@pytest.mark.parametrize(
    ("kind", "classes", "train", "test", "key"),
    [("cifar10", 10, 20, "test_batch", "labels"), ("cifar100", 100, 4, "test", "fine_labels")],
)
def test_the_official_cifar_layout_is_read_and_a_changed_file_refused(
    tmp_path, monkeypatch, kind, classes, train, test, key
) -> None:
    folder = write_cifar(tmp_path, kind, monkeypatch)
    split = open_at(kind, tmp_path)
    assert split.train.labels == tuple(f"class {number}" for number in range(classes))
    assert (len(split.train), len(split.held_out)) == (train, 4)

    stored = pickle.loads((folder / test).read_bytes())  # noqa: S301
    assert np.array_equal(
        np.asarray(split.held_out.photo(2).pixels).transpose(2, 0, 1).reshape(-1),
        stored["data"][2],
    )
    assert split.held_out.targets[2] == stored[key][2]

    (folder / ("data_batch_3" if kind == "cifar10" else "train")).write_bytes(
        b"cos\nsystem\n(S'false'\ntR."
    )
    with pytest.raises(DataError, match="cifar-10"):
        open_at(kind, tmp_path)


OFFICIAL = {
    # kind: labels, training images of each class, size of an image
    "aircraft": (("707-320", "Cessna 172", "F-16A/B"), 2, (24, 20)),
    "places365": (("abbey", "apartment-outdoor", "bar"), 4, (64, 64)),
}


@pytest.mark.parametrize("kind", OFFICIAL)
def test_an_official_layout_is_read_and_recognized(tmp_path, monkeypatch, kind) -> None:
    write_places(tmp_path, monkeypatch) if kind == "places365" else write_aircraft(tmp_path)
    labels, each, size = OFFICIAL[kind]
    split = open_at(kind, tmp_path)

    assert split.train.labels == split.held_out.labels == labels
    assert split.train.class_counts().tolist() == [each] * 3
    assert split.held_out.targets.tolist() == [0, 1, 2]

    files = {
        part.path(index) for part in (split.train, split.held_out) for index in range(len(part))
    }
    assert len(files) == len(split.train) + len(split.held_out)
    assert all(split.train.photo(index).image.size == size for index in range(len(split.train)))

    held_out = open_evaluation_images(tmp_path, labels[::-1])
    assert held_out.labels == labels[::-1]
    assert held_out.targets.tolist() == [2, 1, 0]

    checked = CliRunner().invoke(app, ["train", "--dry-run", "--data", str(tmp_path), "--json"])
    assert checked.exit_code == 0, checked.stderr
    assert [part["count"] for part in json.loads(checked.stdout)["parts"]] == [3 * each, 3]
    assert open_at("folder", tmp_path).held_out.targets.tolist() == [0, 1, 2]


def test_a_missing_or_damaged_official_file_is_one_line(tmp_path) -> None:
    write_aircraft(tmp_path / "aircraft")
    (tmp_path / "aircraft/fgvc-aircraft-2013b/data/variants.txt").write_text("Boeing\n")
    (tmp_path / "empty").mkdir()

    for kind, path, message in (
        (
            "aircraft",
            "aircraft",
            r"FGVCAircraft cannot read the trainval images \('707-320'\); use the",
        ),
        ("places365", "empty", "Places365 cannot read the train-standard images"),
        ("cifar100", "empty", r"no complete cifar-100.*; unpack https://.*\.tar\.gz there"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            open_at(kind, tmp_path / path)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"data\.path"):
        open_at("aircraft", None)


def test_imagenet_names_of_torchvision_match_wordnet_ids_in_their_order(tmp_path) -> None:
    names = tuple(torchvision.models.ResNet18_Weights.IMAGENET1K_V1.meta["categories"])
    ids = sorted(name for name, other in class_aliases().items() if other in names)
    assert [class_aliases()[wordnet_id] for wordnet_id in ids] == list(names)

    for wordnet_id in ids:
        (tmp_path / wordnet_id).mkdir()
        (tmp_path / wordnet_id / "1.JPEG").touch()
    (tmp_path / ids[0]).rename(tmp_path / names[0])  # names and IDs may be mixed
    lines: list[str] = []
    in_folders = open_evaluation_images(tmp_path, (*names, "unicorn"), log=lines.append)

    assert sorted(in_folders.labels[target] for target in in_folders.targets) == sorted(names)
    [line] = lines
    assert line.startswith(f"{tmp_path}: ")
    assert line.endswith(": unicorn")

    (tmp_path / names[0]).rename(tmp_path / ids[0])
    assert open_evaluation_images(tmp_path, tuple(ids)).labels == tuple(ids)


def digits(classes: int | Path | None) -> Split:
    return open_data(DigitsConfig(kind="digits", classes=classes))


def classes_of(split: Split) -> list[str]:
    return [split.train.labels[target] for target in split.train.targets]


def test_a_subset_of_classes_keeps_images_and_order(tmp_path, monkeypatch) -> None:
    write_cifar(tmp_path, "cifar10", monkeypatch)
    for whole, some in (
        (open_at("cifar10", tmp_path), open_at("cifar10", tmp_path, classes=4)),
        (digits(None), digits(4)),
        (
            open_at("aircraft", write_aircraft(tmp_path)),
            open_at("aircraft", tmp_path, classes=2),
        ),
    ):
        kept = some.train.labels
        assert len(kept) == min(4, len(whole.train.labels) - 1)
        assert kept == tuple(label for label in whole.train.labels if label in kept)
        assert classes_of(some) == [label for label in classes_of(whole) if label in kept]
        index = classes_of(whole).index(classes_of(some)[0])
        assert np.array_equal(some.train.read(0), whole.train.read(index))

    assert digits(4).train.labels == ("2", "3", "6", "9")


def test_an_invalid_subset_is_one_line() -> None:
    with pytest.raises(DataError, match="11"):
        digits(11)
    with pytest.raises(ConfigError, match="hold_out: "):
        read_recipe("photos", ["data.kind=cars", "data.hold_out=0.1"])


@pytest.fixture
def class_folders(tmp_path: Path) -> Path:
    """A folder of class folders, in which no data set of a library has its files."""
    folder = tmp_path / "photos"
    for label in ("cat", "dog"):
        (folder / label).mkdir(parents=True)
    return folder


@pytest.mark.parametrize("recipe", list_recipes())
def test_every_recipe_reads_class_folders_without_a_setting(
    recipe: str, class_folders: Path
) -> None:
    configured, given = configure(read_changes(class_folders, recipe, TrainOptions()))

    assert isinstance(configured.data, FolderConfig)
    assert configured.data.path == class_folders
    assert "data.kind" not in given.changes  # the user said nothing about it


def test_a_recipe_keeps_its_data_source_where_its_files_are(
    tmp_path: Path, class_folders: Path
) -> None:
    (tmp_path / "cifar" / "cifar-10-batches-py").mkdir(parents=True)
    (tmp_path / "places").mkdir()
    (tmp_path / "places" / "categories_places365.txt").touch()
    (tmp_path / "empty").mkdir()

    kinds = {
        ("cifar", "cifar10"): "cifar10",
        ("places", "places365"): "places365",
        ("empty", "cifar10"): "cifar10",  # its error names the archive to unpack
        ("empty", "digits"): "folder",  # the digits have no folder
        ("photos", "cifar10"): "folder",
        ("photos", "folder"): "folder",
    }

    found = {(name, kind): kind_of_folder(tmp_path / name, kind) for name, kind in kinds}
    assert found == kinds

    options = TrainOptions(set=("data.kind=aircraft",))
    configured, _ = configure(read_changes(class_folders, "cifar10-dsop-resnet20", options))
    assert configured.data.kind == "aircraft"


def test_as_many_classes_as_the_data_have_are_all_of_them() -> None:
    assert digits(10).train.labels == digits(None).train.labels
    with pytest.raises(DataError, match="10 classes"):
        digits(11)
