"""One rule for names: what training accepts, a checkpoint, a bundle accept, too."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydantic
import pytest
import torch
from PIL import Image

from sopdeploy.base.files import move_link, target_of
from sopdeploy.base.names import (
    class_problem,
    is_bundle_name,
    label_problem,
    link_problem,
    project_problem,
    read_labels,
    without_bundle_end,
)
from sopdeploy.base.project import check_project_name
from sopdeploy.data.folders.check import check_data
from sopdeploy.data.folders.folder import open_folder
from sopdeploy.data.photos.photo import ArrayImages, Split
from sopdeploy.errors import ConfigError, DataError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.weights.checkpoint import Checkpoint
from sopdeploy.weights.class_names import read_class_names

ACCEPTED = (
    "hat", "red hat", "Schuhé 👟", "e\u0301toile", "人", "\u0645\u06cc\u200c\u062e", "👩\u200d🔧", "❤\ufe0f",
    "a/b", "C:", "3", "…", "\u05d0\u200f", "\ufeffhat", " hat ", "x" * 1000, "\u0661", "ä" * 100,
)  # fmt: skip
REFUSED = {
    "a tab": "h\tat",
    "a line": "h\nat",
    "a null byte": "h\0at",
    "an escape": "\x1b[31m",
    "a C1 control": "h\x9bat",
    "a surrogate": "h\udc80at",
    "a line separator": "h\u2028at",
    "nothing": "",
    "spaces": "  ",
    "a no-break space": "\xa0",
    "a filler": "\u3164",
    "another filler": "\u115f",
    "a halfwidth filler": "\uffa0",
    "fillers and spaces": "\u3164 \u1160",
    "an empty braille pattern": "\u2800",
    "a zero-width space": "\u200b",
    "a word joiner": "\u2060",
    "a soft hyphen": "\xad",
    "a mark alone": "\u0301",
    "a variation selector": "\ufe0f",
    "a selector of plane 14": "\U000e0100",
    "a tag": "\U000e0041",
    "an empty note": "\U0001d159",
    "a right-to-left mark": "\u200f",
    "an invisible plus": "\u2064",
    "a grapheme joiner": "\u034f",
    "an unassigned character": "\U000e0fff",
    "a Khmer vowel": "\u17b4",
    "a long name": "x" * 1001,
    "a Mongolian separator": "\u180e",
}


def folder_of(tmp_path: Path, name: str) -> Path:
    for label in (name, "other"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for number in range(2):
            pixels = np.full((8, 8, 3), 10 * number + len(label), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / label / f"{number}.png")
    return tmp_path / "photos"


def label_table(tmp_path: Path, name: str) -> Path:
    photos = folder_of(tmp_path, "x")
    quoted = name.replace('"', '""')
    (photos / "labels.csv").write_text(
        f'file,classes\nx/0.png,"{quoted}"\nx/1.png,"{quoted}"\nother/0.png,other\nother/1.png,other\n',
        "utf-8",
    )
    return photos


def checkpoint(_tmp_path: Path, name: str) -> object:
    weights = {"a": torch.zeros(1)}
    return Checkpoint(
        model="x",
        config={},
        weights=weights,
        labels=(name, "other"),
        preprocess=Preprocess(),
        training={},
    )


def names_file(tmp_path: Path, name: str) -> object:
    (tmp_path / "names.json").write_bytes(json_of(name))
    return read_class_names(tmp_path / "names.json")


def json_of(name: str) -> bytes:
    return pydantic.TypeAdapter(list[str]).dump_json([name, "other"])


def data_source(_tmp_path: Path, name: str) -> object:
    images = ArrayImages(
        images=np.zeros((2, 8, 8, 3), np.uint8), labels=(name, "other"), targets=np.arange(2)
    )
    return Split.undivided(images)


ENTRIES: dict[str, Callable[[Path, str], object]] = {
    "bundle": lambda _tmp_path, name: read_labels(json_of(name)),
    "checkpoint": checkpoint,
    "file of names": names_file,
    "data source": data_source,
    "folder": lambda tmp_path, name: open_folder(folder_of(tmp_path, name)),
    "data check": lambda tmp_path, name: check_data(folder_of(tmp_path, name)),
    "labels.csv": lambda tmp_path, name: open_folder(label_table(tmp_path, name)),
}
NO_FOLDERS = ("", "  ", "a/b", " hat ", "h\0at", "\ufeffhat", "h\udc80at")
STRIPPED = ("", "  ", " hat ", "\xa0")  # a file of names leaves out lines of spaces


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_class_is_refused_wherever_its_name_enters(
    tmp_path: Path, case: str, entry: str
) -> None:
    name = REFUSED[case]
    of_files = entry in {"folder", "data check", "labels.csv"}
    skipped = (
        name in NO_FOLDERS or len(name.encode("utf-8", "replace")) > 255 if of_files else False
    )
    skipped |= entry == "file of names" and name in STRIPPED
    skipped |= "\udc80" in name and entry in {"bundle", "file of names"}  # JSON cannot have it

    assert label_problem((name, "other"))
    if not skipped:
        with pytest.raises((ValueError, DataError, ConfigError), match=r"class|label"):
            ENTRIES[entry](tmp_path, name)


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("name", ACCEPTED, ids=ascii)
def test_a_class_is_accepted_wherever_its_name_enters(
    tmp_path: Path, name: str, entry: str
) -> None:
    assert class_problem(name) is None

    is_no_folder = name in NO_FOLDERS or len(name.encode()) > 255
    if entry not in {"folder", "data check"} or not is_no_folder:
        ENTRIES[entry](tmp_path, name)


def test_a_network_has_at_most_a_hundred_thousand_classes() -> None:
    labels = [str(number) for number in range(100_001)]

    assert label_problem(labels[:-1]) is None
    assert "more than 100000" in (label_problem(labels) or "")


PROJECTS = (
    "digits-dsop-2b01bdff6358",
    "a-000000000000",
    "-0123456789ab",
    "photos-202611261427",
)
OTHERS = (
    "digits-dsop",
    "photos-20261126",
    "a-2b01bdff635",
    "a-2b01bdff63581",
    "a-2B01BDFF6358",
    "2b01bdff6358",
)


@pytest.mark.parametrize("name", PROJECTS)
def test_a_new_project_cannot_have_the_name_of_a_bundle(name: str) -> None:
    assert is_bundle_name(name)
    # So that a checkpoint of an earlier version can be read
    assert project_problem(name) is None
    with pytest.raises(ConfigError, match="of a bundle"):
        check_project_name(name)
    assert not is_bundle_name(without_bundle_end(name))
    assert without_bundle_end(name).replace(".", "-") == name


@pytest.mark.parametrize("name", OTHERS)
def test_other_names_stay_as_they_are(name: str) -> None:
    assert not is_bundle_name(name)
    assert check_project_name(name) == without_bundle_end(name) == name


def test_a_link_that_another_program_made_never_leads_to_itself(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    for name, target in {"live": "one", "other": "live", "here": "."}.items():
        (tmp_path / name).symlink_to(target)

    for path in ("live", "other", "here/live", "x/../live"):
        move_link(tmp_path / "live", target_of(tmp_path / "live", tmp_path / path))
        assert (tmp_path / "live").readlink() == Path("one")


def test_paths_of_links_have_no_control_characters() -> None:
    assert link_problem("../bundles/hats-2b01bdff6358") is None
    assert all(map(link_problem, ("", "a\nb", "a\0", "x" * 5000)))
