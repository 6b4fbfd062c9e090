"""Runs that are killed with SIGKILL many times end with the bits of an uninterrupted run."""

import csv
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from sopdeploy.checkpoint import read_checkpoint
from tests.sopdeploy.training.runs import same_bits, same_run

ROOT = Path(__file__).parents[3]
TIMES = {"seconds", "pictures_per_second", "waiting"}

COMMON = ("threads=1", "device=cpu", "epochs=6", "save.every_steps=2")
SMALL_GATE = "{components=4, chosen=2, component_widths=[16, 8], gate_widths=[16, 8], blocks_per_stage=1}"
REMOVED_BRANCHES = "dsop with removed branches and ema"
CASES = {
    "dsop with ema, mixup and accumulation": (
        "ema={decay=0.9}",
        "mix={mixup=0.4, cutmix=0.5}",
        "accumulate=2",
        "distort={ops=1, erase=0.3}",
        "loss.label_smoothing=0.1",
        "optimizer={kind='adamw', lr=0.003, clip_norm=5.0}",
    ),
    "gmsop with gate noise": (
        f"model={{name='gmsop-16-8-resnet18', config={SMALL_GATE}}}",
        "batch_size=90",
        "optimizer.lr=0.01",
    ),
    REMOVED_BRANCHES: (
        "ema={decay=0.9, export='raw'}",
        "model.remove_branches_at=3",
        "save.keep_every=2",
    ),
}


class Server:
    """Sends orders to a `kill_server` process."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.sopdeploy.training.kill_server"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'export'}:{ROOT / 'service'}"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, out: Path, overrides: tuple[str, ...], **order: Any) -> int:
        """Train with *overrides* in *out*, killed according to *order*; return the exit code."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"out": str(out), "overrides": overrides, **order}) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    for pipe in (server.process.stdin, server.process.stdout):
        assert pipe is not None
        pipe.close()
    assert server.process.wait(timeout=30) == 0


def history_without_times(out: Path) -> list[dict[str, str]]:
    rows = csv.DictReader((out / "history.csv").read_text().splitlines())
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def run_with_kills(
    server: Server, out: Path, overrides: tuple[str, ...], kills: int, random: Random
) -> list[int]:
    """Kill a run *kills* times, once inside a write and otherwise within three steps, then finish it.

    The number of loader processes alternates. Returns the exit codes.
    """
    codes = []
    in_write = random.randrange(1, kills)
    for number in range(kills):
        workers = (f"workers={2 * (number % 2)}",)
        if number == in_write:
            order: dict[str, Any] = {"die_in_write": random.randint(1, 2)}
        else:
            order = {"die_after_steps": random.randint(1, 3), "and_seconds": random.uniform(0, 0.02)}
        codes.append(server.run(out, overrides + workers, **order))
    codes.append(server.run(out, overrides))
    return codes


@pytest.mark.parametrize(
    ("kills", "seed"), [(3, 0), *(pytest.param(10, seed, marks=pytest.mark.slow) for seed in range(1, 6))]
)
@pytest.mark.parametrize("case", CASES)
def test_sigkills_do_not_change_the_result(server, tmp_path, case, kills, seed) -> None:
    overrides = COMMON + CASES[case]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert server.run(whole, overrides) == 0
    assert run_with_kills(server, killed, overrides, kills, Random(seed)) == [-9] * kills + [0]
    assert same_run(killed, whole)
    assert history_without_times(killed) == history_without_times(whole)
    names = {path.name for path in whole.iterdir()}
    assert {path.name for path in killed.iterdir()} == names
    for name in names:
        if name.startswith(("epoch-", "best")):
            found, expected = (read_checkpoint(out / name) for out in (killed, whole))
            assert same_bits(found.weights, expected.weights)
            assert found.config == expected.config


def test_removed_branches_are_gone_from_weights_average_and_optimizer(server, tmp_path) -> None:
    assert server.run(tmp_path, COMMON + CASES[REMOVED_BRANCHES]) == 0
    last, kept = read_checkpoint(tmp_path / "last.pt"), read_checkpoint(tmp_path / "epoch-0002.pt")
    assert last.resume is not None
    for weights in (last.weights, last.resume["average"]["weights"]):
        assert not [name for name in weights if name.startswith("branches")]
    assert [name for name in kept.weights if name.startswith("branches")]
    assert last.config["aux_blocks"] == [0, 0, 0]
    optimizer = last.resume["optimizer"]
    assert len(optimizer["state"]) == len(optimizer["param_groups"][0]["params"])
    branch_losses = [bool(row["train_layer1_0"]) for row in history_without_times(tmp_path)]
    assert branch_losses == [True] * 3 + [False] * 3
