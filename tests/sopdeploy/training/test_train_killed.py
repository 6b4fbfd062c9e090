"""Runs that are killed with SIGKILL many times end with the bits of an uninterrupted run."""

import csv
import multiprocessing
import signal
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from sopdeploy.checkpoint import read_checkpoint
from sopdeploy.training.callbacks import Callback
from sopdeploy.training.train import train_recipe
from tests.sopdeploy.training.runs import few_digits, forkserver, same_bits, same_run, short_recipe

TIMES = {"seconds", "images_per_second", "data_fraction"}

COMMON = ("threads=1", "device=cpu", "epochs=4", "save.every_minutes=1e-9")
SMALL_GATE = "{components=4, chosen=2, component_widths=[16, 8], gate_widths=[16, 8], blocks_per_stage=1}"
REMOVED_BRANCHES = "dsop with removed branches and ema"
CASES = {
    "dsop with ema, mixup and accumulation": (
        "ema={decay=0.9}",
        "mix={mixup=0.4, cutmix=0.5}",
        "accumulate=2",
        "rand_augment={ops=1, erase=0.3}",
        "loss.label_smoothing=0.1",
        "optimizer={kind='adamw', lr=0.003, clip_norm=5.0}",
    ),
    "gmsop with gate noise": (
        f"model={{name='gmsop-16-8-resnet18', config={SMALL_GATE}}}",
        "batch_size=52",
        "optimizer.lr=0.01",
    ),
    REMOVED_BRANCHES: (
        "ema={decay=0.9}",
        "model.remove_branches_at=3",
    ),
}


RUNS = [  # case, number of kills, seed
    (REMOVED_BRANCHES, 2, 0),
    *(pytest.param(case, 10, seed, marks=pytest.mark.slow) for case in CASES for seed in range(1, 3)),
]


class StepPipe(Callback):
    """Writes a byte to a pipe after each step."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe = pipe

    def on_step_end(self, **_: Any) -> None:
        self.pipe.send_bytes(b".")


def run_child(out: Path, overrides: tuple[str, ...], pipe: Connection) -> None:
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # loader processes then end with the killed run
    with few_digits():
        train_recipe(short_recipe(*overrides), out, resume="auto", callback=StepPipe(pipe))


def run(out: Path, overrides: tuple[str, ...], *, steps: int = 0, delay: float = 0.0) -> int:
    """Train in a process that is killed *delay* seconds after *steps* steps; return its exit code."""
    reader, writer = forkserver().Pipe(duplex=False)
    child = forkserver().Process(target=run_child, args=(out, overrides, writer))
    child.start()
    writer.close()
    done = 0
    with suppress(EOFError):
        while reader.recv_bytes():
            done += 1
            if done == steps:
                time.sleep(delay)
                child.kill()
                break
    child.join()
    reader.close()
    assert child.exitcode is not None
    return child.exitcode


def history_without_times(out: Path) -> list[dict[str, str]]:
    rows = csv.DictReader((out / "history.csv").read_text().splitlines())
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


@pytest.mark.parametrize(("case", "kills", "seed"), RUNS)
def test_sigkills_do_not_change_the_result(tmp_path, case, kills, seed) -> None:
    """The kills are within three steps, also in writes; the number of loader processes alternates."""
    overrides, random = COMMON + CASES[case], Random(seed)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run(whole, overrides) == 0
    for number in range(kills):
        kill = {"steps": random.randint(1, 3), "delay": random.uniform(0, 0.02)}
        assert run(killed, (*overrides, f"workers={2 * (number % 2)}"), **kill) == -signal.SIGKILL
    assert run(killed, overrides) == 0
    assert same_run(killed, whole)
    assert history_without_times(killed) == history_without_times(whole)
    names = {path.name for path in whole.iterdir()}
    assert {path.name for path in killed.iterdir()} == names
    for name in names:
        if name.startswith("best"):
            found, expected = (read_checkpoint(out / name) for out in (killed, whole))
            assert same_bits(found.weights, expected.weights)
            assert found.config == expected.config
    if case == REMOVED_BRANCHES:
        check_removed_branches(whole)


def check_removed_branches(out: Path) -> None:
    """The branches must be gone from the weights, their average and the optimizer."""
    last = read_checkpoint(out / "last.pt")
    assert last.resume is not None
    for weights in (last.weights, last.resume["average"]["weights"]):
        assert not [name for name in weights if name.startswith("branches")]
    assert last.config["aux_blocks"] == [0, 0, 0]
    optimizer = last.resume["optimizer"]
    assert len(optimizer["state"]) == len(optimizer["param_groups"][0]["params"])
    branch_losses = [bool(row["train_layer1_0"]) for row in history_without_times(out)]
    assert branch_losses == [True] * 3 + [False]
