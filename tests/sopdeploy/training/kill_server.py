"""A process that imports the library once and forks a training run for each order on stdin.

An order says after how many steps, or in which write of a checkpoint, the run is killed. The reply is the
exit code of the run.
"""

import io
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from sopdeploy import checkpoint
from sopdeploy.data.sources import open_data
from sopdeploy.training.callbacks import Callback
from sopdeploy.training.loop import train
from sopdeploy.training.recipe import read_recipe
from tests.sopdeploy.training.runs import SHORT, few_digits


class StepPipe(Callback):
    """Writes a byte to a pipe after each step."""

    def __init__(self, pipe: int) -> None:
        self.pipe = pipe

    def on_step_end(self, **_: Any) -> None:
        os.write(self.pipe, b".")


def die_in_write(number: int) -> None:
    """Make the process kill itself when half of the *number*-th checkpoint is written."""
    calls, save = [0], torch.save

    def save_half(content: Any, file: Any) -> None:
        calls[0] += 1
        if calls[0] < number:
            save(content, file)
            return
        whole = io.BytesIO()
        save(content, whole)
        file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.torch.save = save_half  # type: ignore[attr-defined]


def run_child(order: dict[str, Any], pipe: int) -> None:
    """Train and exit; never returns."""
    code = 1
    try:
        if order.get("die_in_write"):
            die_in_write(order["die_in_write"])
        recipe = read_recipe("digits-dsop", [*SHORT, *order["overrides"]])
        train(recipe, Path(order["out"]), resume="auto", callback=StepPipe(pipe))
        code = 0
    finally:
        os._exit(code)


def execute(order: dict[str, Any]) -> int:
    """Fork a run, kill it according to *order* and return its exit code."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        run_child(order, writer)
    os.close(writer)
    steps = 0
    while os.read(reader, 1):
        steps += 1
        if steps == order.get("die_after_steps"):
            time.sleep(order["and_seconds"])
            os.kill(child, signal.SIGKILL)
            break
    _, status = os.waitpid(child, 0)
    os.close(reader)
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with few_digits():
        open_data(read_recipe("digits-dsop").data)  # imports what the runs need
        for line in sys.stdin:
            sys.stdout.write(f"{execute(json.loads(line))}\n")
            sys.stdout.flush()
