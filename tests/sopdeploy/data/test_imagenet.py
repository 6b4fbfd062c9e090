"""ImageNet as it is distributed: its lists, its development kit, and lines that are not understood."""

import json

import numpy as np
import pytest
from scipy.io import savemat
from typer.testing import CliRunner

from sopdeploy.cli.app import app
from sopdeploy.data.datasets.label_table import read_label_table
from sopdeploy.data.datasets.official import open_imagenet
from sopdeploy.errors import ConfigError, DataError
from sopdeploy.user_files import read_class_names
from tests.sopdeploy.data.small_data import write_imagenet

IDS = ("n00000000", "n00000001")
NAMES = [f"ILSVRC2012_val_{number:08}.JPEG" for number in range(1, 5)]


@pytest.fixture
def root(tmp_path):
    """Two classes with one training image each, and four validation images without a list."""
    write_imagenet(tmp_path, classes=2, train=1, held_out=2)
    (tmp_path / "val.txt").unlink()
    (tmp_path / "val" / "ILSVRC2012_val_00000000.JPEG").rename(tmp_path / "val" / NAMES[-1])
    return tmp_path


def listed(form, classes=(0, 1, 0, 1)):
    return "".join(form.format(name, IDS[target]) + "\n" for name, target in zip(NAMES, classes, strict=True))


def write_kit(folder, truth="2\n1\n2\n1\n"):
    folder.mkdir(parents=True, exist_ok=True)
    kinds = [("ILSVRC2012_ID", object), ("WNID", object), ("num_children", object)]
    classes = np.array([(1, IDS[1], 0), (2, IDS[0], 0), (3, "n00000002", 2)], dtype=kinds)
    savemat(folder / "meta.mat", {"synsets": classes})
    (folder / "ILSVRC2012_validation_ground_truth.txt").write_text(truth)


LAYOUTS = {
    "names and WordNet IDs": lambda root: (root / "val.txt").write_text(listed("{} {}")),
    "names with their folder": lambda root: (root / "val.txt").write_text(listed("val/{} {}")),
    "a byte order mark and CRLF": lambda root: (root / "val.txt").write_text(
        listed("{} {}").replace("\n", "\r\n"), encoding="utf-8-sig", newline=""
    ),
    "Kaggle's list": lambda root: (root / "LOC_val_solution.csv").write_text(
        "ImageId,PredictionString\n" + listed("{},{} 1 2 3 4 ").replace(".JPEG", "")
    ),
    "the development kit": lambda root: write_kit(root / "ILSVRC2012_devkit_t12" / "data"),
    "the files of the kit beside the folders": write_kit,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_validation_images_have_the_classes_of_the_official_files(root, layout):
    LAYOUTS[layout](root)
    images = open_imagenet(root, "held_out")
    assert [images.path(index).name for index in range(4)] == NAMES
    assert (images.labels, images.targets.tolist()) == (IDS, [0, 1, 0, 1])
    checked = CliRunner().invoke(app, ["data", "check", str(root), "--json"])
    assert checked.exit_code == 0, checked.output
    assert [part["count"] for part in json.loads(checked.stdout)["parts"]] == [2, 4]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "images/ILSVRC2012_val_00000002.JPEG n00000001",
            "line 2: 'images/ILSVRC2012.*write a file name and",
        ),
        ("ILSVRC2012_val_00000002.JPEG", "line 2: 'ILSVRC2012_val_00000002.JPEG': write a file name and"),
        ("ILSVRC2012_val_00000002.JPEG n1", "line 2: .*write a file name and a WordNet ID"),
        ("ILSVRC2012_val_00000002.JPEG 65", "line 2: .*a number does not say which class it is; use WordNet"),
        ("# a comment", "line 2: '# a comment': write a file name and"),
        ("ILSVRC2012_val_00000001.JPEG n00000001", "line 2: ILSVRC2012_val_00000001.JPEG is listed twice"),
        ("", "val: ILSVRC2012_val_00000002.JPEG without a line in .*val.txt; add it"),
    ],
)
def test_a_line_that_is_not_understood_stops_with_its_number(root, line, message):
    lines = listed("{} {}").splitlines()
    (root / "val.txt").write_text("\n".join([lines[0], line, *lines[2:]]))
    with pytest.raises(DataError, match=message) as caught:
        open_imagenet(root, "held_out")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (
            lambda root: None,
            "there is no val.txt, LOC_val_solution.csv or .*ground_truth.txt with their classes",
        ),
        (
            lambda root: write_kit(root, "2\n7\n2\n1\n"),
            "ground_truth.txt: line 2: '7' is no ILSVRC2012_ID of",
        ),
        (lambda root: [write_kit(root), (root / "meta.mat").unlink()], "meta.mat: cannot be read .*add this"),
        (lambda root: (root / "val.txt").write_bytes(b"\xff\xfe"), "val.txt: cannot be read .*official file"),
    ],
    ids=["no list", "unknown number", "no meta.mat", "not UTF-8"],
)
def test_a_missing_or_damaged_list_is_one_line_that_names_the_file(root, write, message):
    write(root)
    done = CliRunner().invoke(app, ["data", "check", str(root)])
    assert done.exit_code == 2
    assert "add them" not in done.stderr
    with pytest.raises(DataError, match=message) as caught:
        open_imagenet(root, "held_out")
    assert "\n" not in str(caught.value)


def test_no_reader_of_a_list_drops_a_line_that_it_does_not_understand(root, tmp_path):
    table, names = tmp_path / "labels.csv", tmp_path / "names.json"
    table.write_text("file,classes\nval/ILSVRC2012_val_00000001.JPEG,a\nval/ILSVRC2012_val_00000002.JPEG\n")
    names.write_text('["a", 1]')
    with pytest.raises(DataError, match="line 3"):
        read_label_table(tmp_path)
    with pytest.raises(ConfigError, match="holds no list of names"):
        read_class_names(names)
