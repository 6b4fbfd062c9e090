"""The gauge that an autoscaler reads: the share of the last seconds for which workers were busy."""

import asyncio
import time
from types import SimpleNamespace

import pytest

from sopdeploy_service.observability import busy as module
from sopdeploy_service.observability.busy import WINDOW, BusyShare, measure_loop, thread_seconds
from sopdeploy_service.observability.metrics import Metrics

# workers, then (seconds, busy workers) one after the other; the share at the end
PAST = {
    "idle": (2, [], 0.0),
    "always busy": (2, [(60, 2)], 1.0),
    "more work than workers, half of the time": (2, [(0.25, 3), (0.25, 0)] * 120, 0.5),
    "half of them": (2, [(60, 1)], 0.5),
    "half of the time": (1, [(0.25, 1), (0.25, 0)] * 120, 0.5),
    "busy since a third of the window": (1, [(60, 0), (WINDOW / 3, 1)], 1 / 3),
    "idle since long": (1, [(60, 1), (WINDOW + 1, 0)], 0.0),
    "two batches of one device": (1, [(60, 2)], 1.0),
    "more seconds ago than the window": (1, [(3600, 1)], 1.0),
}


@pytest.mark.parametrize(("workers", "past", "share"), PAST.values(), ids=PAST)
def test_the_busy_share_is_that_of_the_last_seconds(clock, workers, past, share):
    busy = BusyShare(workers)
    for seconds, count in past:
        busy.change(count - busy.num_busy)
        clock.time += seconds

    assert busy.share() == pytest.approx(share, abs=0.03)
    assert 0.0 <= busy.share() <= 1.0


@pytest.mark.parametrize("worker", [0, 1, 2])
def test_the_gauge_shows_the_busiest_part(clock, worker):
    metrics = Metrics()
    metrics.busy_shares.append(BusyShare())
    metrics.busy_shares[worker].change(1)
    clock.time += WINDOW
    shown = metrics.registry.get_sample_value("sopdeploy_busy")

    assert shown == pytest.approx(1.0, abs=0.03)


def test_seconds_that_have_ended_count_as_busy(clock):
    busy = BusyShare()
    for _ in range(60):
        clock.time += 0.5
        busy.add(0.1)

    assert busy.share() == pytest.approx(0.2, abs=0.02)


def test_an_event_loop_is_busy_only_while_it_computes(monkeypatch) -> None:
    seconds = [10.0, 10.2, 10.2, 10.25]
    counted: list[float] = []
    monkeypatch.setattr(module, "thread_seconds", lambda: seconds.pop(0))
    monkeypatch.setattr(module, "LOOP_SECONDS", 0)

    async def scenario() -> None:
        measuring = asyncio.create_task(measure_loop(SimpleNamespace(add=counted.append)))
        while seconds:
            await asyncio.sleep(0)
        measuring.cancel()

    asyncio.run(scenario())
    assert counted == pytest.approx([0.2, 0.0, 0.05])


@pytest.mark.parametrize("content", [None, "", "300000000 200000000 7"])
def test_the_seconds_of_a_thread_have_its_waits_for_a_core(
    monkeypatch, tmp_path, content
) -> None:
    monkeypatch.setattr(module, "SCHEDULED", tmp_path / "schedstat")
    monkeypatch.setattr(time, "thread_time", lambda: 0.4)
    if content is not None:
        (tmp_path / "schedstat").write_text(content)

    assert thread_seconds() == pytest.approx(0.5 if content else 0.4)
