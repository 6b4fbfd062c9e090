"""Start a function of the tests in several processes, as torchrun would: `run_in_processes`.

They are forked off one process that has imported torch, for that takes longer than what is tested in them.
"""

import importlib
import multiprocessing
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from sopdeploy.checkpoint import load_plain
from sopdeploy.training.distributed.torchrun import join_processes
from tests.ports import held_port
from tests.sopdeploy.training.runs import few_digits

ROOT = Path(__file__).parents[4]
PATIENCE = 240  # seconds
PRELOADED = ["torch", "sopdeploy.training.loop"]


def environment(rank: int, world: int, port: int) -> dict[str, str]:
    """Return what torchrun would set for one process, and one thread."""
    return {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "export"), str(ROOT / "service")]),
    }


@contextmanager
def started(module: str, *arguments: str, world: int) -> Iterator[list[subprocess.Popen[str]]]:
    """Start `python -m module *arguments*` in *world* processes that find each other; leave none."""
    processes: list[subprocess.Popen[str]] = []
    with held_port() as port:
        try:
            for rank in range(world):
                child = subprocess.Popen(
                    [sys.executable, "-m", module, *arguments],
                    env=environment(rank, world, port),
                    cwd=ROOT,
                    text=True,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                )
                processes.append(child)
            yield processes
        finally:
            for process in processes:
                process.kill()
                process.wait()


def ends_of(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Wait for the *processes*; return exit code, stdout and stderr of each."""
    ends = [process.communicate(timeout=PATIENCE) for process in processes]
    return [(process.returncode, *end) for process, end in zip(processes, ends, strict=True)]


def run_in_processes(function: str, folder: Path, *, world: int) -> list[Any]:
    """Return what *function*, `module:name`, makes of *folder* in each of *world* joined processes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with held_port() as port:
        processes = [
            context.Process(target=one_of_them, args=(function, folder, environment(rank, world, port)))
            for rank in range(world)
        ]
        try:
            for process in processes:
                process.start()
            for process in processes:
                process.join(PATIENCE)
        finally:
            for process in processes:
                process.kill()
                process.join()
    said = "\n".join(path.read_text() for path in sorted(folder.glob("rank*.txt")))
    assert [process.exitcode for process in processes] == [0] * world, said
    return [load_plain(folder / f"rank{rank}.pt") for rank in range(world)]


def one_of_them(function: str, folder: Path, variables: dict[str, str]) -> None:
    """Join the others, run *function* and write what it returns, or why it did not."""
    os.environ.update(variables)
    torch.set_num_threads(1)
    module, name = function.split(":")
    try:
        with join_processes(), few_digits():
            result = getattr(importlib.import_module(module), name)(folder)
        torch.save(result, folder / f"rank{variables['RANK']}.pt")
    except BaseException:
        (folder / f"rank{variables['RANK']}.txt").write_text(traceback.format_exc())
        raise
