"""Batch profiles."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sopdeploy.bundle.manifest import BatchRange
from sopdeploy.errors import ConfigError
from sopdeploy.tensorrt.cache import index_for, parse_profiles

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
