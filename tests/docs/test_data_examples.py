"""The examples of own data sources on the page about training, run on data of their formats."""

import io
import pickle  # noqa: TID251 - the format of the batches
import re
import sys
import tarfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

import sopdeploy
from sopdeploy.base.plugins import DATA_SOURCES
from sopdeploy.data.folders.folder import open_folder

PAGE = Path(__file__).parents[2] / "docs" / "train.md"


def example(marker: str, names: dict[str, Any]) -> dict[str, Any]:
    """Run the example behind *marker* with *names*; return the names that it defines, too."""
    text = PAGE.read_text(encoding="utf-8")
    (code,) = re.findall(rf"<!-- {marker} -->\n```python\n(.*?)^```", text, re.M | re.S)
    exec(compile(code, marker, "exec"), names)  # noqa: S102 - the page's own code
    return names


def jpeg(number: int) -> bytes:
    """Encode an image that no other *number* has: a dark one if it is even, or else a bright one."""
    random = np.random.default_rng(number)
    pixels = random.integers(0, 100, (16, 16, 3), np.uint8) + np.uint8(150 * (number % 2))
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


class Table:
    """The part of `datasets.Dataset` that the example uses: rows by number, columns by name."""

    def __init__(self, labels: list[int]) -> None:
        self.labels = labels
        self.features = {"label": SimpleNamespace(names=["dark", "bright"])}
        self.decodes = True

    def cast_column(self, column: str, feature: SimpleNamespace) -> "Table":
        assert column == "image"
        other = Table(self.labels)
        other.decodes = feature.decode
        return other

    def __getitem__(self, key: int | str) -> Any:
        if key == "label":
            return self.labels
        assert isinstance(key, int)
        assert not self.decodes
        return {"image": {"bytes": jpeg(key), "path": None}}

    def __len__(self) -> int:
        return len(self.labels)


def test_rows_of_datasets_are_images(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType("datasets")
    module.Image = SimpleNamespace
    monkeypatch.setitem(sys.modules, "datasets", module)
    rows = example("datasets", {})["Rows"](Table([0, 1, 1]))

    assert (rows.labels, len(rows)) == (("dark", "bright"), 3)
    bright = rows.select(rows.targets == 1)
    assert [bright.identity(index) for index in range(2)] == ["1", "2"]
    assert bright.read(0) == jpeg(1)


def write_shard(path: Path, first: int, count: int) -> None:
    """Write *count* images with the numbers from *first* on; their classes alternate."""
    with tarfile.open(path, "w") as tar:
        for number in range(first, first + count):
            for suffix, content in (
                ("jpg", jpeg(number)),
                ("cls", str(number % 2).encode()),
            ):
                entry = tarfile.TarInfo(f"{number:04}.{suffix}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))


def test_shards_train_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(DATA_SOURCES, "registered", {**vars(DATA_SOURCES)["registered"]})
    for number in range(2):
        write_shard(tmp_path / f"shard-{number}.tar", 12 * number, 12)
    names = example("webdataset", {})
    images = names["Shards"](("shard-0.tar", "shard-1.tar"), ("cat", "dog"))
    assert images.class_counts().tolist() == [12, 12]
    assert images.read(13) == jpeg(13)

    # With small settings of the same recipe.
    trained = []
    train = sopdeploy.train
    small = {"model.config": {"base_width": 4}, "batch_size": 8}
    monkeypatch.setattr(
        sopdeploy, "train", lambda **options: trained.append(train(**options, **small))
    )
    example("source", names)
    (run,) = trained
    assert run.train_count + run.held_out_count == 24


def test_batches_of_64_pixels_become_class_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (4, 3, 64, 64), np.uint8)
    for name, chosen in (("train_data_batch_1", slice(0, 3)), ("val_data", slice(3, 4))):
        batch = {
            "data": pixels[chosen].reshape(-1, 12288),
            "labels": [1, 1000, 1][chosen] or [1],
        }
        Path(name).write_bytes(pickle.dumps(batch))
    example("imagenet64", {})

    split = open_folder(tmp_path / "imagenet64")
    assert split.train.labels == ("0001", "1000")
    assert (split.train.class_counts().tolist(), len(split.held_out)) == ([2, 1], 1)
    first = np.asarray(Image.open(io.BytesIO(split.train.read(0))))
    assert np.array_equal(first, pixels[0].transpose(1, 2, 0))
