"""The model of a replica equals closed forms, and plans keep their limits."""

import functools
import math

import capacity_plan
import numpy as np
import pytest
from capacity_model import System, batch_sizes, chain, delay, erlang, forecast, poisson
from capacity_plan import Wanted, cores_each, plan, provisioned
from hypothesis import given, settings
from hypothesis import strategies as st

forecast_once = functools.cache(forecast)


@pytest.fixture(autouse=True)
def _cache_forecasts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each plan searches for the highest rate within a p99 again, which takes 13 forecasts."""
    monkeypatch.setattr(capacity_plan, "forecast", forecast_once)


def engine_alone(fixed: float, each: float, largest: int) -> System:
    return System(fixed_ms=fixed, each_ms=each, largest=largest, decode_ms=0.0, loop_ms=0.0, decoders=1)


@pytest.mark.parametrize("load", [0.1, 0.5, 0.8, 0.95])
def test_the_wait_of_a_batch_of_one_equals_the_closed_form_of_m_d_1(load: float) -> None:
    found = forecast(engine_alone(10.0, 0.0, 1), 100 * load)
    assert found.mean_ms == pytest.approx(10 + 10 * load / (2 * (1 - load)), rel=1e-3)
    assert found.busy == pytest.approx(load)
    assert found.batch == pytest.approx(1.0)


@given(
    fixed=st.floats(0, 50),
    each=st.floats(0.1, 20),
    largest=st.integers(1, 40),
    load=st.floats(0.02, 0.95),
)
@settings(max_examples=15, deadline=None)
def test_images_are_neither_lost_nor_created(fixed: float, each: float, largest: int, load: float) -> None:
    """A mean batch contains the images that arrive between the starts of two batches."""
    system = engine_alone(fixed, each, largest)
    rate = load * system.capacity / 1000
    waiting = chain(system, rate)
    sizes = batch_sizes(waiting, largest)
    batch = float(sizes @ np.arange(largest + 1))
    cycle = fixed + each * batch + waiting[0] / rate
    assert waiting.sum() == pytest.approx(1.0)
    assert batch == pytest.approx(rate * cycle, rel=1e-4)


@given(
    load=st.floats(0.01, 0.97),
    servers=st.integers(1, 12),
    step=st.floats(0.01, 2.0),
)
@settings(max_examples=40, deadline=None)
def test_a_wait_is_a_probability_and_keeps_its_mean_on_every_grid(
    load: float, servers: int, step: float
) -> None:
    service = 3.0
    found = delay(load * servers / service, servers, service, step)
    expected = erlang(load, servers) * service / (2 * (1 - load) * servers)
    assert found.min() >= 0
    assert found.sum() == pytest.approx(1.0)
    whole = 20 * 128 * step > 20 * service / (2 * (1 - load) * servers)
    assert not whole or step * float(found @ np.arange(len(found))) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("load", "servers", "waits"), [(0.5, 1, 0.5), (0.5, 2, 1 / 3), (0.8, 4, 0.5964)])
def test_erlangs_formula_equals_printed_tables(load: float, servers: int, waits: float) -> None:
    assert erlang(load, servers) == pytest.approx(waits, abs=1e-4)


def test_poisson_probabilities_are_the_definition() -> None:
    found = poisson(np.array([0.0, 2.5]), 40)
    assert found[0].tolist() == pytest.approx([1.0, *[0.0] * 39])
    assert found[1, 3] == pytest.approx(math.exp(-2.5) * 2.5**3 / 6)
    assert found[1].sum() == pytest.approx(1.0)


def test_more_images_make_larger_batches_and_longer_waits() -> None:
    system = engine_alone(20.0, 2.0, 32)
    found = [forecast(system, share * system.capacity) for share in (0.1, 0.4, 0.7, 0.95)]
    for name in ("batch", "mean_ms", "p50_ms", "p99_ms", "busy"):
        values = [getattr(one, name) for one in found]
        assert values == sorted(values)


def test_a_rate_at_capacity_has_no_forecast() -> None:
    with pytest.raises(ValueError, match=r"a replica has a capacity of 80\.0"):
        forecast(engine_alone(20.0, 10.0, 8), 80.0)


SYSTEM = provisioned(System(fixed_ms=20.0, each_ms=2.0, largest=32, decode_ms=2.6, loop_ms=0.46, decoders=1))


def test_decoders_and_cores_are_those_that_the_slowest_other_stage_can_use() -> None:
    assert SYSTEM.limits["engine"] == pytest.approx(32 / 0.084)
    assert SYSTEM.decoders == math.ceil(381 * 0.0026)
    wanted = Wanted(p99_ms=150, headroom=0.3, kilobytes=50, engine_cores=1)
    assert cores_each(SYSTEM, wanted) == pytest.approx(2.2)  # 1 + 381 * 3.06 ms, up to the tenth


@pytest.mark.parametrize("rate", [5.0, 900.0, 40_000.0, 1_000_000.0])
@pytest.mark.parametrize("headroom", [0.0, 0.3, 0.6])
def test_a_plan_keeps_p99_with_one_lost_and_headroom_with_all(rate: float, headroom: float) -> None:
    wanted = Wanted(p99_ms=150, headroom=headroom, kilobytes=50)
    (row,) = plan(SYSTEM, wanted, [rate])
    assert row.lost.p99_ms <= wanted.p99_ms
    assert row.now.p99_ms <= row.lost.p99_ms
    assert row.each <= SYSTEM.capacity * (1 - headroom) * (1 + 1e-9)
    assert row.replicas >= 2
    assert row.gbit_per_s == pytest.approx(rate * 50_000 * 8 / 1e9)
    assert row.held == pytest.approx(row.each * row.now.mean_ms / 1000)


def test_the_fewest_replicas_are_planned() -> None:
    (row,) = plan(SYSTEM, Wanted(p99_ms=150, headroom=0.3, kilobytes=50), [10_000.0])
    assert row.replicas == math.ceil(10_000 / (0.7 * SYSTEM.capacity))
    (tight,) = plan(SYSTEM, Wanted(p99_ms=80, headroom=0.0, kilobytes=50), [10_000.0])
    assert forecast(SYSTEM, 10_000 / (tight.replicas - 2)).p99_ms > 80


def test_an_impossible_p99_is_rejected_with_the_reason() -> None:
    with pytest.raises(
        ValueError, match=r"p99 of 20 ms is impossible: an image takes 25\.1 ms without waiting"
    ):
        plan(SYSTEM, Wanted(p99_ms=20, headroom=0.3, kilobytes=50), [100.0])
