"""Processes that torchrun started find each other, end together, and tell the user each thing once.

What torchrun sets: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT. Without them, or with a world of
one, there is nothing to join.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, rendezvous  # type: ignore[attr-defined]

from sopdeploy.errors import ConfigError, SopdeployError, TrainingError
from sopdeploy.training.distributed.data_parallel import DataParallel
from sopdeploy.training.distributed.strategy import Parallel, SingleProcess, choose_device
from sopdeploy.training.recipe import Recipe
from sopdeploy.training.run import Run
from sopdeploy.training.signals import TrainingStoppedError

SIGNS_OF_A_LOST_PROCESS = ("gloo/", "NCCL", "Connection closed by peer", "Connection reset by peer")


def started_by_torchrun() -> bool:
    """Say whether the environment names other processes of this run."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_first() -> bool:
    """Say whether this is the process that speaks and writes."""
    return not started_by_torchrun() or os.environ.get("RANK", "0") == "0"


def attempt() -> str:
    """Return how often torchrun has started this run again, under which its processes find each other.

    On one machine its store lives on and still has the addresses of those that died. Several machines get a
    new store each time, and count for themselves.
    """
    alone = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if alone else "0"


@contextmanager
def joined_processes() -> Iterator[None]:
    """Join the other processes while the context lasts, where there are any.

    An error that another process has told already is marked as `told`. A process that lost another one
    raises `TrainingError`.
    """
    if not started_by_torchrun():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(local_device())
    found, rank, world = next(rendezvous("env://"))
    store = PrefixStore(attempt(), found)
    dist.init_process_group(store=PrefixStore("run", store), rank=rank, world_size=world)
    try:
        yield
    except SopdeployError as problem:
        problem.told = told_already(PrefixStore("told", store), str(problem))
        if isinstance(problem, TrainingStoppedError):  # all of them, after the same step
            dist.destroy_process_group()
        raise
    except RuntimeError as problem:
        if not lost_a_process(problem):
            raise
        lost = TrainingError(
            "another process of the run has ended, its message says why; go on with --resume from the last "
            "checkpoint"
        )
        lost.told = told_already(PrefixStore("told", store), str(lost))
        raise lost from problem
    else:
        dist.destroy_process_group()


def local_device() -> int:
    """Return the number of this process' GPU; raises `ConfigError` where the machine has too few."""
    number, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= there:
        raise ConfigError(
            f"process {number + 1} of this machine has no GPU of its own, there are {there}; start one "
            "process per GPU, or hide the GPUs with CUDA_VISIBLE_DEVICES= to compute on the CPU"
        )
    return number


def told_already(store: Store, message: str) -> bool:
    """Say whether another process has told *message*; it now counts as told.

    Where the store is gone, the process that held it is, and has said why.
    """
    with suppress(RuntimeError):
        key = hashlib.blake2b(message.encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()
        return bool(store.add(key, 1) > 1)
    return True


def lost_a_process(problem: RuntimeError) -> bool:
    """Say whether *problem* comes from a process that answers no more."""
    return isinstance(problem, dist.DistError) or any(
        sign in str(problem) for sign in SIGNS_OF_A_LOST_PROCESS
    )


def processes_of(recipe: Recipe) -> Parallel:
    """Return the joined processes, or this one alone, on the device that *recipe* wants."""
    device = choose_device(recipe.device)
    return DataParallel(device) if dist.is_available() and dist.is_initialized() else SingleProcess(device)


def must_be_at_one_step(run: Run, folder: Path) -> None:
    """Raise `ConfigError` where processes go on from different steps: they see different files."""
    here = torch.tensor([run.at.epoch, run.at.step])
    if not torch.equal(run.parallel.all_reduce(here), here * run.parallel.world):
        raise ConfigError(
            f"{folder}: the processes find different checkpoints there; put --out on a disk that every "
            "machine sees"
        )
