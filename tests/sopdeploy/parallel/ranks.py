"""Start a function of the tests in several processes, as torchrun would: `run_in_processes`."""

import importlib
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from sopdeploy.checkpoint import load_plain

ROOT = Path(__file__).parents[3]
PATIENCE = 240  # seconds


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


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


def start(module: str, *arguments: str, world: int) -> list[subprocess.Popen[str]]:
    """Start `python -m module *arguments*` in *world* processes that can find each other."""
    port = free_port()
    return [
        subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            env=environment(rank, world, port),
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in range(world)
    ]


def finish(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Return exit code, stdout and stderr of each process; none is left behind."""
    try:
        ends = [process.communicate(timeout=PATIENCE) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [(process.returncode, *end) for process, end in zip(processes, ends, strict=True)]


def run_in_processes(function: str, folder: Path, *, world: int) -> list[Any]:
    """Return what *function*, `module:name`, makes of *folder* in each of *world* joined processes."""
    ends = finish(start(__name__, function, str(folder), world=world))
    assert [code for code, _, _ in ends] == [0] * world, "\n".join(error for _, _, error in ends)
    return [load_plain(folder / f"rank{rank}.pt") for rank in range(world)]


def main() -> None:
    """Run the function named on the command line and write what it returns."""
    from sopdeploy.training.joined import joined_processes

    torch.set_num_threads(1)
    module, name = sys.argv[1].split(":")
    folder = Path(sys.argv[2])
    with joined_processes():
        result = getattr(importlib.import_module(module), name)(folder)
    torch.save(result, folder / f"rank{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main()
