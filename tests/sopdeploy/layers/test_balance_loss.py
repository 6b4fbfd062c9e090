import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sopdeploy.layers.mixture.gate import balance_loss

TWO_RANKS = """
import json, pathlib, sys
import torch
import torch.distributed as dist
from sopdeploy.layers.mixture.gate import (balance_loss)
rank, store, answer = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
torch.manual_seed(0)
weights = torch.rand(6, 5, dtype=torch.float64)[3 * rank : 3 * rank + 3].requires_grad_()
loss = balance_loss(weights, 100.0)
loss.backward()
pathlib.Path(answer).write_text(json.dumps({"loss": loss.item(), "gradient": weights.grad.tolist()}))
dist.destroy_process_group()
"""


def equal_shares(images: int, components: int, kept: int) -> torch.Tensor:
    weights = torch.zeros(images, components, dtype=torch.float64)
    weights[:, :kept] = 1 / kept
    return weights


@pytest.mark.parametrize("images", [1, 7, 256])
def test_the_same_k_of_n_weigh_what_the_formula_says(images: int) -> None:
    loss = balance_loss(equal_shares(images, 16, 8), alpha=100.0) * images
    assert loss.item() == pytest.approx(100 * 16 / 15 * (16 / 8 - 1))
    assert round(loss.item(), 1) == 106.7


def test_one_component_for_all_images_is_the_worst() -> None:
    assert (balance_loss(equal_shares(4, 16, 1), alpha=100.0) * 4).item() == pytest.approx(1600)


def test_equal_loads_cost_nothing() -> None:
    assert balance_loss(torch.eye(4).repeat(3, 1), alpha=100.0).item() == 0


def test_it_weighs_alpha_over_the_batch_beside_a_mean_cross_entropy() -> None:
    weights = equal_shares(256, 16, 8)
    squared = (weights.sum(dim=0).std(correction=1) / weights.sum(dim=0).mean()) ** 2
    assert balance_loss(weights, alpha=100.0).item() == pytest.approx(0.390625 * squared.item())


def test_gradients_match_differences() -> None:
    torch.manual_seed(0)
    weights = torch.rand(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: balance_loss(w, 100.0), weights)


@pytest.mark.slow
def test_two_ranks_learn_what_one_process_learns(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    answers = [tmp_path / f"rank{rank}.json" for rank in range(2)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_RANKS, str(rank), str(tmp_path / "store"), str(answer)],
            env=environment,
        )
        for rank, answer in enumerate(answers)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    torch.manual_seed(0)
    weights = torch.rand(6, 5, dtype=torch.float64, requires_grad=True)
    loss = balance_loss(weights, 100.0)
    loss.backward()
    found = [json.loads(answer.read_text()) for answer in answers]
    assert [answer["loss"] for answer in found] == pytest.approx([loss.item()] * 2)
    averaged_by_data_parallel = (
        torch.tensor([row for answer in found for row in answer["gradient"]], dtype=torch.float64) / 2
    )
    torch.testing.assert_close(averaged_by_data_parallel, weights.grad)
