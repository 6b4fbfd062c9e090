"""CUB, FGVC-Aircraft, Stanford Cars and ImageNet in their official layouts; subsets of classes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
import torchvision
from typer.testing import CliRunner

from sopdeploy.cli.app import app
from sopdeploy.data.base import Split
from sopdeploy.data.datasets.imagenet import WORDNET_ID, class_aliases
from sopdeploy.data.datasets.layouts import open_evaluation_images
from sopdeploy.data.datasets.small import DigitsConfig
from sopdeploy.data.sources import open_data
from sopdeploy.errors import ConfigError, DataError
from sopdeploy.training.loop import train
from sopdeploy.training.recipe import read_recipe
from tests.sopdeploy.data.small_data import jpeg, write_cifar
from tests.sopdeploy.data.test_data_sets import open_at
from tests.sopdeploy.training.runs import short_recipe

WORDNET_IDS = ("n01440764", "n01443537", "n01484850")


def write(root: Path, texts: dict[str, str], images: list[str]) -> Path:
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    for seed, name in enumerate(images):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(jpeg(seed, (24, 20)))
    return root


def write_cub(folder: Path) -> Path:
    """Three classes of four images, of which the last is a test image."""
    classes = ["001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty_Albatross"]
    names = [f"{name}/{name[4:]}_{n:04}_{1 + n}.jpg" for name in classes for n in range(4)]
    texts = {
        "classes.txt": "".join(f"{n} {name}\n" for n, name in enumerate(classes, 1)),
        "images.txt": "".join(f"{n} {name}\n" for n, name in enumerate(names, 1)),
        "image_class_labels.txt": "".join(f"{n} {1 + (n - 1) // 4}\n" for n in range(1, 13)),
        "train_test_split.txt": "".join(f"{n} {int(n % 4 > 0)}\n" for n in range(1, 13)),
    }
    return write(folder / "CUB_200_2011", texts, [f"images/{name}" for name in names]).parent


def write_aircraft(folder: Path) -> Path:
    variants = ["707-320", "Cessna 172", "F-16A/B"]
    numbers = [f"{1000 + n:07}" for n in range(9)]
    lines = [f"{number} {variants[n % 3]}\n" for n, number in enumerate(numbers)]
    texts = {
        "variants.txt": "\n".join(variants) + "\n",
        "images_variant_trainval.txt": "".join(lines[:6]),
        "images_variant_test.txt": "".join(lines[6:]),
    }
    images = [f"images/{number}.jpg" for number in numbers]
    write(folder / "fgvc-aircraft-2013b" / "data", texts, images)
    return folder / "fgvc-aircraft-2013b"


def cells(*values: object) -> np.ndarray:
    array = np.empty((1, len(values)), dtype=object)
    array[0] = values
    return array


def records(rows: list[dict[str, Any]]) -> np.ndarray:
    array = np.empty((1, len(rows)), dtype=[(key, object) for key in rows[0]])
    for index, row in enumerate(rows):
        array[0, index] = tuple(row.values())
    return array


CARS = ("AM General Hummer SUV 2000", "Acura RL Sedan 2012", "Acura TL Sedan 2012")


def write_cars(folder: Path) -> Path:
    rows = [
        {"relative_im_path": f"car_ims/{n:06}.jpg", "bbox_x1": 3, "class": 1 + n % 3, "test": int(n > 5)}
        for n in range(9)
    ]
    write(folder, {}, [str(row["relative_im_path"]) for row in rows])
    content = {"annotations": records(rows), "class_names": cells(*CARS)}
    scipy.io.savemat(folder / "cars_annos.mat", content)
    return folder


def write_cars_in_parts(folder: Path, test: str = "devkit/cars_test_annos_withlabels.mat") -> Path:
    (folder / "devkit").mkdir(parents=True)
    scipy.io.savemat(folder / "devkit" / "cars_meta.mat", {"class_names": cells(*CARS)})
    for part, file, count in (("cars_train", "devkit/cars_train_annos.mat", 6), ("cars_test", test, 3)):
        rows = [{"bbox_x1": 3, "class": 1 + n % 3, "fname": f"{n:05}.jpg"} for n in range(count)]
        write(folder, {}, [f"{part}/{row['fname']}" for row in rows])
        scipy.io.savemat(folder / file, {"annotations": records(rows)}, do_compression=True)
    return folder


def write_imagenet(folder: Path, labels: str = "official") -> Path:
    """Six training images, and three validation images of the classes 3, 1, 2."""
    names = [f"ILSVRC2012_val_{n:08}" for n in (1, 2, 3)]
    images = [f"train/{name}/{name}_{n}.JPEG" for name in WORDNET_IDS for n in range(2)]
    ids = [WORDNET_IDS[n] for n in (2, 0, 1)]
    devkit = "ILSVRC2012_devkit_t12/data"
    texts = {
        "official": {f"{devkit}/ILSVRC2012_validation_ground_truth.txt": "2\n1\n3\n"},
        "kaggle": {
            "LOC_val_solution.csv": "ImageId,PredictionString\n"
            + "".join(f"{name},{found} 85 1 499 272\n" for name, found in zip(names, ids, strict=True))
        },
        "list": {"val.txt": "".join(f"{n}.JPEG {i}\n" for n, i in zip(names, ids, strict=True))},
    }[labels]
    write(folder, texts, [*images, *(f"val/{name}.JPEG" for name in names)])
    if labels == "official":  # its numbers are not in the order of the WordNet IDs
        rows = [{"ILSVRC2012_ID": n, "WNID": i} for n, i in ((1, ids[1]), (2, ids[0]), (3, ids[2]))]
        scipy.io.savemat(folder / devkit / "meta.mat", {"synsets": records(rows).T})
    return folder


def write_cars_with_test_labels_beside(folder: Path) -> Path:
    return write_cars_in_parts(folder, "cars_test_annos_withlabels.mat")


def write_imagenet_of_kaggle(folder: Path) -> Path:
    return write_imagenet(folder, "kaggle")


def write_imagenet_with_list(folder: Path) -> Path:
    return write_imagenet(folder, "list")


BIRDS = ("001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty_Albatross")
GROUND_TRUTH = "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt"
LAYOUTS: list[tuple[str, Callable[[Path], Path], tuple[str, ...], list[int], list[int]]] = [
    ("cub", write_cub, BIRDS, [3] * 3, [0, 1, 2]),
    ("aircraft", write_aircraft, ("707-320", "Cessna 172", "F-16A/B"), [2] * 3, [0, 1, 2]),
    ("cars", write_cars, CARS, [2] * 3, [0, 1, 2]),
    ("cars", write_cars_in_parts, CARS, [2] * 3, [0, 1, 2]),
    ("cars", write_cars_with_test_labels_beside, CARS, [2] * 3, [0, 1, 2]),
    ("imagenet", write_imagenet, WORDNET_IDS, [2] * 3, [2, 0, 1]),
    ("imagenet", write_imagenet_of_kaggle, WORDNET_IDS, [2] * 3, [2, 0, 1]),
    ("imagenet", write_imagenet_with_list, WORDNET_IDS, [2] * 3, [2, 0, 1]),
]


@pytest.mark.parametrize(("kind", "make", "labels", "counts", "held_out"), LAYOUTS)
def test_an_official_layout_is_read_and_checked(tmp_path, kind, make, labels, counts, held_out) -> None:
    root = make(tmp_path / "data")
    split = open_at(kind, root)
    assert split.train.labels == split.held_out.labels == labels
    assert split.train.class_counts().tolist() == counts
    assert split.held_out.targets.tolist() == held_out
    files = {part.path(index) for part in (split.train, split.held_out) for index in range(len(part))}
    assert len(files) == len(split.train) + len(split.held_out)
    assert all(split.train[index][0].size == (24, 20) for index in range(len(split.train)))
    for text in (label.partition(".")[2] for label in labels if "." in label):
        assert sum(text in str(path) for path in files) == 4
    checked = CliRunner().invoke(app, ["data", "check", str(root), "--json"])
    assert checked.exit_code == 0, checked.stderr
    parts = {part["name"]: part["count"] for part in json.loads(checked.stdout)["parts"]}
    assert list(parts.values()) == [len(split.train), len(split.held_out)]
    with pytest.raises(ConfigError, match=rf"is an official layout; set data.kind={kind}"):
        open_at("folder", root)


BIRD = "CUB_200_2011/images/001.Black_footed_Albatross/Black_footed_Albatross_0000_1.jpg"
FAULTS: list[tuple[str, Callable[[Path], Path], str, str | None, str]] = [
    (
        "cub",
        write_cub,
        "CUB_200_2011/train_test_split.txt",
        None,
        "holds no train_test_split.txt; give the folder",
    ),
    (
        "cub",
        write_cub,
        "CUB_200_2011/classes.txt",
        "1 a\n2\n",
        "line 2 does not have a new number and a text",
    ),
    ("cub", write_cub, "CUB_200_2011/classes.txt", "1 a\n2 b\n", "image 9 has class 3 and split 1"),
    (
        "cub",
        write_cub,
        "CUB_200_2011/image_class_labels.txt",
        "1 1\n",
        "lists other images than the files next",
    ),
    ("cub", write_cub, BIRD, None, "0000_1.jpg: does not exist; unpack the official"),
    (
        "aircraft",
        write_aircraft,
        "data/images_variant_test.txt",
        "0001006 Boeing\n",
        "line 1: 'Boeing' is not in variants",
    ),
    (
        "aircraft",
        write_aircraft,
        "data/images_variant_test.txt",
        "0001006 707-320\n",
        "no images of the class Cessna 172",
    ),
    (
        "aircraft",
        write_aircraft,
        "data/images_variant_test.txt",
        "../x 707-320\n",
        "is not the name of an image in the folder",
    ),
    ("aircraft", write_aircraft, "data/variants.txt", None, "variants.txt: cannot be read"),
    ("cars", write_cars, "cars_annos.mat", "MATLAB", "damaged MATLAB file"),
    (
        "cars",
        write_cars_in_parts,
        "devkit/cars_test_annos_withlabels.mat",
        None,
        "the classes of the test images; put it there",
    ),
    (
        "imagenet",
        write_imagenet,
        "ILSVRC2012_devkit_t12/data/meta.mat",
        None,
        "meta.mat: missing, it names the classes",
    ),
    ("imagenet", write_imagenet, GROUND_TRUTH, "2\n1\n7\n", "'7' is not a number of a class"),
    (
        "imagenet",
        write_imagenet_with_list,
        "val.txt",
        "ILSVRC2012_val_00000001.JPEG 65\n",
        "'65' is not a WordNet ID",
    ),
    ("imagenet", write_imagenet_with_list, "val.txt", None, "holds no ILSVRC2012_validation_ground_truth"),
]


@pytest.mark.parametrize(
    ("kind", "make", "file", "text", "message"), FAULTS, ids=[fault[4] for fault in FAULTS]
)
def test_a_fault_in_an_official_layout_is_one_line(tmp_path, kind, make, file, text, message) -> None:
    root = make(tmp_path / "data")
    (root / file).unlink()
    if text is not None:
        (root / file).write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        open_at(kind, root)
    assert "\n" not in str(caught.value)


def test_a_run_on_two_of_three_birds_is_evaluated_on_the_official_test_images(tmp_path) -> None:
    root = write_cub(tmp_path)
    names = tmp_path / "two.txt"
    names.write_text("003.Sooty_Albatross\n001.Black_footed_Albatross\n")
    recipe = short_recipe("epochs=1", "data.kind=cub", f"data.path={root}", f"data.classes={names}")
    best = train(recipe, tmp_path / "run").best
    done = CliRunner().invoke(app, ["eval", str(best), "--data", str(root), "--heads", "--json"])
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert [one["label"] for one in found["classes"]] == ["001.Black_footed_Albatross", "003.Sooty_Albatross"]
    assert (found["count"], found["heads"][0]["top1"]["count"]) == (2, 2)


def test_imagenet_names_of_torchvision_match_wordnet_ids_in_their_order(tmp_path) -> None:
    names = tuple(torchvision.models.ResNet18_Weights.IMAGENET1K_V1.meta["categories"])
    ids = sorted(name for name in class_aliases() if WORDNET_ID.fullmatch(name))
    lines = [f"{number}.JPEG {ids[999 - number]}" for number in range(1000)]
    (tmp_path / "val").mkdir()
    (tmp_path / "val.txt").write_text("\n".join(lines))
    for number in range(1000):
        (tmp_path / "val" / f"{number}.JPEG").touch()
    assert [class_aliases()[wordnet_id] for wordnet_id in ids] == list(names)
    for order in (names, tuple(sorted(names))):
        images = open_evaluation_images(tmp_path, order)
        assert images.labels == order
        assert [images.labels[target] for target in images.targets] == [names[999 - n] for n in range(1000)]
    for wordnet_id in ids:
        (tmp_path / "sorted" / wordnet_id).mkdir(parents=True)
        (tmp_path / "sorted" / wordnet_id / "1.JPEG").touch()
    in_folders = open_evaluation_images(tmp_path / "sorted", names)
    assert [in_folders.labels[target] for target in in_folders.targets] == list(names)
    assert open_evaluation_images(tmp_path / "sorted", tuple(ids)).labels == tuple(ids)


def digits(classes: int | Path | None) -> Split:
    return open_data(DigitsConfig(kind="digits", classes=classes))


def classes_of(split: Split) -> list[str]:
    return [split.train.labels[target] for target in split.train.targets]


def test_a_subset_of_classes_keeps_images_and_order_of_every_kind_of_data(tmp_path, monkeypatch) -> None:
    write_cifar(tmp_path, "cifar10", monkeypatch)
    for whole, some in (
        (open_at("cifar10", tmp_path), open_at("cifar10", tmp_path, classes=4)),
        (digits(None), digits(4)),
        (open_at("cub", write_cub(tmp_path)), open_at("cub", tmp_path, classes=2)),
    ):
        kept = some.train.labels
        assert len(kept) == min(4, len(whole.train.labels) - 1)
        assert kept == tuple(label for label in whole.train.labels if label in kept)
        assert classes_of(some) == [label for label in classes_of(whole) if label in kept]
        index = classes_of(whole).index(classes_of(some)[0])
        assert np.array_equal(some.train[0][0], whole.train[index][0])
        assert some.train[0][1] == some.train.targets[0]
    assert digits(4).train.labels == ("2", "3", "6", "9")


def test_an_invalid_subset_is_one_line_and_an_unset_one_is_not_stored(tmp_path) -> None:
    (tmp_path / "names.txt").write_text("1\nten\n")
    (tmp_path / "one.txt").write_text("1\n1\n")
    for classes, message in (
        (11, "11, but the data have 10 classes"),
        (tmp_path / "names.txt", "'ten' is no class of the data; write names such as '0'"),
        (tmp_path / "one.txt", "names fewer than two classes"),
        (tmp_path / "none.txt", "none.txt: cannot be read"),
    ):
        with pytest.raises(DataError, match=message):
            digits(classes)
    recipe = short_recipe()
    assert "classes" not in recipe.model_dump(mode="json")["data"]
    assert short_recipe("data.classes=3").model_dump(mode="json")["data"]["classes"] == 3
    with pytest.raises(ConfigError, match="hold_out: unknown key"):
        read_recipe("photos", ["data.kind=cub", "data.hold_out=0.1"])
    photos = read_recipe("photos", ["data.kind=cub"]).data
    assert photos.kind == "cub"
