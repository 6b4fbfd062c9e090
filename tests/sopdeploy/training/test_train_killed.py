"""A run that is killed with SIGKILL again and again ends with the bits of the one that nobody disturbed."""

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
KILLS = 10
KILLED = -9
TIMES = {"seconds", "pictures_per_second", "waiting"}

COMMON = ("threads=1", "device=cpu", "epochs=6", "save.every_steps=2")
SMALL_GATE = "{components=4, chosen=2, component_widths=[16, 8], gate_widths=[16, 8], blocks_per_stage=1}"
CASES = {
    "dsop with average, mixup and accumulation": (
        "ema={decay=0.9}",
        "mix={mixup=0.4, cutmix=0.5}",
        "accumulate=2",
        "distort={ops=1, erase=0.3}",
        "loss.label_smoothing=0.1",
        "optimizer={kind='adamw', lr=0.003, clip_norm=5.0}",
    ),
    "gated mixture with noise": (
        f"model={{name='gmsop-16-8-resnet18', config={SMALL_GATE}}}",
        "batch_size=90",
        "optimizer.lr=0.01",
    ),
    "dsop that loses its branches, with average": (
        "ema={decay=0.9, export='raw'}",
        "model.remove_branches_at=3",
        "save.keep_every=2",
    ),
}


class Server:
    """Speaks with a `kill_server` process."""

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
        """Run *overrides* in *out*, killed as ordered; return the exit code."""
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


def table(out: Path) -> list[dict[str, str]]:
    """Return the history without the times."""
    rows = list(csv.DictReader((out / "history.csv").read_text().splitlines()))
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def killed_often(server: Server, out: Path, overrides: tuple[str, ...], random: Random) -> list[int]:
    """Kill a run ten times: once inside a write, the others up to three steps further on; end with it whole.

    The number of loader processes changes from life to life.
    """
    codes = []
    in_write = random.randrange(1, KILLS)
    for life in range(KILLS):
        workers = (f"workers={2 * (life % 2)}",)
        if life == in_write:
            order: dict[str, Any] = {"die_in_write": random.randint(1, 2)}
        else:
            order = {"die_after_steps": random.randint(1, 3), "and_seconds": random.uniform(0, 0.02)}
        codes.append(server.run(out, overrides + workers, **order))
    codes.append(server.run(out, overrides))
    return codes


def check(server: Server, folder: Path, case: str, seed: int) -> None:
    overrides = COMMON + CASES[case]
    whole, killed = folder / "whole", folder / "killed"
    assert server.run(whole, overrides) == 0
    assert killed_often(server, killed, overrides, Random(seed)) == [KILLED] * KILLS + [0]
    assert same_run(killed, whole)
    best, other = (read_checkpoint(out / "best.pt") for out in (killed, whole))
    assert same_bits(best.weights, other.weights)
    assert best.config == other.config
    assert table(killed) == table(whole)
    names = {path.name for path in whole.iterdir()}
    assert {path.name for path in killed.iterdir()} == names
    for name in names:
        if name.startswith("epoch-"):
            assert same_bits(read_checkpoint(killed / name).weights, read_checkpoint(whole / name).weights)


@pytest.mark.parametrize("case", CASES)
def test_ten_sigkills_change_no_bit(server, tmp_path, case) -> None:
    check(server, tmp_path, case, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
@pytest.mark.parametrize("case", CASES)
def test_ten_sigkills_at_other_moments_change_no_bit_either(server, tmp_path, case, seed) -> None:
    check(server, tmp_path, case, seed)


def test_what_was_removed_is_gone_from_weights_average_and_state(server, tmp_path) -> None:
    assert server.run(tmp_path, COMMON + CASES["dsop that loses its branches, with average"]) == 0
    last, kept = read_checkpoint(tmp_path / "last.pt"), read_checkpoint(tmp_path / "epoch-0002.pt")
    assert last.resume is not None
    for weights in (last.weights, last.resume["average"]["weights"]):
        assert not [name for name in weights if name.startswith("branches")]
    assert [name for name in kept.weights if name.startswith("branches")]
    assert last.config["aux_blocks"] == [0, 0, 0]
    assert len(last.resume["optimizer"]["state"]) == len(
        last.resume["optimizer"]["param_groups"][0]["params"]
    )
    rows = table(tmp_path)
    assert [bool(row["train_layer1_0"]) for row in rows] == [True] * 3 + [False] * 3
