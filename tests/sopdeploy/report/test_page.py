"""The page about a run: self-contained, escaped, and equal to the recorded metrics."""

import base64
import csv
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from sopdeploy.evaluation.checkpoint_scores import score_checkpoint
from sopdeploy.evaluation.metrics import ImageScore, Rate
from sopdeploy.html.notebook import notebook_table
from sopdeploy.html.plots import plot
from sopdeploy.report.page import _choose_mistakes
from sopdeploy.training.records.results import LoopResult, describe_for_page
from sopdeploy.training.settings.recipe import Recipe, read_recipe
from sopdeploy.weights.checkpoint import read_checkpoint
from sopdeploy_commands.predict import predict
from tests.sopdeploy.training.runs import short_recipe, train_with_page
from tests.support.pages import ALLOWED, Reader, charts

HOSTILE = "<script>alert(1)</script>"


def page_of(recipe: Recipe, folder: Path) -> str:
    """Train *recipe* and return the page about the run."""
    return (train_with_page(recipe, folder).out / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def run(few_digits: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "dsop"
    train_with_page(short_recipe(), folder)
    return folder


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    return (run / "report.html").read_text(encoding="utf-8")


def test_the_page_is_well_formed_and_self_contained(page: str) -> None:
    reader = Reader(page)
    assert page.startswith("<!DOCTYPE html>")
    assert {name for name, _ in reader.met} <= ALLOWED | {"a"}
    assert all(
        (found["href"] or "").startswith("#mistake-")
        for name, found in reader.met
        if name == "a"
    )

    images = [found for name, found in reader.met if name == "img"]
    assert all(
        re.match("data:image/(jpeg|svg.xml);base64,", image["src"] or "") for image in images
    )
    assert all(image.get("alt") for image in images)
    assert not re.search(r"https?://|url\(|@import|<script", page)
    assert "prefers-color-scheme: dark" in page
    assert "@media print" in page


def test_the_page_shows_metrics_curves_and_the_worst_mistakes_as_small_images(
    run: Path, page: str
) -> None:
    texts = [text for _, text in Reader(page).texts]
    stored = read_checkpoint(run / "best.pt").training
    top1 = stored["procedure"]["top1"]
    (shown,) = (text for text in texts if text.startswith("Top-1 "))
    numbers = [float(number) for number in re.findall(r"\d+(?:\.\d+)?", shown)]
    expected = [100 * top1["share"], 95, 100 * top1["low"], 100 * top1["high"]]

    assert numbers[1:5] == pytest.approx(expected, abs=0.5)
    assert numbers[1] == round(expected[0], 1)
    assert numbers[5] == top1["count"]
    assert {"optimizer.lr", "0.1", "network.base_width", "torch version", "processor"} <= set(
        texts
    )

    curves = charts(page)["top-1 on validation images."]
    assert all(
        f">{head}<" in curves
        for head in ("layer1_0", "layer2_0", "layer3_0", "main", "exported")
    )
    assert not re.search(r">\d+\.\d+<", curves.partition('id="matplotlib.axis_2"')[0]), (
        "half an epoch"
    )
    assert '<td class="number zero"><span class="zero" aria-label="0">·</span></td>' in page

    photographs = [
        found for name, found in Reader(page).met if "predicted as" in (found.get("alt") or "")
    ]
    assert 0 < len(photographs) <= 60

    image = Image.open(
        io.BytesIO(base64.b64decode((photographs[0]["src"] or "").partition(",")[2]))
    )
    assert (image.format, max(image.size) <= 128) == ("JPEG", True)

    said = [
        re.findall(r"^predicted as (\w+) with (\d+)\s%, (\w+) \d+\s%", found["alt"] or "")
        for found in photographs
    ]
    pairs = [(true, predicted) for [(predicted, _, true)] in said]
    confidences = [float(confidence) for [(_, confidence, _)] in said]
    # Each pair is together
    best = [confidences[pairs.index(pair)] for pair in dict.fromkeys(pairs)]

    assert best == sorted(best, reverse=True)
    assert all(
        confidence <= confidences[pairs.index(pair)]
        for pair, confidence in zip(pairs, confidences, strict=True)
    )

    links = re.findall('<a href="#(mistake-[0-9]+-[0-9]+)">[0-9]+</a>', page)
    anchors = re.findall('<figure id="(mistake-[0-9]+-[0-9]+)">', page)
    assert len(anchors) == len(dict.fromkeys(pairs)) == len(set(links)) > 1
    assert set(links) == set(anchors)


def test_the_predictions_of_all_images_are_a_table(run: Path, page: str) -> None:
    with (run / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    right = sum(row["label"] == row["predicted"] for row in rows)
    matrix = re.findall(r'class="number right" style="[^"]*"><bdi>(\d+)</bdi>', page)

    assert (right, len(rows)) == (sum(map(int, matrix)), 52)
    assert all(
        (row["confidence"] == row["likelihood"]) >= (row["label"] == row["predicted"])
        for row in rows
    )


def test_a_notebook_shows_the_confusion_and_a_checkpoint_predicts(
    tmp_path: Path, few_digits: None
) -> None:
    result = train_with_page(short_recipe(), tmp_path / "run")
    predictions = result.predictions()
    counts = result.confusion()
    right = sum(one.label == one.predicted for one in predictions)
    assert sum(counts[label][label] for label in counts) == right
    assert sum(sum(row.values()) for row in counts.values()) == len(predictions)

    shown = Reader(result._repr_html_())
    assert sum(name == "td" for name, _ in shown.met) == 10 * 11
    assert HOSTILE not in notebook_table(HOSTILE, [HOSTILE], [[HOSTILE]])

    # PyTorch predicts the pixels of an image as the evaluation did.
    pixels = np.full((20, 20, 3), 200, np.uint8)
    [found] = predict(result.best, [pixels], top_k=10)
    assert {one.label for one in found.classes} == set(counts)
    assert sum(one.probability for one in found.classes) == pytest.approx(1, abs=1e-3)
    assert found.classes[0].label in predict(result.best, [pixels])._repr_html_()


def test_classes_are_shown_with_samples_the_lowest_recall_first(page: str) -> None:
    shown = re.findall(r"<small>\d+ images?, recall (\d+)\s%</small>", page)
    assert len(shown) == 10
    assert list(map(int, shown)) == sorted(map(int, shown))
    assert page.count('<span class="photos">') == 10


def test_a_resumed_run_writes_an_equal_page(run: Path, page: str, few_digits: None) -> None:
    train_with_page(short_recipe(), run, resume=True)
    assert (run / "report.html").read_text(encoding="utf-8") == page


def test_hostile_class_names_are_escaped_and_mistakes_name_their_files(tmp_path: Path) -> None:
    """Comments of the files, which may tell where or by whom, are not part of the page."""
    data, rng, text = tmp_path / "photos", np.random.default_rng(0), PngImagePlugin.PngInfo()
    text.add_text("comment", "SECRET")
    for part in ("train", "val"):
        for label in ("ant", HOSTILE.replace("/", "\N{DIVISION SLASH}")):
            (data / part / label).mkdir(parents=True)
            for number in range(4):
                pixels = rng.integers(0, 256, (12, 14, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(
                    data / part / label / f"{number}.png", pnginfo=text
                )
    settings = [
        "epochs=1",
        "batch_size=4",
        "preprocess.resize=8",
        "preprocess.crop=8",
        f"data.path={data}",
    ]
    settings += ["model.name=dsop-resnet8", "model.config.base_width=2"]
    page = page_of(read_recipe("photos-dsop", settings), tmp_path / "run")
    Reader(page)

    assert "<script>" not in page
    assert "&lt;script&gt;" in page

    found = score_checkpoint(tmp_path / "run" / "best.pt", data)
    wrong = [score for score in found.predictions if not score.correct]
    assert (
        len(re.findall(r": <bdi>[^<]+/[0-3]\.png</bdi></figcaption>", page)) == len(wrong) > 0
    )

    photographs = re.findall(r"image/jpeg;base64,([^\"]+)", page)
    assert not any(b"SECRET" in base64.b64decode(photograph) for photograph in photographs)


@pytest.mark.parametrize(
    "text", ["<script>", "$x^2$", "_hidden", "\N{RIGHT-TO-LEFT OVERRIDE}a", "\x1b[1m", "漢"]
)
def test_charts_show_every_text_as_it_is(text: str) -> None:
    image = plot({text: [(0, 1), (1, 3)]}, text, "y")
    drawn = base64.b64decode(image.partition(",")[2]).decode("utf-8")
    shown = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)

    assert Reader(drawn).text_in("text").count(shown) == 2
    assert image == plot({text: [(0, 1), (1, 3)]}, text, "y")


@pytest.mark.parametrize(
    ("selected_by", "is_too_high"),
    [("nothing", False), ("other images", True), ("same images", True)],
)
def test_the_page_calls_scores_too_high_if_images_selected_the_epoch(selected_by, is_too_high):
    result = LoopResult(
        epoch=1, num_epochs=1, top1=Rate.of(7, 9), count=9, selected_by=selected_by
    )
    assert ("too high" in describe_for_page(result).held_out) == is_too_high


def test_the_page_begins_with_the_accuracy_and_the_next_command(run: Path, page: str) -> None:
    first = page[page.index("<main>") : page.index("</section>")]
    sentences = re.findall('<p(?: class="lead")?>(.*)</p>', first.partition("<details")[0])
    assert re.search(r'<p class="headline">[\d.]+\s% accuracy</p>', first)
    assert re.fullmatch(r"Top-1 [\d.]+ % \(95 % interval \d+ to \d+ %\) of .*\.", sentences[0])
    assert page.count(sentences[0][5:30]) == 2  # also in the folded section about learning
    assert sentences[-2] == f"Next: <code>sopdeploy export {run / 'best.pt'} --detach</code>"

    matrix = page[page.index("Confusion matrix") :].partition("</table>")[0]
    cells = re.findall("<tr>(<th scope=.row.[^>]*>.*)</tr>", matrix)
    kinds = np.array(
        [re.findall('<td class="number (right|wrong|zero)"', row) for row in cells]
    )
    diagonal = np.eye(10, dtype=bool)

    assert set(kinds[diagonal]) == {"right", "zero"}
    assert set(kinds[~diagonal]) == {"wrong", "zero"}


def test_of_many_classes_the_most_frequent_mistakes_are_shown_in_their_order() -> None:
    pairs = [(1, 2), (3, 4), (3, 4), (5, 6), (7, 7)]
    scores = [
        ImageScore(true, (predicted,), 0.9 - index / 10, 0.05)
        for index, (true, predicted) in enumerate(pairs)
    ]
    everything = {(1, 2): [0], (3, 4): [1, 2], (5, 6): [3]}

    assert _choose_mistakes(scores, []) == everything

    chosen = _choose_mistakes(scores, [(3, 4), (1, 2)])
    assert list(chosen.items()) == [((3, 4), [1, 2]), ((1, 2), [0])]
