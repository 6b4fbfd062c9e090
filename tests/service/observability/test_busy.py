"""The gauge that an autoscaler reads: the share of the last seconds for which workers were busy."""

import time
from types import SimpleNamespace

import pytest

from sopdeploy_service.observability.busy import WINDOW, BusyShare
from sopdeploy_service.observability.metrics import Metrics


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(time=1000.0)
    monkeypatch.setattr(time, "monotonic", lambda: now.time)
    return now


# workers, then (seconds, busy workers) one after the other; the share at the end
PAST = {
    "idle": (2, [], 0.0),
    "always busy": (2, [(60, 2)], 1.0),
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


@pytest.mark.parametrize("worker", [0, 1])
def test_the_gauge_shows_the_busier_of_the_decoders_and_the_device(clock, worker):
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
