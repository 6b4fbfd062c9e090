"""The soak benchmark: its accounting, and a run of eight seconds."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import soak
from soak_accounts import Resources, Tally, bounds, mb_per_minute

from sopdeploy.client import ClassProbability

CLASSES = [ClassProbability(label="a", probability=1.0)]


def samples_of(resident: list[float]) -> list[Resources]:
    """One sample per second with so many megabytes."""
    return [
        Resources(moment=1.0 * second, resident=int(1e6 * mb), threads=5, descriptors=9)
        for second, mb in enumerate(resident)
    ]


STEADY = samples_of([100] * 90)
LEAK = samples_of([100 + 0.05 * n for n in range(120)])
WAVE = samples_of([100 + 20 * (n % 2) for n in range(120)])
JUMP = samples_of([100] * 10 + [130] * 110)


@pytest.fixture
def tally() -> Tally:
    """The tally of a good soak."""
    tally = Tally()
    tally.note("single", 200)
    tally.compare("single", CLASSES, {"a": 1.0})
    tally.by_digest.update(["one", "other"])
    return tally


def verdict(tally: Tally, samples: list[Resources] = STEADY, code: int = 0, **after: int) -> dict[str, Any]:
    last = replace(samples[-1], **after)
    return {bound.name: bound.held for bound in bounds(tally, [*samples[:-1], last], code)}


def test_a_leak_is_a_slope_but_a_jump_or_a_wave_is_not(tally: Tally) -> None:
    assert mb_per_minute(LEAK) == pytest.approx(3)
    assert abs(mb_per_minute(WAVE)) < 0.5
    assert mb_per_minute(JUMP) == mb_per_minute(LEAK[:1]) == 0
    assert verdict(tally, LEAK)["memory"] is False
    assert verdict(tally, samples_of([100, 200, 300]))["memory"] is None  # too short


def test_a_clean_soak_meets_every_bound_and_an_unexpected_answer_breaks_one(tally: Tally) -> None:
    assert set(verdict(tally).values()) == {True}
    tally.note("any", 429, "queue_full", [200])
    assert set(verdict(tally).values()) == {True}
    assert [name for name, held in verdict(tally, threads=6).items() if not held] == ["threads"]
    tally.note("any", 503, "engine_dead", [200])
    tally.compare("single", CLASSES, {"a": 0.9})
    assert [name for name, held in verdict(tally).items() if not held] == ["predictions", "answers"]


@pytest.mark.slow  # needs an idle machine
@pytest.mark.parametrize("front_ends", [1, 2])
def test_eight_seconds_of_soak_meet_every_bound(
    bundle_path: Path, make_bundle: Callable[..., Path], tmp_path: Path, front_ends: int
) -> None:
    bundles = [bundle_path, make_bundle(tmp_path / "other", seed=1)]
    tally, samples, found = soak.soak(bundles, tmp_path, seconds=8, warm_up=4, front_ends=front_ends)
    assert [bound for bound in found if bound.held is False] == [], tally.failures
    kinds = {kind for kind, _ in tally.outcomes}
    assert {"single", "form", "bad", "left", "slow", "json", "v2", "swap", "/readyz"} <= kinds
    assert tally.compared > 20
    assert len(samples) == 2
    assert tally.failures == []
