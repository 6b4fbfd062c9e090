"""The processes of a run: their devices, the sums over them, each one's samples, and signals to them.

torchrun sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. Without them, or with
WORLD_SIZE=1, there is only this process.

Each process computes a shard of every batch. A step of several processes equals that of one
process with the whole batch: gradients are summed, and the loss of a process is weighted by its
number of samples. Layers that couple samples sum their statistics over the processes themselves
(balance loss), or not (batch norm).

Ctrl-C and SIGTERM save the run and end it between two steps. With several processes, a signal
to one of them takes effect in all after the same step.
"""

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import PrefixStore, rendezvous  # type: ignore[attr-defined]

from sopdeploy.base.environment import is_distributed, launcher_number
from sopdeploy.data.batches import count_batches
from sopdeploy.errors import ConfigError, TrainingError
from sopdeploy.evaluation.prediction import ProcessGroup
from sopdeploy.training.settings.loop import StepSettings

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Strategy(ProcessGroup):
    """The processes of a run, each with its own device: those that `join_processes` connected, or only this.

    The loss of a step is the sum of the losses that the processes compute. Gradients are summed
    after the backward pass: `DistributedDataParallel` reduces them during it, among the
    collectives of the layers, and cannot sum second derivatives.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.joined = dist.is_available() and dist.is_initialized()
        if self.joined:
            self.rank = dist.get_rank()
            self.world = dist.get_world_size()

    def all_reduce(self, values: Tensor) -> Tensor:
        """Sum *values* over the processes, on their device; a single process returns *values* themselves."""
        if not self.joined:
            return values
        total = values.detach().to(self.device, copy=True)
        dist.all_reduce(total)
        return total.to(values.device)

    def backward(self, loss: Tensor, model: nn.Module) -> None:
        """Add the gradient of *loss* to `grad` in *model*, and sum `grad` over the processes.

        Before, `grad` is None or, with `grad_accum_steps`, the gradient of this process' earlier
        parts of the step. *loss* is the mean loss of the last part, times the part's fraction of
        the samples of the step.
        """
        loss.backward()  # type: ignore[no-untyped-call]

        if self.world > 1:
            parameters = [
                parameter for parameter in model.parameters() if parameter.requires_grad
            ]
            sums = self.sum_by_parameter(
                [parameter.grad for parameter in parameters], parameters
            )
            for parameter, gradient in zip(parameters, sums, strict=True):
                parameter.grad = gradient

    @torch.no_grad()
    def sum_by_parameter(
        self, tensors: Sequence[Tensor | None], parameters: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """Sum each of *tensors*, which have the shapes of *parameters*, over the processes.

        None counts as 0. The sum is None if all are: weight decay must skip such parameters.
        """
        if not self.joined or not parameters:
            return list(tensors)

        counts = self.all_reduce(torch.tensor([tensor is not None for tensor in tensors]).int())
        # The parameters for which any process passes a tensor.
        passed = counts.nonzero().flatten().tolist()
        sums: list[Tensor | None] = [None] * len(parameters)
        if not passed:
            return sums

        summands = []
        for index in passed:
            tensor = tensors[index]
            summands.append(torch.zeros_like(parameters[index]) if tensor is None else tensor)

        # A copy of all, for a single sum.
        flat = torch.cat([tensor.reshape(-1) for tensor in summands])
        dist.all_reduce(flat)  # in place

        parts = torch.split(flat, [tensor.numel() for tensor in summands])
        for index, part in zip(passed, parts, strict=True):
            # The sum gets the memory layout of the parameter.
            like_parameter = torch.empty_like(parameters[index])
            sums[index] = like_parameter.copy_(part.view_as(like_parameter))
        return sums

    def shard(self, samples: Sequence[int]) -> list[int]:
        """Select this process' part of *samples*; the sizes differ by at most one."""
        start = len(samples) * self.rank // self.world
        end = len(samples) * (self.rank + 1) // self.world
        return list(samples[start:end])


def select_device(name: str) -> torch.device:
    """Select the device *name*; raise `ConfigError` for `cuda` without a CUDA device.

    `auto` is the CUDA device or, without one, the CPU.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ConfigError(
            "device: no CUDA device on this machine; set device=auto or device=cpu"
        )
    return torch.device("cuda" if available and name != "cpu" else "cpu")


def check_batch_size(recipe: StepSettings, train_count: int, world: int) -> None:
    """Raise `ConfigError` unless each step has a sample per process and accumulated batch.

    *world*, the number of processes, must divide the batch size.
    """
    if recipe.batch_size % world:
        raise ConfigError(
            f"batch_size: a step of {recipe.batch_size} samples cannot be divided "
            f"among {world} processes; choose a multiple of {world} (batch_size "
            "counts the samples of all processes)"
        )

    steps = count_batches(train_count, recipe.batch_size)
    smallest = train_count // steps  # the sizes of steps differ by at most one
    if smallest < world:
        raise ConfigError(
            f"batch_size: steps of {smallest} samples leave some of {world} "
            "processes without a sample; start fewer processes"
        )
    if smallest // world < recipe.grad_accum_steps:
        raise ConfigError(
            f"grad_accum_steps: a process has steps of {smallest // world} samples, which cannot be "
            f"divided into {recipe.grad_accum_steps}; lower it"
        )


class TrainingStoppedError(TrainingError):
    """The run was stopped between two steps by the signal `signal_number`; `message` says what is saved."""

    def __init__(self, signal_number: int) -> None:
        super().__init__()
        self.signal_number = signal_number
        self.exit_code = 128 + signal_number  # as shells expect


@dataclass(slots=True)
class SignalState:
    """The stop signals that this process has received; in `exchange`, all processes learn about them."""

    processes: ProcessGroup
    received: set[int] = field(default_factory=set)

    def exchange(self, *, save_due: bool = False) -> bool:
        """Exchange the signals of all processes, and return whether *save_due* is true in one of them.

        All call it equally often. Raises `TrainingStoppedError` if one was stopped.
        """
        flags = [number in self.received for number in STOP_SIGNALS] + [save_due]
        *counts, due_count = self.processes.all_reduce(torch.tensor(flags).int()).tolist()
        for number, count in zip(STOP_SIGNALS, counts, strict=True):
            if count:
                raise TrainingStoppedError(number)
        return bool(due_count)


@contextmanager
def handle_signals(processes: ProcessGroup) -> Iterator[SignalState]:
    """Record stop signals instead of acting on them; a single process lets the previous handlers act on a second.

    With several processes, all signals are only recorded: torchrun and the batch system often
    both send one, and the second one must not end a process that is saving. torchrun kills
    processes that take too long. Outside the main thread, where Python delivers no signals, no
    handlers are installed.
    """
    # Python delivers signals to the main thread only.
    state = SignalState(processes)
    if threading.current_thread() is not threading.main_thread():
        yield state
        return
    previous = {number: signal.getsignal(number) for number in STOP_SIGNALS}

    def record(number: int, _frame: FrameType | None) -> None:
        state.received.add(number)
        if processes.world == 1:  # the previous handlers receive the next signal
            for stop in STOP_SIGNALS:
                signal.signal(stop, previous[stop])

    for number in previous:
        signal.signal(number, record)
    try:
        yield state
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def join_processes() -> Iterator[None]:
    """Connect the processes of the run, if there are several, while the context is active.

    Raises `TrainingError` after a lost connection, and `ConfigError` if a machine has GPUs,
    but a process has none of its own.
    """
    if not is_distributed():
        yield
        return

    # Each process computes on its own GPU.
    if torch.cuda.is_available():
        number = launcher_number("LOCAL_RANK", 0)
        count = torch.cuda.device_count()
        if number >= count:
            raise ConfigError(
                f"process {number + 1} of this machine has no GPU of its own, "
                f"because there are {count}; start one process per GPU, or hide the GPUs "
                "with CUDA_VISIBLE_DEVICES= to compute on the CPU"
            )
        torch.cuda.set_device(number)

    store, rank, world = next(rendezvous("env://"))
    # On one machine, torchrun's store outlives a restart and then contains the addresses of
    # dead processes. With several machines, each attempt gets a new store, and the machines
    # count restarts separately.
    is_one_machine = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if is_one_machine else "0"
    store = PrefixStore(f"run {attempt}", store)
    dist.init_process_group(store=store, rank=rank, world_size=world)

    # A process leaves the group only where all processes leave it: at the end of the run, and at
    # a stop, which all raise after the same step. Another error may be raised in this process
    # alone. Then the other processes may still wait for a sum.
    try:
        yield
    except TrainingStoppedError:
        dist.destroy_process_group()
        raise
    except RuntimeError as error:
        # torch raises plain RuntimeErrors for some lost connections.
        messages = ("gloo/", "NCCL", "Connection closed by peer", "Connection reset by peer")
        is_of_connection = any(text in str(error) for text in messages)
        if not is_of_connection and not isinstance(error, dist.DistError):
            raise
        raise TrainingError(
            "another process of the run ended; read its message, then resume the run"
        ) from error
    else:
        dist.destroy_process_group()
