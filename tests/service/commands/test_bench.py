from pathlib import Path

import pytest

from sopdeploy.cli.serving.bench import batch_sizes
from sopdeploy.errors import ConfigError, ParityError
from sopdeploy_service.commands import bench as timing
from sopdeploy_service.settings import load_settings


def test_batch_sizes_are_parsed() -> None:
    assert batch_sizes("1, 8,8") == (1, 8)
    for text in ("", "0x1", "1;8", "a", "-1", "²"):
        with pytest.raises(ConfigError, match="batch sizes"):
            batch_sizes(text)


def test_latencies_have_percentiles_and_rates() -> None:
    found = timing.summarize(4, [0.001 * n for n in range(1, 101)])
    assert found.median_ms == pytest.approx(50.5)
    assert found.p95_ms < found.p99_ms <= 100
    assert found.images_per_s == pytest.approx(4 / 0.0505)


@pytest.fixture
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "BUDGET_SECONDS", 0.01)


@pytest.mark.usefixtures("_short")
def test_a_bundle_is_timed_at_every_batch_size(bundle_path: Path) -> None:
    found = timing.bench(bundle_path, load_settings(threads=1), (1, 2))
    assert [row.batch for row in found.ours.latencies] == [1, 2]
    assert all(row.runs >= timing.MIN_RUNS for row in found.ours.latencies)
    assert found.ours.precision == "fp32"
    assert found.threads == 1
    assert {"processor", "cores"} <= found.machine.keys()
    assert "onnxruntime" in found.versions
    assert found.ratios == {}


@pytest.mark.usefixtures("_short")
def test_two_bundles_are_compared(bundle_path: Path) -> None:
    found = timing.bench(bundle_path, load_settings(threads=1), (1,), bundle_path)
    assert found.other is not None
    assert found.ratios["1"] == pytest.approx(
        found.ours.latencies[0].median_ms / found.other.latencies[0].median_ms
    )


@pytest.mark.usefixtures("_short")
def test_an_unsupported_batch_size_is_rejected(bundle_path: Path) -> None:
    with pytest.raises(ConfigError, match="takes batches of 1 to"):
        timing.bench(bundle_path, load_settings(threads=1), (10_000,))


def test_a_bundle_with_wrong_outputs_is_not_timed(wrong_bundle_path: Path) -> None:
    with pytest.raises(ParityError):
        timing.bench(wrong_bundle_path, load_settings(threads=1))
