"""Photos that a server kept, in the folders into which somebody moved them: which train, and which decide."""

import json
from pathlib import Path

import pytest

from sopdeploy.data.folders.folder import open_folder
from sopdeploy.data.photos.kept import (
    LABEL_CONFIG,
    decides,
    image_id,
    is_kept_as_unsure,
    is_sampled,
    kept_id,
)
from sopdeploy.data.photos.photo import Split
from sopdeploy.errors import DataError
from sopdeploy.training.division import leave_out_deciding
from sopdeploy.training.settings.recipe import read_recipe
from tests.support.small_data import jpeg

ID = "0123456701234567" + "8" * 16  # its second eight digits are odd
EVEN = "0123456701234566" + "8" * 16

# The name of a file; whether it is of the sample, was kept as unsure, and decides
NAMES = {
    "cat.jpg": (False, False, False),
    f"{ID}.jpg": (False, True, False),
    f"{EVEN}.png": (False, True, False),
    f"{ID}-sample.jpg": (True, False, False),
    f"{EVEN}-sample.png": (True, False, True),
    f"{EVEN}-sample (1).png": (True, False, True),
    f"{EVEN}-sample copy.png": (True, False, True),
    f"{ID}-2.jpg": (False, True, False),
    "holiday-sample.jpg": (False, False, False),
}


@pytest.mark.parametrize("name", NAMES)
def test_the_name_of_a_photo_tells_what_it_is_for(name: str) -> None:
    assert (is_sampled(name), is_kept_as_unsure(name), decides(name)) == NAMES[name]


def test_half_of_the_sample_decides() -> None:
    names = [f"{image_id(b'%d' % number)}-sample.jpg" for number in range(4000)]
    assert abs(sum(map(decides, names)) - 2000) < 100


def write_photos(root: Path, label: str, names: list[str]) -> None:
    (root / label).mkdir(parents=True)
    for number, name in enumerate(names):
        (root / label / name).write_bytes(
            jpeg(100 * len(label) + number + 10 * ord(label[0]), (32, 24))
        )


def test_a_classifier_trains_on_the_whole_sample_and_a_loop_on_half_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = [f"{EVEN}-sample.jpg", f"{ID}-sample.jpg", f"{ID[::-1]}.jpg"]
    write_photos(tmp_path, "cat", ["1.jpg", "2.jpg", *kept])
    # Of a class that would have one photo, none is left out.
    write_photos(tmp_path, "dog", ["1.jpg", f"{EVEN}-sample.png"])
    # What a server writes beside a photo may move with it.
    task = {"data": {"image": f"/data/local-files/?d=kept/cat/{ID}-sample.jpg"}}
    (tmp_path / "cat" / f"{ID}-sample.json").write_text(json.dumps(task))

    opened = open_folder(tmp_path)
    few_shot = read_recipe("photos", ["procedure.kind=few_shot"])
    loop = read_recipe("photos", ["procedure.kind=loop"])
    all_names = {"1.jpg", "2.jpg", *kept, f"{EVEN}-sample.png"}
    assert not opened.notes  # none says that the record is not an image
    assert names_of(leave_out_deciding(few_shot, opened)) == all_names
    assert names_of(leave_out_deciding(loop, opened)) == all_names - {kept[0]}

    # A bundle could not record the answers for more.
    monkeypatch.setattr("sopdeploy.training.division.MAX_RECORDED", 2)
    assert names_of(leave_out_deciding(few_shot, opened)) == all_names - {kept[0]}


@pytest.mark.parametrize(("named", "meant"), [("folder", "folders"), ("path", "paths")])
def test_a_misspelled_reading_is_no_regular_expression(
    tmp_path: Path, named: str, meant: str
) -> None:
    for label in ("cat", "dog"):
        write_photos(tmp_path, label, ["1.jpg", "2.jpg"])
    with pytest.raises(DataError, match=rf"\b{meant}\b"):
        open_folder(tmp_path, classes_from=named)


def names_of(split: Split) -> set[str]:
    return {Path(split.train.identity(index)).name for index in range(len(split.train))}


def test_the_folder_of_a_server_is_not_training_data_without_labels(tmp_path: Path) -> None:
    photos = [f"{image_id(label.encode() * 2)}.jpg" for label in ("cat", "dog", "eel", "fox")]
    write_photos(tmp_path, "cat", photos[:2])
    write_photos(tmp_path, "dog", photos[2:])
    (tmp_path / LABEL_CONFIG).write_text("<View></View>")

    with pytest.raises(DataError, match="predictions, not labels"):
        open_folder(tmp_path)

    # A table has the labels, such as an export of Label Studio.
    labels = ["eel", "fox", "fox", "eel"]
    rows = [
        f"/data/local-files/?d=kept/x/{name},{label}"
        for name, label in zip(photos, labels, strict=True)
    ]
    table = tmp_path.parent / f"{tmp_path.name}.csv"
    table.write_text("\n".join(["image,class", *rows]))
    split = open_folder(tmp_path, classes_from=str(table))

    assert split.train.labels == ("eel", "fox")
    assert len(split.train) == 4
    assert kept_id(split.train.identity(0)) == kept_id(photos[0])

    # With several classes per image, Label Studio exports a cell of JSON.
    table.write_text(
        "\n".join(
            [
                "image,class",
                *rows[1:],
                rows[0].replace("eel", '"{""choices"":[""eel"",""fox""]}"'),
            ]
        )
    )
    split = open_folder(tmp_path, classes_from=str(table))

    assert split.train.labels == ("eel", "fox")
    assert split.train.targets.sum(axis=1).tolist() == [1, 1, 1, 2]
