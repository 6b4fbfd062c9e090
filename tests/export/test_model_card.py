"""What an export prints, and its model card."""

import dataclasses
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sopdeploy.commands.export import show_export
from sopdeploy.models.describe import describe
from sopdeploy.models.registry import create_model, entry
from sopdeploy_export.model_card import as_markdown, render_model_card
from sopdeploy_export.pipeline import count_costs
from sopdeploy_export.results import Exported
from tests.export.conftest import HOSTILE


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


def test_an_export_prints_four_lines_in_words(branched: Exported, capsys: pytest.CaptureFixture[str]) -> None:
    flips = {"noise": 0, "routing": 0, "error": 1}
    parity = branched.parity.model_copy(update={"flips": flips, "drift_allowed": True})
    facts = dataclasses.replace(branched, parity=parity).facts()
    assert facts["answers"].endswith("flips: 0 noise, 0 routing, 1 wrong")
    assert "THE COMPARISON DID NOT PASS, which was allowed" in facts["drift"]
    show_export(branched)
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert list(lines) == ["removed", "proof", "drift", "bundle"]
    assert lines["proof"] == (
        "trained = detached = plain: equal graphs, equal logits; no output depends on other images"
    )
    assert lines["drift"].endswith(f"{branched.parity.logits.drift_in_floors:.1f} noise floors (limit 16)")


@pytest.mark.parametrize("name", ["dsop-resnet8", "psdr-resnet50", "gsop-net1-resnet26"])
def test_the_costs_are_those_of_describe(name: str) -> None:
    with torch.device("meta"):
        network = create_model(name, num_classes=entry(name).num_classes)
        plain = network.inference_model() if network.training_only else network
    counted = describe(name)
    assert count_costs(network, plain, entry(name).image_size) == (counted.training, counted.shipped)
