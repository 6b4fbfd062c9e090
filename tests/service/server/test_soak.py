"""The soak benchmark: its accounting, and a run of eight seconds."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sopdeploy.client import ClassProbability

FOLDER = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture
def soak_modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The modules of the soak, which are scripts and no package."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import soak
    import soak_accounts
    import soak_clients
    import soak_swaps

    yield SimpleNamespace(accounts=soak_accounts, clients=soak_clients, swaps=soak_swaps, run=soak)
    for name in ("soak", "soak_accounts", "soak_clients", "soak_swaps"):
        del sys.modules[name]


def held(soak_modules: Any, resident: list[float], step: float = 1.0) -> list[Any]:
    return [
        soak_modules.accounts.Resources(moment=step * n, resident=int(1e6 * mb), threads=5, descriptors=9)
        for n, mb in enumerate(resident)
    ]


def verdict(soak_modules: Any, tally: Any, samples: list[Any], **after: int) -> dict[str, bool | None]:
    last = replace(samples[-1], threads=after.get("threads", 5), descriptors=after.get("descriptors", 9))
    found = soak_modules.accounts.bounds(tally, [*samples[:-1], last], after.get("code", 0))
    return {bound.name: bound.held for bound in found}


def good_tally(soak_modules: Any) -> Any:
    tally = soak_modules.accounts.Tally()
    tally.note("single", 200)
    tally.compare("single", [ClassProbability(label="a", probability=1.0)], {"a": 1.0})
    tally.by_digest.update(["one", "other"])
    return tally


def test_a_leak_is_a_slope_but_a_jump_or_a_wave_is_not(soak_modules: Any) -> None:
    leak = held(soak_modules, [100 + 0.05 * n for n in range(120)])
    assert soak_modules.accounts.mb_per_minute(leak) == pytest.approx(3)
    wave = held(soak_modules, [100 + 20 * (n % 2) for n in range(120)])
    assert abs(soak_modules.accounts.mb_per_minute(wave)) < 0.5
    jump = held(soak_modules, [100] * 10 + [130] * 110)
    assert soak_modules.accounts.mb_per_minute(jump) == 0
    assert soak_modules.accounts.mb_per_minute(leak[:1]) == 0


def test_a_clean_soak_meets_every_bound(soak_modules: Any) -> None:
    assert set(verdict(soak_modules, good_tally(soak_modules), held(soak_modules, [100] * 90)).values()) == {
        True
    }


def test_a_short_slope_is_not_judged(soak_modules: Any) -> None:
    assert (
        verdict(soak_modules, good_tally(soak_modules), held(soak_modules, [100, 200, 300]))["memory"] is None
    )


@pytest.mark.parametrize(
    ("name", "after"),
    [("threads", {"threads": 6}), ("descriptors", {"descriptors": 10}), ("exit code", {"code": 70})],
)
def test_leftover_resources_break_their_bound(soak_modules: Any, name: str, after: dict[str, int]) -> None:
    found = verdict(soak_modules, good_tally(soak_modules), held(soak_modules, [100] * 90), **after)
    assert [bound for bound, kept in found.items() if kept is False] == [name]


def test_a_leak_breaks_the_bound_of_memory(soak_modules: Any) -> None:
    leak = held(soak_modules, [100 + 0.05 * n for n in range(120)])
    assert verdict(soak_modules, good_tally(soak_modules), leak)["memory"] is False


@pytest.mark.parametrize(
    ("status", "code", "wanted", "fails"),
    [
        (200, "", [200], False),
        (429, "queue_full", [200], False),
        (503, "deadline_unreachable", [200], False),
        (503, "engine_dead", [200], True),
        (500, "internal_error", [200], True),
        (200, "", [415], True),
        (422, "truncated_image", [422], False),
        (0, "unreachable", [200], True),
    ],
)
def test_only_expected_or_allowed_statuses_pass(
    soak_modules: Any, status: int, code: str, wanted: list[int], fails: bool
) -> None:
    tally = good_tally(soak_modules)
    tally.note("any", status, code, wanted)
    assert bool(tally.failed) is fails
    assert verdict(soak_modules, tally, held(soak_modules, [100] * 90))["answers"] is not fails


def test_a_wrong_prediction_breaks_two_bounds(soak_modules: Any) -> None:
    for found in ({"a": 0.9}, {"b": 1.0}):
        tally = good_tally(soak_modules)
        tally.compare("single", [ClassProbability(label="a", probability=1.0)], found)
        broken = verdict(soak_modules, tally, held(soak_modules, [100] * 90))
        assert (broken["predictions"], broken["answers"]) == (False, False)


def test_a_soak_without_comparisons_fails(soak_modules: Any) -> None:
    assert (
        verdict(soak_modules, soak_modules.accounts.Tally(), held(soak_modules, [100] * 90))["predictions"]
        is False
    )


def test_all_failures_are_counted_and_some_kept(soak_modules: Any) -> None:
    tally = soak_modules.accounts.Tally()
    for _ in range(1000):
        tally.fail("no")
    assert (tally.failed, len(tally.failures)) == (1000, soak_modules.accounts.KEPT)


def test_the_resources_of_a_process_are_measured(soak_modules: Any) -> None:
    import os

    before = soak_modules.accounts.read_resources(os.getpid())
    with FOLDER.joinpath("soak.py").open(encoding="utf-8"):
        after = soak_modules.accounts.read_resources(os.getpid())
    assert after.descriptors == before.descriptors + 1
    assert after.threads >= 1
    assert after.resident > 1e6


def test_a_response_of_an_unknown_bundle_fails_the_soak(soak_modules: Any) -> None:
    scenario = soak_modules.clients.Scenario(
        url="",
        bodies={},
        expected={"one": {"a.jpg": {"a": 1.0}}},
        tally=soak_modules.accounts.Tally(),
        classes=1,
    )
    classes = [ClassProbability(label="a", probability=1.0)]
    scenario.compare("single", "one", "a.jpg", classes)
    assert (scenario.tally.failed, scenario.tally.by_digest) == (0, {"one": 1})
    scenario.compare("single", "other", "a.jpg", classes)
    assert scenario.tally.failures == ["single: unknown bundle 'other'"]


def test_responses_of_a_single_bundle_fail_the_swap_bound(soak_modules: Any) -> None:
    tally = good_tally(soak_modules)
    del tally.by_digest["other"]
    assert verdict(soak_modules, tally, held(soak_modules, [100] * 90))["bundles"] is False


@pytest.mark.slow  # needs an idle machine
def test_eight_seconds_of_soak_meet_every_bound(
    soak_modules: Any, bundle_path: Path, make_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    bundles = [bundle_path, make_bundle(tmp_path / "other", seed=1)]
    tally, samples, found = soak_modules.run.soak(bundles, tmp_path, seconds=8, warm_up=4)
    assert [bound for bound in found if bound.held is False] == [], tally.failures
    kinds = {kind for kind, _ in tally.outcomes}
    assert {"single", "form", "bad", "left", "slow", "json", "v2", "swap", "/readyz"} <= kinds
    assert tally.compared > 20
    assert len(samples) == 2
    assert tally.failures == []
