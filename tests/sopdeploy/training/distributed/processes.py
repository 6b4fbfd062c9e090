"""Run functions and commands in several processes, as torchrun would."""

import importlib
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from sopdeploy.training.distributed import join_processes
from sopdeploy.weights.tensor_files import load_plain
from tests.sopdeploy.training.runs import few_digits, forkserver
from tests.support.rooms import ROOT

TIMEOUT_S = 240


def environment(rank: int, world: int, port: int) -> dict[str, str]:
    """Return the variables that torchrun would set for one process, with one thread and no GPU."""
    return {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


@contextmanager
def start_module(
    module: str, *arguments: str, world: int
) -> Iterator[list[subprocess.Popen[str]]]:
    """Start `python -m module *arguments*` in *world* processes; kill them at the end."""
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


def wait_for(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Wait for *processes*; return exit code, stdout and stderr of each."""
    outputs = [process.communicate(timeout=TIMEOUT_S) for process in processes]
    return [
        (process.returncode, *output)
        for process, output in zip(processes, outputs, strict=True)
    ]


def run_in_processes(function: str, folder: Path, *, world: int) -> list[Any]:
    """Call *function*, `module:name`, with *folder* in *world* joined processes; return the results."""
    with held_port() as port:
        processes = [
            forkserver().Process(
                target=call_joined, args=(function, folder, environment(rank, world, port))
            )
            for rank in range(world)
        ]
        try:
            for process in processes:
                process.start()
            for process in processes:
                process.join(TIMEOUT_S)
        finally:
            for process in processes:
                process.kill()
                process.join()
    errors = "\n".join(path.read_text() for path in sorted(folder.glob("rank*.txt")))
    assert [process.exitcode for process in processes] == [0] * world, errors
    results = [folder / f"rank{rank}.pt" for rank in range(world)]
    return [load_plain(path, path.read_bytes()) for path in results]


def call_joined(function: str, folder: Path, variables: dict[str, str]) -> None:
    """Join the other processes, call *function* and write its result or its traceback."""
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


@contextmanager
def held_port() -> Iterator[int]:
    """Yield a free port that the system gives to no other process until the block ends.

    The port stays bound without listening. On Linux, a server with `SO_REUSEADDR` can still
    listen on it.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield int(holder.getsockname()[1])
