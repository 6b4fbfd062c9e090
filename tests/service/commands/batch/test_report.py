"""The report of a run: `_report.json`, and what `_report.html` shows."""

import base64
import io
import json
import re
import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
from PIL import Image

from sopdeploy.decision import Decision
from sopdeploy.evaluation.drift import PredictionCounts
from sopdeploy_service.commands.batch.listing import Listing
from sopdeploy_service.commands.batch.output import LISTING, OutputFolder
from sopdeploy_service.commands.batch.report import write_batch_report
from tests.service.commands.batch.conftest import BAD, COUNT, SETTINGS, rows_of


def report(out, bundle, decision=None, settings=SETTINGS):
    manifest = bundle.manifest.model_copy(update={"decision": decision})
    changed = replace(bundle, manifest=manifest)
    return write_batch_report(OutputFolder(out), Listing(out / LISTING), changed, settings)


def test_the_report_counts_classes_and_errors_and_shows_the_least_certain_images(complete, bundle, tmp_path):
    out = shutil.copytree(complete, tmp_path / "out")
    found, rows = report(out, bundle), rows_of(out)
    good = [row for row in rows if row["error"] is None]
    assert json.loads((out / "_report.json").read_text()) == found.model_dump(mode="json")
    assert found.num_images == COUNT
    assert {label: count for label, count in found.counts.items() if count} == Counter(
        row["classes"][0] for row in good
    )
    assert {kind.code: kind.num_images for kind in found.errors} == Counter(row["error"] for row in rows) - (
        Counter({None: len(good)})
    )
    assert found.errors[0].examples == (rows[min(BAD)]["path"],)
    least = sorted(good, key=lambda row: row["probabilities"][0])[:24]
    assert [one.path for one in found.least_certain] == [row["path"] for row in least]
    page = (out / "_report.html").read_text()
    assert page.count('<img src="data:image/jpeg;base64,') == len(least)
    images = re.findall(r'<img src="data:image/jpeg;base64,([^"]+)"', page)
    sizes = [Image.open(io.BytesIO(base64.b64decode(image))).size for image in images]
    assert all(width >= 40 and height == 38 for width, height in sizes)  # the image, not the 32 x 32 input
    assert "the bundle has no predictions for held-out images" in page
    assert found.drift is None


def test_drift_compares_with_the_held_out_predictions(complete, bundle, tmp_path):
    out = shutil.copytree(complete, tmp_path / "out")
    rows = [row for row in rows_of(out) if row["error"] is None]
    same = PredictionCounts(7)
    same.add(
        np.array([bundle.labels.index(row["classes"][0]) for row in rows]),
        np.array([row["probabilities"][0] for row in rows]),
    )
    other = PredictionCounts(7)
    other.add(np.full(200, 5), np.full(200, 0.15))
    for predictions, alarm, text in (
        (same, False, "No drift is detectable."),
        (other, True, "The predictions differ from those for the held-out images."),
    ):
        found = report(out, bundle, Decision(reference=predictions.reference()))
        alarms = {name: test.alarm for name, test in found.drift.items()}
        assert alarms == {"classes": alarm, "confidences": alarm}
        page = (out / "_report.html").read_text()
        assert text in page
        assert not re.search(r"[.>]Without drift", page)


def test_the_report_of_a_multi_label_network_counts_every_class(complete, bundle, tmp_path):
    out = shutil.copytree(complete, tmp_path / "out")
    rows = [row["classes"] for row in rows_of(out) if row["error"] is None]
    found = report(out, bundle, Decision(activation="sigmoid", thresholds=(0.5,) * 7))
    assert {label: n for label, n in found.counts.items() if n} == Counter(
        x for labels in rows for x in labels
    )
    assert found.drift is None
    assert "Not examined: an image may have several classes." in (out / "_report.html").read_text()
