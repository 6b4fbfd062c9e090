"""Training on a real GPU; skipped without one."""

from pathlib import Path

import pytest

import sopdeploy

pytestmark = pytest.mark.gpu


def test_digits_are_learned_on_cuda(tmp_path: Path) -> None:
    run = sopdeploy.train(recipe="digits-dsop", out=tmp_path / "run", device="cuda", progress=False)
    assert run.best_top1 is not None
    assert run.best_top1 >= 0.95  # 99 % on a CPU
