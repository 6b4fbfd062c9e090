"""Pages that many clients ask for: made once a second, and merged from those of several processes."""

import asyncio
import itertools

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from sopdeploy_service.observability import pages
from sopdeploy_service.observability.metrics import Metrics
from sopdeploy_service.observability.pages import Shared, merge_metrics


def test_all_who_ask_within_a_second_share_what_was_made_once(monkeypatch) -> None:
    monkeypatch.setattr(pages, "SHARED_SECONDS", 1.0)
    monkeypatch.setattr(pages.time, "monotonic", lambda: now)
    numbers = itertools.count(1)
    now = 100.0

    async def make() -> int:
        await asyncio.sleep(0)
        return next(numbers)

    async def scenario() -> None:
        nonlocal now
        shared = Shared(make)
        impatient = asyncio.create_task(shared.get())
        await asyncio.sleep(0)
        impatient.cancel()  # this client has gone; the others wait for the same page
        assert await asyncio.gather(*(shared.get() for _ in range(50))) == [1] * 50
        now += 0.99
        assert await shared.get() == 1
        now += 0.02
        assert await asyncio.gather(*(shared.get() for _ in range(50))) == [2] * 50

    asyncio.run(scenario())


@pytest.mark.parametrize("seconds", [0.0, 1.0])
def test_an_error_reaches_all_who_ask_and_the_next_second_tries_again(
    monkeypatch, seconds
) -> None:
    monkeypatch.setattr(pages, "SHARED_SECONDS", seconds)
    numbers = itertools.count(1)

    async def make() -> int:
        if (number := next(numbers)) == 1:
            raise OSError("no file")
        return number

    async def scenario() -> list[object]:
        shared = Shared(make)
        first = await asyncio.gather(*(shared.get() for _ in range(3)), return_exceptions=True)
        return [*map(str, first), *await asyncio.gather(shared.get(), return_exceptions=True)]

    *first, second = asyncio.run(scenario())
    assert first == ["no file"] * 3
    assert str(second) == ("no file" if seconds else "2")


def test_attempts_are_counted_by_the_number_that_clients_send() -> None:
    metrics = Metrics()
    for sent in ("1", "1", "2", "5", "6", "-1", "a" * 100, None):
        metrics.count_request("/v1/classify", 200, 0.01, attempt=sent)

    counted = {
        sample.labels["attempt"]: sample.value
        for family in metrics.registry.collect()
        if family.name == "sopdeploy_attempts"
        for sample in family.samples
    }
    assert counted == {"1": 2, "2": 1, "3": 0, "4": 0, "5": 1, "other": 3}


def page_of(model: str) -> bytes:
    metrics = Metrics()
    metrics.count_request("/v1/classify", 200, 0.01, model)
    return generate_latest(metrics.registry)


def test_the_pages_of_processes_are_merged_by_metric_with_the_label_process() -> None:
    odd = 'a "model" {of, spaces} \\ and\nlines'
    merged = merge_metrics({"front-0": page_of(odd), "front-1": page_of("b")}, b"").decode()
    families = {family.name: family for family in text_string_to_metric_families(merged)}
    assert merged.count("# HELP sopdeploy_requests_total ") == 1

    counted = {
        tuple(one.labels[name] for name in ("process", "model")): one.value
        for one in families["sopdeploy_requests"].samples
    }

    assert counted == {("front-0", odd): 1.0, ("front-1", "b"): 1.0}
    # Without labels of its own
    plain = [one.labels for one in families["sopdeploy_connections"].samples]

    assert plain == [{"process": "front-0"}, {"process": "front-1"}]


def test_a_process_without_a_page_is_down_and_changes_nothing_else() -> None:
    good = page_of("a")
    merged = merge_metrics({"front-0": b"", "front-1": good}, b"")
    up = b'sopdeploy_worker_up{process="front-%d"} %d.0\n'

    assert merged.replace(up % (0, 0), b"") == merge_metrics({"front-1": good}, b"")
    assert up % (1, 1) in merged


def test_a_metric_of_two_types_has_one_head() -> None:
    good = page_of("a")
    wrong = b"# HELP sopdeploy_connections x\n# TYPE sopdeploy_connections counter\nsopdeploy_connections 1.0\n"
    merged = merge_metrics({"front-0": good, "front-1": wrong}, b"")

    assert merged.count(b"# TYPE sopdeploy_connections ") == 1
    assert b"# TYPE sopdeploy_connections gauge\n" in merged
    assert b'sopdeploy_connections{process="front-1"} 1.0\n' in merged
