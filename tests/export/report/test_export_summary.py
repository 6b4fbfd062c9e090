"""What an export ends with: a frame on a terminal, a line for each fact elsewhere."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from sopdeploy.cli.deployment import export_summary as closing
from sopdeploy.decision import Calibration, Decision, Rejection
from sopdeploy_export.pipeline import Exported

NAMES = [
    *("removed", "kept", "graph", "logits", "rules", "types", "drift", "answers", "costs", "onnx"),
    *("speed", "bundle", "page"),
]


def shown(exported: Exported, monkeypatch: pytest.MonkeyPatch, *, terminal: bool, width: int = 100) -> str:
    screen = io.StringIO()
    console = Console(
        file=screen, force_terminal=terminal, width=width, highlight=False, soft_wrap=True, color_system=None
    )
    monkeypatch.setattr(closing, "out", console)
    closing.show(exported)
    return screen.getvalue()


def test_elsewhere_there_is_a_line_for_each_fact(branched: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = shown(branched, monkeypatch, terminal=False).splitlines()
    assert [line.split()[0] for line in lines] == NAMES
    facts = {line.split()[0]: line for line in lines}
    assert f"{branched.certificate.bytes_removed:,} bytes saved" in facts["removed"]
    assert branched.certificate.roots.any_batch[:16] in facts["graph"]
    assert f"{branched.parity.logits.drift_in_floors:.1f} noise floors" in facts["drift"]
    assert f"of {branched.network_summary.trained.parameters:,} parameters" in facts["costs"]
    assert "of the plain backbone's time" in facts["speed"]


DECISIONS = {
    "calibrated": (
        Decision(
            calibration=Calibration(
                temperature=2.5,
                error_before=0.1256,
                error_after=0.0141,
                images=5000,
                estimated_on="held-out",
            ),
            rejection=Rejection(score="energy", threshold=3.25, auroc=0.915),
        ),
        {
            "scale": "temperature 2.5, from 5,000 held-out images; calibration error 0.1256 before, "
            "0.0141 after, folded into the last layer",
            "unknown": "energy below 3.25; accepts about 95 % of known images; "
            "AUROC with one class left out 0.92, by masking its logit: most unknown images are recognized",
        },
    ),
    "several classes": (
        Decision(activation="sigmoid", thresholds=(0.3, 0.5, 0.4)),
        {"present": "probability of at least 0.300 to 0.500, one per class"},
    ),
}


@pytest.mark.parametrize(("decision", "lines"), DECISIONS.values(), ids=DECISIONS)
def test_a_fitted_decision_is_printed_and_part_of_the_json(
    branched: Exported, monkeypatch: pytest.MonkeyPatch, decision: Decision, lines: dict[str, str]
) -> None:
    manifest = branched.manifest.model_copy(update={"decision": decision})
    with_decision = replace(branched, manifest=manifest)
    found = shown(with_decision, monkeypatch, terminal=False)
    assert all(f"{name:8} {text}\n" in found for name, text in lines.items())
    assert Decision.model_validate(with_decision.summary()["decision"]) == decision
    assert "decision" not in branched.summary()
    assert all(text in with_decision._repr_html_() for _, text in decision.rows())


def test_network_without_branches_has_removed_nothing(
    branched: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate = branched.certificate.model_copy(update={"removed": (), "detached": ()})
    lines = shown(replace(branched, certificate=certificate), monkeypatch, terminal=False).splitlines()
    assert lines[0] == "removed  nothing: the network has no training-only parts"


@pytest.mark.parametrize("width", [60, 80, 120])
def test_on_a_terminal_it_is_one_framed_screen(
    branched: Exported, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    lines = shown(branched, monkeypatch, terminal=True, width=width).splitlines()
    assert "exported dsop-resnet8" in lines[0]
    assert max(map(len, lines)) <= width
    assert len(lines) <= 50
    assert all(any(f" {name} " in line for line in lines) for name in NAMES)


def test_the_rules_the_routes_and_the_way_to_a_speed_are_named(
    gated: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = shown(gated, monkeypatch, terminal=False)
    assert "K of N experts (1)" in screen
    assert "0 routes flipped, 0 wrong" in screen
    assert f"sopdeploy bench {gated.path}" in screen
