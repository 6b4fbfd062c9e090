"""The soak benchmark: its accounting, and a run of eight seconds."""

from collections.abc import Callable
from pathlib import Path

import pytest
import soak


@pytest.mark.slow  # needs an idle machine
def test_eight_seconds_of_soak_meet_every_bound(
    bundle_path: Path, make_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    bundles = [bundle_path, make_bundle(tmp_path / "other", seed=1)]
    tally, at_rest, limits = soak.soak(bundles, tmp_path, seconds=8, warm_up=4)
    assert [bound for bound in limits if bound.kept is False] == [], tally.failures
    kinds = {kind for kind, _ in tally.outcomes}
    assert {"single", "form", "bad", "left", "slow", "json", "v2", "/readyz", "swap"} <= kinds
    assert tally.compared > 20
    assert len(at_rest) == 2
    assert tally.failures == []
