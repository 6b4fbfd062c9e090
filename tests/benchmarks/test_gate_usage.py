"""The balance loss of the recipe lets a gate use most components (GM-SOP, Figure 2 left)."""

from pathlib import Path

import gate_usage
import pytest

from sopdeploy.checkpoint import read_checkpoint
from sopdeploy.training.loop import train


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "used", "imbalance"),
    [
        pytest.param([], range(10, 17), (0.0, 1.5), id="recipe"),
        pytest.param(["model.config.balance_weight=0"], range(4, 7), (3.0, 12.0), id="alpha = 0"),
    ],
)
def test_the_balance_loss_spreads_images_over_components(
    tmp_path: Path, settings: list[str], used: range, imbalance: tuple[float, float]
) -> None:
    """Four epochs on digits; the benchmark measures five seeds of twenty."""
    result = train(gate_usage.digits_recipe(0, 4, [4], *settings), tmp_path / "run")
    epoch = read_checkpoint(result.last).resume["position"]["history"][-1]
    assert sum(epoch["component_counts"]) == 4 * result.train_count
    assert (min(epoch["component_counts"]) >= 0.1 * result.train_count) == (settings == [])
    last = epoch["diagnostics"]["gates"]["gate"]
    assert sum(fraction >= gate_usage.SELECTED for fraction in last["chosen"]) in used
    assert imbalance[0] <= last["imbalance"] <= imbalance[1]
