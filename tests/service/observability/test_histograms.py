"""What is counted in bulk says the same as the library's own histogram."""

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from sopdeploy_service.observability.metrics import MOST, Histograms

BOUNDS = (0.001, 0.25, 1, 30)
AMOUNTS = st.lists(st.one_of(st.sampled_from((0.0, *BOUNDS)), st.floats(0, 100, allow_subnormal=False)))


def page(register) -> dict[str, float]:
    registry = CollectorRegistry()
    register(registry)
    lines = generate_latest(registry).decode().splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name: float(value) for name, value in pairs if "_created" not in name}


@given(st.dictionaries(st.sampled_from(("decode", "queue")), AMOUNTS))
def test_its_page_is_that_of_the_library(observed):
    def ours(registry):
        metric = Histograms("x_seconds", "How long", BOUNDS, "stage")
        registry.register(metric)
        for stage, amounts in observed.items():
            metric.open(stage)
            for amount in amounts:
                metric.observe(stage, amount)

    def theirs(registry):
        metric = Histogram("x_seconds", "How long", ("stage",), buckets=BOUNDS, registry=registry)
        for stage, amounts in observed.items():
            child = metric.labels(stage)
            for amount in amounts:
                child.observe(amount)

    found, expected = page(ours), page(theirs)
    assert found == pytest.approx(expected, rel=1e-12)
    assert list(found) == list(expected)


def test_two_scrapes_count_nothing_twice():
    metric = Histograms("x", "x", BOUNDS, "stage")
    for times in (1, 2):
        metric.observe("decode", 0.5)
        assert page(lambda registry: registry.register(metric))['x_count{stage="decode"}'] == times


def test_threads_that_observe_while_others_scrape_lose_nothing():
    metric = Histograms("x", "x", BOUNDS, "stage")
    rounds, threads = 3 * MOST + 7, 4

    def observe() -> None:
        for _ in range(rounds):
            metric.observe("decode", 0.5)

    working = [threading.Thread(target=observe) for _ in range(threads)]
    for thread in working:
        thread.start()
    while any(thread.is_alive() for thread in working):
        list(metric.collect())
    found = page(lambda registry: registry.register(metric))
    assert found['x_count{stage="decode"}'] == rounds * threads
    assert found['x_sum{stage="decode"}'] == 0.5 * rounds * threads
