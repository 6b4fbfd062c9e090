"""A process that imports the library once and then forks a run for each line it is told, to be killed.

An order says after how many steps the run is to die of a SIGKILL, and how long after the last of them; or in
the middle of which write of `last.pt`; or neither. The answer is the run's exit code.
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
from sopdeploy.training.loop import train
from sopdeploy.training.recipe import read_recipe
from tests.sopdeploy.training.runs import SHORT, RecordingCallback, few_digits


class Telling(RecordingCallback):
    """Writes a byte into a pipe after each step."""

    def __init__(self, pipe: int) -> None:
        super().__init__()
        self.pipe = pipe

    def on_step_end(self, **facts: Any) -> None:
        os.write(self.pipe, b".")


def die_in_write(number: int) -> None:
    """Let the process be killed when half of the *number*-th checkpoint is on the disk."""
    seen, save = [0], torch.save

    def half(content: Any, file: Any) -> None:
        seen[0] += 1
        if seen[0] < number:
            save(content, file)
            return
        whole = io.BytesIO()
        save(content, whole)
        file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.torch.save = half  # type: ignore[attr-defined]


def run(order: dict[str, Any], pipe: int) -> None:
    """Be the run; never return."""
    code = 1
    try:
        if order.get("die_in_write"):
            die_in_write(order["die_in_write"])
        recipe = read_recipe("digits-dsop", [*SHORT, *order["overrides"]])
        train(recipe, Path(order["out"]), resume="auto", callback=Telling(pipe))
        code = 0
    finally:
        os._exit(code)


def answer(order: dict[str, Any]) -> int:
    """Fork the run, kill it where the order wants it, and return its exit code."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        run(order, writing)
    os.close(writing)
    steps = 0
    while os.read(reading, 1):
        steps += 1
        if steps == order.get("die_after_steps"):
            time.sleep(order["and_seconds"])
            os.kill(child, signal.SIGKILL)
            break
    _, status = os.waitpid(child, 0)
    os.close(reading)
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with few_digits():
        open_data(read_recipe("digits-dsop").data)  # imports what the runs need
        for line in sys.stdin:
            sys.stdout.write(f"{answer(json.loads(line))}\n")
            sys.stdout.flush()
