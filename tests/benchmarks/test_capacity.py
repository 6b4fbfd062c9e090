"""The capacity model: known results of queueing theory, and rejected arguments."""

import pytest
from capacity import Replica, forecast

REPLICA = Replica(fixed_ms=0.0, each_ms=10.0, largest=1, decode_ms=0.0, decode_lock_ms=0.0, loop_ms=0.1)
BATCHED = Replica(fixed_ms=20.0, each_ms=2.0, largest=16, decode_ms=2.6, decode_lock_ms=0.2, loop_ms=0.5)


@pytest.mark.parametrize("load", [0.2, 0.5, 0.8])
def test_single_images_wait_as_in_the_queue_m_d_1(load: float) -> None:
    expected = 10 + load * 10 / (2 * (1 - load)) + REPLICA.cpu_ms
    assert forecast(REPLICA, 100 * load).mean_ms == pytest.approx(expected, rel=0.01)


def test_batches_grow_until_they_carry_the_rate() -> None:
    light, heavy = (forecast(BATCHED.with_decoders(), rate) for rate in (5.0, 240.0))
    assert light.batch == pytest.approx(1, abs=0.1)
    # n images arrive during a batch of n: n = r (a + b n)
    assert heavy.batch == pytest.approx(0.24 * 20 / (1 - 0.24 * 2), rel=0.02)
    assert heavy.p99_ms > heavy.p50_ms > light.p50_ms
