"""What an export ends with: four lines, or with --verbose a line for each fact."""

from dataclasses import replace

import pytest

from sopdeploy.cli.deployment.export import show
from sopdeploy.decision import Calibration, Decision, Rejection
from sopdeploy_export.report.results import Exported

FACTS = (
    *("removed", "kept", "graph", "logits", "batch", "types", "drift", "answers", "costs", "onnx", "bundle"),
)


def shown(exported: Exported, capsys: pytest.CaptureFixture[str]) -> str:
    show(exported, verbose=True)
    return capsys.readouterr().out


def test_there_are_four_lines_in_words(branched: Exported, capsys: pytest.CaptureFixture[str]) -> None:
    show(branched)
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert list(lines) == ["removed", "proof", "drift", "bundle"]
    assert lines["removed"].startswith("branches (")
    assert lines["proof"] == (
        "trained = detached = plain: equal graphs, equal logits; no output depends on other images"
    )
    assert lines["drift"].endswith(f"{branched.parity.logits.drift_in_floors:.1f} noise floors (limit 16)")
    assert lines["bundle"].startswith(f"{branched.path} (")


def test_there_is_a_line_for_each_fact(branched: Exported, capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(branched, capsys).splitlines()
    assert tuple(line.split()[0] for line in lines) == FACTS
    facts = {line.split()[0]: line for line in lines}
    assert f"{branched.certificate.bytes_removed:,} bytes saved" in facts["removed"]
    assert branched.certificate.roots.any_batch[:16] in facts["graph"]
    assert f"of {branched.network_summary.trained.parameters:,} parameters" in facts["costs"]


DECISIONS = {
    "calibrated": (
        Decision(
            calibration=Calibration(
                temperature=2.5,
                error_before=0.1256,
                error_after=0.0141,
                num_images=5000,
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
    branched: Exported, capsys: pytest.CaptureFixture[str], decision: Decision, lines: dict[str, str]
) -> None:
    with_decision = replace(branched, decision=decision)
    found = shown(with_decision, capsys)
    assert all(f"{name:8} {text}\n" in found for name, text in lines.items())
    assert Decision.model_validate(with_decision.summary()["decision"]) == decision
    assert "decision" not in branched.summary()


def test_flipped_routes_are_counted(gated: Exported, capsys: pytest.CaptureFixture[str]) -> None:
    assert "0 routes flipped, 0 wrong" in shown(gated, capsys)
