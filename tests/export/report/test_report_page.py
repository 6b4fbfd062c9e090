"""`report.html` is well formed and self-contained, escapes class names, and shows the results."""

import dataclasses
import re
from types import SimpleNamespace
from typing import Any

import pytest

from sopdeploy.bundle.folder import open_bundle
from sopdeploy.decision import Decision, Rejection
from sopdeploy.evaluation.metrics import Rate
from sopdeploy.training.epoch_choice import LoopResult
from sopdeploy_export.parity.findings import Flip
from sopdeploy_export.precision.findings import Accuracy, Attempt, Quantization
from sopdeploy_export.report.page import (
    as_markdown,
    render_model_card,
    render_report,
    training_rows,
)
from sopdeploy_export.report.results import Exported
from tests.export.conftest import HOSTILE
from tests.pages import ALLOWED, Reader


def page_of(exported: Exported) -> str:
    return (exported.path / "report.html").read_text(encoding="utf-8")


@pytest.fixture(params=["branched", "gated"])
def page(request: pytest.FixtureRequest) -> str:
    return page_of(request.getfixturevalue(request.param))


def test_the_page_is_well_formed_and_loads_or_runs_nothing(page: str) -> None:
    reader = Reader(page)
    assert page.startswith("<!DOCTYPE html>")
    assert {name for name, _ in reader.met} <= ALLOWED
    attributes = {key for _, found in reader.met for key in found}
    assert not [
        key for key in attributes if key.startswith("on") or key in {"src", "href", "style", "action"}
    ]
    assert not re.search(r"https?://|//\w|url\(|@import", page)


def test_the_page_supports_phones_dark_mode_and_screen_readers(page: str) -> None:
    reader = Reader(page)
    assert ("html", {"lang": "en"}) in reader.met
    assert any((found.get("content") or "").startswith("width=device-width") for _, found in reader.met)
    assert "prefers-color-scheme: dark" in page
    for name, found in reader.met:
        if name == "th":
            assert found["scope"] in {"col", "row"}


def test_hostile_class_names_are_escaped(page: str) -> None:
    shown = "".join(text for _, text in Reader(page).texts)
    assert all(label in shown for label in HOSTILE if label.isprintable())
    assert "\u202e" not in page
    assert "&lt;script&gt;" in page


def test_the_gate_section_shows_the_usage_of_every_component(gated: Exported) -> None:
    routing = gated.parity.routing
    assert routing is not None
    assert (len(routing.usage), sum(routing.usage)) == (4, 2 * gated.parity.num_images)
    page = page_of(gated)
    assert "Use of the components" in page
    assert "selects 2 of 4 components" in page
    for number, count in enumerate(routing.usage):
        share = f"{100 * count / gated.parity.num_images:.0f}\N{NO-BREAK SPACE}%"
        assert f"component {number}</th><td>{share}" in page
    assert "gate.noise" in page


def test_the_page_is_a_file_of_the_manifest_and_lists_the_others(branched: Exported) -> None:
    files = open_bundle(branched.path).manifest.files
    assert "report.html" in files
    page = page_of(branched)
    assert all(record.sha256 in page for name, record in files.items() if name != "report.html")


def test_the_model_card_states_the_estimate_of_a_training_on_few_images() -> None:
    few_shot = {
        "kind": "few_shot",
        "top1": {"share": 0.5, "right": 4, "count": 8, "low": 0.2, "high": 0.8},
        "estimated_on": "cross-validation", "class_counts": {"cat": 6, "dog": 2},
        "balanced": False, "num_duplicates": 0, "num_groups": 3,
        "num_images": 8, "head": "resnet18 gap", "num_features": 512, "strength": 3.0,
        "seconds": {"head": 1.0},
    }  # fmt: skip
    start = {"file": "resnet18.pth", "sha256": "f37072fd", "network": "ResNet-18 of torchvision"}
    assert training_rows({"epoch": 1, "start": start, "procedure": few_shot}) == [
        ("start weights", "ResNet-18 of torchvision, resnet18.pth, sha256 f37072fd"),
        ("images", "cat 6, dog 2; fewer than 5 images of dog: add more"),
        (
            "accuracy",
            'top-1 50.0 % (cross-validated, 95 % interval 20 to 80 %; always answering "cat" gives 75 %) '
            "of 8 images",
        ),
    ]
    assert training_rows({"step": 7, "epoch": 1, "machine": {}}) == [("epoch", 1), ("step", 7)]
    result = LoopResult(epoch=1, num_epochs=2, top1=Rate.of(3, 12), count=12, selected_by="same images")
    (accuracy,) = training_rows({"procedure": result.model_dump()})
    assert accuracy[1] == (
        "top-1 25.0 % (95 % interval 9 to 53 %) of 12 held-out images, too high: they also select the epoch"
    )


def test_the_model_card_contains_no_html_or_links_of_a_checkpoint(branched: Exported) -> None:
    hostile = "<img src=x onerror=alert(1)>\n\n# [Heading](https://example.org)"
    preprocess, training = branched.manifest.preprocess, {"epoch": hostile}
    subject: Any = SimpleNamespace(
        name="n", project="p", labels=HOSTILE, preprocess=preprocess, training=training
    )
    shared = ("batch", "inputs", "outputs", "versions")
    card = render_model_card(subject, branched, {name: getattr(branched.manifest, name) for name in shared})
    assert "- epoch: &lt;img src=x onerror=alert(1)&gt; \\# \\[Heading\\](https\\://example.org)\n" in card
    assert not re.search(r"[<>]|(?<!\\)\[|(?<!\\)https?:", card)
    assert "\u202e" not in card
    assert f"bitwise equal on {branched.certificate.num_images} probe images" in card


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (r"\[a\](http://b.c)", r"\\\[a\\\](http\://b.c)"),
        ("WWW.b.c and me@b.c", r"WWW\.b.c and me\@b.c"),
        ("*a* _b_ `c`", r"\*a\* \_b\_ \`c\`"),
        ("tf_efficientnet_lite0 a__b é_1", r"tf_efficientnet_lite0 a\_\_b é_1"),
        ("a\u202eb\u2066c\x1b", "a\ufffdb\ufffdc\ufffd"),
        ("a\n# b", r"a \# b"),
    ],
)
def test_text_in_the_model_card_is_shown_as_it_is(text: str, shown: str) -> None:
    assert as_markdown(text) == shown


def rendered(exported: Exported, **changes: Any) -> str:
    """Render the page of *exported* with some results changed."""
    subject: Any = SimpleNamespace(name="dsop-resnet8", project="photos", labels=HOSTILE)
    fields = {"lineage": exported.manifest.lineage, "versions": exported.manifest.versions}
    page = render_report(subject, dataclasses.replace(exported, **changes), fields, exported.manifest.files)
    Reader(page)
    return page


def test_flips_and_an_accepted_drift_are_reported(branched: Exported) -> None:
    flip = Flip(image=1, network=0, file=2, margin=0.5, cause="error")
    top1 = branched.parity.top1.model_copy(update={"flipped": (flip,), "num_agreeing": 11})
    parity = branched.parity.model_copy(update={"top1": top1, "passed": False})
    page = rendered(branched, parity=parity)
    assert "0 noise, 0 routing, 1 wrong" in page
    assert "The drift EXCEEDS the limit" in page
    assert "--allow-drift accepted it" in page


def test_the_page_shows_the_decision(branched: Exported) -> None:
    rejection = Rejection(score="energy", threshold=1.5, auroc=0.75, left_out="refitted")
    page = rendered(branched, decision=Decision(rejection=rejection))
    assert "0.75, by fitting the classifier without it: a part of the unknown images" in page
    multi_label = Decision(activation="sigmoid", thresholds=(0.25,) * len(HOSTILE))
    assert "the sigmoid of its logit reaches its threshold" in rendered(branched, decision=multi_label)
    assert "Decision" not in rendered(branched, decision=None)


def test_the_page_of_an_int8_bundle_shows_the_accuracy_and_what_was_tried(branched: Exported) -> None:
    tried = (
        Attempt(drop=5.5),
        Attempt(in_float32=("conv1",), drop=5.0),
    )
    settings = {"runtime": "cpu", "num_images": 20, "num_layers": 7}
    accuracy = Accuracy(num_images=20, before=0.9, after=0.85, num_agreeing=19, low=0.76, high=0.99, drop=5.0)
    quantisation = Quantization(**settings, in_float32=("conv1",), tried=tried)
    precision = branched.precision.model_copy(
        update={"precision": "int8", "quantisation": quantisation, "accuracy": accuracy}
    )
    page = rendered(branched, precision=precision)
    assert "7 layers for CPUs (TensorRT does not accept this form), ranges of 20 images" in page
    assert "no layers in float32 5.50, 1 layers in float32 5.00 points lost" in page
    assert "top-1 90.00 % (95 % interval 69.9 to 97.2 %) before" in page
