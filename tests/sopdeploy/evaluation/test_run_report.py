"""The report of a run and the templates: self-contained, escaped, and equal to the recorded metrics."""

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import UndefinedError
from markupsafe import Markup
from PIL import Image

from sopdeploy.checkpoint import read_checkpoint
from sopdeploy.errors import CheckpointError, ConfigError, DataError
from sopdeploy.evaluation.metrics import classification_report
from sopdeploy.evaluation.prediction import EvalMetrics, score_checkpoint
from sopdeploy.html.charts import element
from sopdeploy.html.templates import create_environment, render
from sopdeploy.report.page import training_context, write_run_report
from sopdeploy.training.diagnostics import EpochRow
from sopdeploy.training.recipe import read_recipe
from sopdeploy.training.train import train_recipe
from tests.pages import ALLOWED, Reader
from tests.sopdeploy.training.runs import short_recipe

HOSTILE = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def run(few_digits: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_recipe(short_recipe(), tmp_path_factory.mktemp("runs") / "dsop").out


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    return write_run_report(run).read_text(encoding="utf-8")


def test_the_page_is_well_formed_and_self_contained(page: str) -> None:
    reader = Reader(page)
    assert page.startswith("<!DOCTYPE html>")
    assert {name for name, _ in reader.met} <= ALLOWED | {"img"}
    images = [found for name, found in reader.met if name == "img"]
    assert all((image["src"] or "").startswith("data:image/jpeg;base64,") for image in images)
    assert all(image.get("alt") for image in images)
    assert not re.search(r"https?://|url\(|@import|<script", page)
    ids = [found["id"] for _, found in reader.met if "id" in found]
    assert len(ids) == len(set(ids))
    assert "prefers-color-scheme: dark" in page
    assert "@media print" in page


def test_the_page_shows_metrics_and_the_worst_mistakes_as_small_images(run: Path, page: str) -> None:
    texts = [text for _, text in Reader(page).texts]
    stored = read_checkpoint(run / "best.pt")
    top1 = stored.training["metrics"]["top1"]
    assert any(text.startswith(f"Top-1 {100 * top1:.2f}\N{NO-BREAK SPACE}%") for text in texts)
    assert f"{stored.training['epoch']} of 3" in texts
    assert {"layer1_0", "layer2_0", "layer3_0", "main", "deployed"} <= set(texts)
    assert {"optimizer.lr", "0.1", "network.base_width", "torch version", "processor"} <= set(texts)
    images = [found for name, found in Reader(page).met if name == "img"]
    assert 0 < len(images) <= 24
    image = Image.open(io.BytesIO(base64.b64decode((images[0]["src"] or "").partition(",")[2])))
    assert (image.format, max(image.size) <= 128) == ("JPEG", True)
    confidences = [float(re.findall(r"\(([\d.]+)", found["alt"] or "")[1]) for found in images]
    assert confidences == sorted(confidences, reverse=True)


def test_further_branches_are_averaged_in_one_curve() -> None:
    row = EpochRow(
        epoch=1,
        lr=0.1,
        losses={"loss": 9.0, "main": 3.0, **{f"layer{n}_0": float(n) for n in range(6)}},
        metrics=EvalMetrics(top1=0.5, top5=1.0, count=2, loss=1.0),
        gradient=1.0,
        seconds=1.0,
    )
    chart = training_context([row, row.model_copy(update={"epoch": 2})])["learning"][0][0]
    assert re.findall(r'class="curve (c\d)"', chart) == [f"c{n}" for n in range(6) for _ in range(2)]
    assert "layer2_0: 2 at 1, 2 at 2. 3 other branches: mean: 4 at 1, 4 at 2." in chart


def test_a_gated_run_shows_the_images_per_component(tmp_path: Path) -> None:
    small = "{blocks_per_stage=1, components=4, chosen=2, component_widths=[8], gate_widths=[8]}"
    gated = ["model.name=gmsop-16-8-resnet18", f"model.config={small}", "epochs=1", "batch_size=120"]
    recipe = read_recipe("digits-plain", [*gated, "preprocess.resize=8", "preprocess.crop=8"])
    train_recipe(recipe, tmp_path / "run")
    page = write_run_report(tmp_path / "run").read_text(encoding="utf-8")
    texts = {text for _, text in Reader(page).texts}
    assert {"Images per component", "Training images that the gate sent to each component."} <= texts


def test_other_images_are_evaluated_and_hostile_class_names_are_escaped(tmp_path: Path) -> None:
    data, rng = tmp_path / "photos", np.random.default_rng(0)
    for label in ("ant", HOSTILE.replace("/", "\N{DIVISION SLASH}")):
        (data / label).mkdir(parents=True)
        for number in range(4):
            pixels = rng.integers(0, 256, (12, 14, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(data / label / f"{number}.png")
    settings = ["epochs=1", "batch_size=4", "preprocess.resize=8", "preprocess.crop=8", f"data.path={data}"]
    settings += ["model.name=dsop-resnet8", "model.config.base_width=2"]
    train_recipe(read_recipe("photos-dsop", settings), tmp_path / "run")
    page = write_run_report(tmp_path / "run", data=data).read_text(encoding="utf-8")
    Reader(page)
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    labels, scores, _ = score_checkpoint(
        tmp_path / "run" / "best.pt", data, on_image=lambda _done, _all: None
    )
    assert f"negative log-likelihood {classification_report(labels, scores).nll:.4f}" in page
    wrong = [index for index, score in enumerate(scores) if not score.correct]
    assert len(re.findall(r"<code>[^<]+/[0-3]\.png</code>: ", page)) == len(wrong) > 0
    for path in data.rglob("*.png"):
        path.unlink()
    without = write_run_report(tmp_path / "run").read_text(encoding="utf-8")
    assert "the images are not available" in without
    with pytest.raises(DataError, match="holds no images of these classes"):
        write_run_report(tmp_path / "run", data=data)


def test_a_page_is_reproducible_or_the_error_leaves_no_file(run: Path, page: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written"):
        write_run_report(run, tmp_path / "missing" / "page.html")
    assert list(tmp_path.iterdir()) == []
    assert write_run_report(run, tmp_path / "again.html").read_text(encoding="utf-8") == page
    with pytest.raises(ConfigError, match="holds no run with a finished epoch"):
        write_run_report(tmp_path)
    for name in ("last.pt", "best.pt"):
        (tmp_path / name).write_bytes((run / "best.pt").read_bytes())
    with pytest.raises(CheckpointError, match="holds no history"):
        write_run_report(tmp_path)
    with pytest.raises(UndefinedError):
        render("sopdeploy.report", "run.html")


TABLE = '{% import "macros.html" as html %}{{ html.table(text, [text], [[text, markup]]) }}'


@given(st.text())
def test_templates_and_charts_escape_every_text(text: str) -> None:
    markup = element("g", text, class_=text)
    assert [name for name, _ in Reader(markup).met] == ["g"]
    page = create_environment("sopdeploy.html").from_string(TABLE).render(text=text, markup=Markup("<br>"))
    tags = [name for name, _ in Reader(page).met]
    assert tags == ["div", "table", "caption", "thead", "tr", "th", "tbody", "tr", "th", "td", "br"]
    assert "\N{RIGHT-TO-LEFT OVERRIDE}" not in page + markup
