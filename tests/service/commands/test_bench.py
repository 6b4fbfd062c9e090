from pathlib import Path

import pytest

from sopdeploy.cli.serving.predict import batch_sizes
from sopdeploy.errors import ConfigError, ParityError
from sopdeploy_service.commands import bench as timing
from sopdeploy_service.settings import load_settings


def test_batch_sizes_are_parsed() -> None:
    assert batch_sizes("1, 8,8") == (1, 8)
    for text in ("", "1;8", "-1"):
        with pytest.raises(ConfigError, match="batch sizes"):
            batch_sizes(text)


def test_a_bundle_is_timed_at_every_batch_size(bundle_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "BUDGET_SECONDS", 0.01)
    found = timing.bench(bundle_path, load_settings(threads=1), (1, 2))
    assert [row.batch for row in found.latencies] == [1, 2]
    assert all(row.num_runs >= timing.MIN_RUNS for row in found.latencies)
    assert (found.precision, found.threads) == ("fp32", 1)
    assert {"processor", "cores"} <= found.machine.keys()
    assert "onnxruntime" in found.versions


def test_unsupported_batch_sizes_and_wrong_outputs_are_errors(
    bundle_path: Path, wrong_bundle_path: Path
) -> None:
    with pytest.raises(ConfigError, match="takes batches of 1 to"):
        timing.bench(bundle_path, load_settings(threads=1), (10_000,))
    with pytest.raises(ParityError):
        timing.bench(wrong_bundle_path, load_settings(threads=1))
