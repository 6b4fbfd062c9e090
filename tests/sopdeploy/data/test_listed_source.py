"""A data source that a plug-in adds and that implements no more than the base classes ask for."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

import sopdeploy
from sopdeploy import plugins
from sopdeploy.api.options import TrainOptions
from sopdeploy.api.training import configure
from sopdeploy.data.base import DataSource, LabeledImages, Split
from sopdeploy.data.sources import open_data
from sopdeploy.errors import DataError
from sopdeploy.training.procedure import FewShotConfig, LoopConfig
from sopdeploy.training.recipe import Recipe, read_recipe
from sopdeploy.training.train import select_procedure
from tests.sopdeploy.data.small_data import jpeg

LABELS = ("cat", "dog", "gull")


@dataclass(frozen=True)
class ListedImages(LabeledImages):
    """Images that a database would return by number."""

    labels: tuple[str, ...]
    targets: Any
    numbers: tuple[int, ...]
    damaged: int = -1

    def read(self, index: int) -> bytes:
        image = jpeg(self.numbers[index])
        return image[:300] if self.numbers[index] == self.damaged else image

    def identity(self, index: int) -> str:
        return f"row {self.numbers[index]}"

    def select(self, mask: Any) -> "ListedImages":
        numbers = tuple(np.asarray(self.numbers)[mask].tolist())
        return replace(self, targets=self.targets[mask], numbers=numbers)


class ListSource(DataSource):
    """Every class has eight images."""

    kind: Literal["list"]
    path: Path
    damaged: int = -1

    def open(self, log: object) -> Split:
        numbers = tuple(range(24))
        return Split.undivided(ListedImages(LABELS, np.repeat(np.arange(3), 8), numbers, self.damaged))


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins.DATA_SOURCES, "registered", {})
    sopdeploy.register_data_source(ListSource)


def recipe(tmp_path: Path, *settings: str) -> Recipe:
    (tmp_path / "animals").mkdir(exist_ok=True)
    (tmp_path / "animals" / "list.csv").touch()
    base = [
        "data.kind=list",
        f"data.path={tmp_path}/animals/list.csv",
        "model.name=resnet8",
        "model.config={}",
    ]
    return read_recipe("photos", [*base, *settings])


def test_a_subset_of_the_classes_can_be_drawn(tmp_path: Path) -> None:
    images = open_data(recipe(tmp_path, "data.classes=2").data).train
    assert len(images.labels) == 2
    assert images.class_counts().tolist() == [8, 8]


def test_a_damaged_image_is_named_in_one_line(tmp_path: Path) -> None:
    images = open_data(recipe(tmp_path, "data.damaged=5").data).train
    with pytest.raises(DataError, match=r"^row 5: the image is truncated[^\n]*$"):
        images[5]


@pytest.mark.parametrize(("kind", "sizes"), [("few_shot", (24, 0)), ("loop", (18, 6))])
def test_the_procedure_decides_whether_images_are_held_out(tmp_path: Path, kind: str, sizes: Any) -> None:
    chosen = recipe(tmp_path, f"procedure.kind={kind}")
    selected = select_procedure(chosen, open_data(chosen.data))
    assert isinstance(selected.recipe.procedure, FewShotConfig if kind == "few_shot" else LoopConfig)
    assert (len(selected.data.train), len(selected.data.held_out)) == sizes


def test_the_project_is_named_after_the_folder_of_the_list(tmp_path: Path) -> None:
    (tmp_path / "animals").mkdir()
    (tmp_path / "animals" / "list.csv").touch()
    settings = ["data.kind=list", f"data.path={tmp_path}/animals/list.csv"]
    assert configure(None, "photos", TrainOptions(), settings).recipe.project == "animals"
