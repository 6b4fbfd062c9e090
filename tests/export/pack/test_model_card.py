"""What an export prints, and its model card."""

import json
import re
from types import SimpleNamespace
from typing import Any

import onnx

from sopdeploy.images.preprocess import Preprocess
from sopdeploy_export.pack.model_card import render_model_card
from sopdeploy_export.pack.results import Exported
from tests.export.conftest import HOSTILE


def test_the_model_card_contains_no_html_or_links_of_a_checkpoint(branched: Exported) -> None:
    hostile = "<img src=x onerror=alert(1)>\n\n# [Heading](https://example.org)"
    preprocess, training = branched.manifest.preprocess, {"epoch": hostile}
    subject: Any = SimpleNamespace(
        name="n", project="p", labels=HOSTILE, preprocess=preprocess, training=training
    )
    shared = ("batch", "inputs", "outputs", "versions")
    card = render_model_card(
        subject, branched, {name: getattr(branched.manifest, name) for name in shared}
    )

    assert (
        "- epoch: &lt;img src=x onerror=alert(1)&gt; \\# \\[Heading\\](https\\://example.org)\n"
        in card
    )
    assert not re.search(r"[<>]|(?<!\\)\[|(?<!\\)https?:", card)
    assert "\u202e" not in card
    assert card.count("\n- proved: ") == 2
    assert card.count("\n- measured: ") == 4


def test_the_graph_names_its_classes_and_rules(branched: Exported) -> None:
    properties = onnx.load(
        branched.path / "model.onnx", load_external_data=False
    ).metadata_props
    values = {
        item.key: json.loads(item.value) for item in properties if item.key != "sopdeploy"
    }
    assert values["labels"] == json.loads((branched.path / "labels.json").read_bytes())
    assert Preprocess(**values["preprocess"]) == branched.manifest.preprocess


def test_the_model_card_begins_with_the_fields_of_the_hub(branched: Exported) -> None:
    _, fields, text = (
        (branched.path / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    )
    assert {line.partition(":")[0] for line in fields.splitlines()} == {
        *("pipeline_tag", "library_name", "license")
    }
    assert text.startswith("\n# ")
