"""Batch profiles and build progress."""

import signal
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sopdeploy.bundle.manifest import BatchRange
from sopdeploy.errors import ConfigError
from sopdeploy.tensorrt.cache import index_for, parse_profiles
from sopdeploy_export.engine_builder.build import (
    interrupts_recorded,
    make_monitor,
)

RANGE = BatchRange(minimum=1, optimum=8, maximum=64)


def test_the_default_profiles_are_the_batch_range_of_the_bundle() -> None:
    assert [str(p) for p in parse_profiles(None, RANGE)] == ["1", "2-8", "9-64"]
    assert [str(p) for p in parse_profiles(None, BatchRange(optimum=1, maximum=1))] == ["1"]


@given(st.sets(st.integers(1, 64), min_size=1, max_size=8))
def test_every_batch_has_exactly_one_profile_up_to_the_largest(sizes: set[int]) -> None:
    profiles = parse_profiles(",".join(map(str, sizes)), RANGE)
    for batch in range(1, max(sizes) + 1):
        fitting = [i for i, p in enumerate(profiles) if p.minimum <= batch <= p.maximum]
        assert fitting == [index_for(profiles, batch)]
    with pytest.raises(ConfigError, match="no profile accepts"):
        index_for(profiles, max(sizes) + 1)


@pytest.mark.parametrize("text", ["", "1,,8", "0", "1,65"])
def test_invalid_profiles_are_rejected(text: str) -> None:
    with pytest.raises(ConfigError, match="profiles="):
        parse_profiles(text, RANGE)


def test_control_c_between_callbacks_stops_the_build_at_its_next_step() -> None:
    answers: list[bool] = []

    def build() -> None:
        with interrupts_recorded() as interrupt:
            monitor = make_monitor(SimpleNamespace(IProgressMonitor=object), lambda _: None, interrupt)
            monitor.phase_start("build", None, 3)
            answers.append(monitor.step_complete("build", 0))
            handler = signal.getsignal(signal.SIGINT)
            assert callable(handler)
            handler(signal.SIGINT, None)  # TensorRT would lose an exception here
            answers.append(monitor.step_complete("build", 1))
            monitor.phase_finish("build")

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # background processes ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            build()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert answers == [True, False]
