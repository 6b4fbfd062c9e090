"""The page on a run: whole in itself, believing no name, and true to the numbers."""

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sopdeploy.checkpoint import read_checkpoint
from sopdeploy.errors import CheckpointError, ConfigError, DataError
from sopdeploy.evaluation.metrics import classification_report
from sopdeploy.evaluation.prediction import score_checkpoint
from sopdeploy.report import write_report
from sopdeploy.training.loop import train
from sopdeploy.training.recipe import read_recipe
from tests.pages import ALLOWED, Reader
from tests.sopdeploy.training.runs import short_recipe

pytestmark = pytest.mark.usefixtures("few_digits")

HOSTILE = "<script>alert(1)</script>"
GATED = [
    *("epochs=1", "batch_size=120", "preprocess.resize=8", "preprocess.crop=8"),
    *("model.name=gmsop-16-8-resnet18", "model.config.blocks_per_stage=1", "model.config.components=4"),
    *("model.config.chosen=2", "model.config.component_widths=[8]", "model.config.gate_widths=[8]"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "dsop"
    train(short_recipe(), folder)
    return folder


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    return write_report(run).read_text(encoding="utf-8")


def test_the_page_is_well_formed_and_loads_nothing(page: str) -> None:
    reader = Reader(page)
    assert {name for name, _ in reader.met} <= ALLOWED | {"img"}
    sources = [found["src"] or "" for name, found in reader.met if name == "img"]
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert all(found.get("alt") for name, found in reader.met if name == "img")
    assert not re.search(r"https?://|url\(|@import|<script", page)
    ids = [found["id"] for _, found in reader.met if "id" in found]
    assert len(ids) == len(set(ids))
    assert "prefers-color-scheme: dark" in page


def test_the_figures_are_those_of_the_run_and_of_its_best_network(run: Path, page: str) -> None:
    texts = [text for _, text in Reader(page).texts]
    stored = read_checkpoint(run / "best.pt")
    top1 = stored.training["figures"]["top1"]
    assert any(text.startswith(f"Top-1 {100 * top1:.2f}\N{NO-BREAK SPACE}%") for text in texts)
    assert f"{stored.training['epoch']} of 3" in texts
    assert {"layer1_0", "layer2_0", "layer3_0", "main", "what ships"} <= set(texts)
    assert {"optimizer.lr", "0.1", "the network's base_width", "torch version", "processor"} <= set(texts)
    assert "branches.layer1_0.pooling: before and after the root." in texts


def test_the_worst_mistakes_are_small_pictures_surest_first(page: str) -> None:
    reader = Reader(page)
    shown = [found["src"] or "" for name, found in reader.met if name == "img"]
    assert 0 < len(shown) <= 24
    picture = Image.open(io.BytesIO(base64.b64decode(shown[0].partition(",")[2])))
    assert (picture.format, max(picture.size) <= 128) == ("JPEG", True)
    said = [found["alt"] or "" for name, found in reader.met if name == "img"]
    sure = [float(re.findall(r"\(([\d.]+)", text)[1]) for text in said]
    assert sure == sorted(sure, reverse=True)


def test_the_same_run_gives_the_same_page(run: Path, page: str, tmp_path: Path) -> None:
    assert write_report(run, tmp_path / "again.html").read_text(encoding="utf-8") == page


def test_a_gated_run_shows_usage_and_imbalance(tmp_path: Path) -> None:
    train(read_recipe("digits-plain", GATED), tmp_path / "run")
    page = write_report(tmp_path / "run").read_text(encoding="utf-8")
    Reader(page)
    assert "gate: pictures that chose each component after the last epoch." in page
    assert "Usage over the epochs" in page
    assert "Imbalance" in page


def paint(root: Path, *labels: str) -> Path:
    rng = np.random.default_rng(0)
    for label in labels:
        (root / label).mkdir(parents=True)
        for number in range(4):
            pixels = rng.integers(0, 256, (12, 14, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / label / f"{number}.png")
    return root


def test_other_pictures_are_measured_by_name_and_hostile_names_are_only_shown(tmp_path: Path) -> None:
    data = paint(tmp_path / "photos", "ant", HOSTILE.replace("/", "\N{DIVISION SLASH}"))
    small = [
        "epochs=1",
        "batch_size=4",
        "preprocess.resize=8",
        "preprocess.crop=8",
        "model.config.base_width=2",
    ]
    recipe = read_recipe("photos-dsop", [*small, f"data.path={data}", "model.name=dsop-resnet8"])
    train(recipe, tmp_path / "run")
    page = write_report(tmp_path / "run", data=data).read_text(encoding="utf-8")
    Reader(page)
    assert "<script>" not in page
    labels, scores = score_checkpoint(tmp_path / "run" / "best.pt", data, on_image=lambda _done, _all: None)
    assert f"negative log-likelihood {classification_report(labels, scores).nll:.4f}" in page
    for path in data.rglob("*.png"):
        path.unlink()
    without = write_report(tmp_path / "run").read_text(encoding="utf-8")
    assert "the pictures are not at hand" in without
    with pytest.raises(DataError, match="no images in this class folder"):
        write_report(tmp_path / "run", data=data)


def test_a_folder_without_a_run_is_named(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no run with a finished epoch"):
        write_report(tmp_path)
    (tmp_path / "last.pt").write_bytes((run / "best.pt").read_bytes())
    (tmp_path / "best.pt").write_bytes((run / "best.pt").read_bytes())
    with pytest.raises(CheckpointError, match="holds no history"):
        write_report(tmp_path)


def test_a_page_that_cannot_be_written_leaves_nothing(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written"):
        write_report(run, tmp_path / "nowhere" / "page.html")
    assert list(tmp_path.iterdir()) == []
