"""Connect the processes that torchrun started, and report each error once.

torchrun sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. Without them, or with WORLD_SIZE=1,
there is only this process.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, rendezvous  # type: ignore[attr-defined]

from sopdeploy.environment import is_distributed
from sopdeploy.errors import ConfigError, SopdeployError, TrainingError
from sopdeploy.training.run import Run
from sopdeploy.training.signals import TrainingStoppedError


@contextmanager
def join_processes() -> Iterator[None]:
    """Connect the processes of the run while the context is active.

    Sets `reported` on errors that another process reports. Raises `TrainingError` if the connection to
    another process is lost, `ConfigError` if a process has no GPU of its own.
    """
    if not is_distributed():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(_local_device())
    store, rank, world = next(rendezvous("env://"))
    store = PrefixStore(_attempt_prefix(), store)
    dist.init_process_group(store=PrefixStore("run", store), rank=rank, world_size=world)
    try:
        yield
    except SopdeployError as error:
        error.reported = _is_reported(PrefixStore("reported", store), str(error))
        if isinstance(error, TrainingStoppedError):  # raised by all processes after the same step
            dist.destroy_process_group()
        raise
    except RuntimeError as error:
        if not _is_lost_connection(error):
            raise
        lost = TrainingError("another process of the run ended, see its message and resume it")
        lost.reported = _is_reported(PrefixStore("reported", store), str(lost))
        raise lost from error
    else:
        dist.destroy_process_group()


def _attempt_prefix() -> str:
    """Return the prefix of the keys of this attempt in torchrun's store.

    On one machine, it is the number of restarts, because the store outlives a restart and then contains the
    addresses of dead processes. With several machines, each attempt gets a new store, and the machines count
    restarts separately, so the prefix is constant.
    """
    one_machine = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if one_machine else "0"


def _is_lost_connection(error: RuntimeError) -> bool:
    # torch raises plain RuntimeErrors for some lost connections.
    messages = ("gloo/", "NCCL", "Connection closed by peer", "Connection reset by peer")
    return isinstance(error, dist.DistError) or any(message in str(error) for message in messages)


def _local_device() -> int:
    """Return the index of the GPU of this process; raise `ConfigError` if the machine has too few."""
    number, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= count:
        raise ConfigError(
            f"process {number + 1} of this machine has no GPU of its own, there are {count}; start one "
            "process per GPU, or hide the GPUs with CUDA_VISIBLE_DEVICES= to compute on the CPU"
        )
    return number


def _is_reported(store: Store, message: str) -> bool:
    """Check whether another process reports *message*, and mark it as reported.

    If the store is gone, the process that hosted it ended and reported why.
    """
    with suppress(RuntimeError):
        key = hashlib.blake2b(message.encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()
        return bool(store.add(key, 1) > 1)
    return True


def check_same_step(run: Run, folder: Path) -> None:
    """Raise `ConfigError` if the processes would resume from different steps."""
    position = torch.tensor([run.position.epoch, run.position.step])
    if not torch.equal(run.strategy.all_reduce(position), position * run.strategy.world):
        raise ConfigError(
            f"{folder}: the processes find different checkpoints; use a disk that all machines share"
        )
