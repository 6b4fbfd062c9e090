"""Names of projects: from the data folder, from `--name`, or from the recipe."""

from pathlib import Path
from typing import Any

import pytest

from sopdeploy.base.project import check_project_name, file_project, folder_project, utc_now
from sopdeploy.errors import ConfigError
from sopdeploy_commands.train_request import TrainOptions, configure, read_changes

FOLDERS = {
    "photos": "photos",
    "photos/": "photos",
    "/srv/clothing/train": "clothing",
    "/srv/clothing/Training": "clothing",
    "data": "data",
    "My photos (2026)": "My-photos-2026",
    ".hidden": "hidden",
    "größe": "gr-e",
    "фото": "",
    "/": "",
    "/train": "",
    "x" * 255: "x" * 200,
    "hats-202611261427": "hats.202611261427",  # 12 hexadecimal digits end the name of a bundle
    "hats-20261126": "hats-20261126",
}


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_data_folder_names_the_project(folder: str) -> None:
    name = folder_project(Path(folder))

    assert name == FOLDERS[folder]
    assert not name or check_project_name(name) == name


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("weights/hats.pt", "hats"),
        ("hats-3f6c01d2.pth.tar", "hats-3f6c01d2"),
        ("hats (v2).safetensors", "hats-v2"),
        ("hats-202611261427.pth", "hats.202611261427"),
        ("фото.pth", "network"),
    ],
)
def test_a_weight_file_names_the_project(file: str, name: str) -> None:
    assert file_project(Path(file)) == check_project_name(name) == name


def test_folders_that_are_given_relative_to_the_working_folder_have_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = tmp_path / "hats" / "train"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    (tmp_path / "current").symlink_to(inner)
    found = [
        folder_project(Path(path)) for path in (".", "..", "../train", tmp_path / "current")
    ]

    assert found == ["hats", "hats", "hats", "current"]


def test_a_file_in_the_home_folder_belongs_to_this_project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "hats"))
    (tmp_path / "hats").mkdir()
    (tmp_path / "hats" / "images.parquet").touch()

    assert folder_project(Path("~/images.parquet")) == "hats"


CONFIGURED: dict[str, tuple[dict[str, Any], str]] = {
    "data folder": ({"data": "some/hats"}, "hats"),
    "data folder and recipe": ({"data": "some/hats", "recipe": "photos-dsop"}, "hats"),
    "data folder without a usable name": ({"data": "фото"}, "photos"),
    "recipe without a folder": ({"recipe": "digits-dsop"}, "digits-dsop"),
    "name": ({"data": "some/hats", "name": "shoes"}, "shoes"),
    "setting": ({"data": "some/hats", "set": ["project=shoes"]}, "shoes"),
}


@pytest.mark.parametrize("case", CONFIGURED)
def test_train_names_the_project_by_name_folder_or_recipe(case: str) -> None:
    given, expected = CONFIGURED[case]
    options = TrainOptions(name=given.get("name"), set=given.get("set", ()))
    recipe = configure(read_changes(given.get("data"), given.get("recipe"), options))[0]

    assert recipe.project == expected


@pytest.mark.parametrize("name", ["", "a b", ".hidden", "a/b", "a\n", "größe", "x" * 201])
def test_a_name_with_other_characters_is_an_error(name: str) -> None:
    with pytest.raises(ConfigError, match=r"^name=.*: .*200 letters"):
        check_project_name(name)
    with pytest.raises(ConfigError, match="200 letters"):
        configure(read_changes(Path("hats"), None, TrainOptions(set=[f"project={name!r}"])))


def test_times_are_utc_and_sort_as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    before = utc_now()
    assert before <= utc_now() < "3"

    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1767323045")
    assert utc_now() == "2026-01-02T03:04:05.000000Z"

    for given in ("", "today", "9" * 20):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", given)
        with pytest.raises(ConfigError, match="SOURCE_DATE_EPOCH"):
            utc_now()
