"""What the training loop costs beside the network: processor time by stage, and waits for the device.

    python benchmarks/training_loop.py [--against CHECKOUT] [--workers 2] [--rounds 3] [--data FOLDER]
        [--json]

The network, ResNet-20 with DSoP branches, is replaced by constant logits; its parameters get gradients of
zero, so that the optimizer does its whole work. --data is a folder of classes, by default 3,000 generated
JPEGs of 32 x 32 pixels. Values are read as often as on a GPU. With --against, the sources of another checkout
run alternately with these, each in a process of its own. Processor time of a thread, so that other load
changes little; medians of the rounds, in ms of a step of 256 images. `busy` is the share of the time for
which a GPU works that needs --gpu-ms for a step, with eight loader processes. What starting the operators of
a network costs ("launching") is measured with two images of 8 x 8 pixels, for which they have little to
compute.

`docs/benchmarks/training_loop.json` is the document of --against and --json, from which `make docs` writes
the tables of the page, and paper_row.py plans. Write it elsewhere first: a changed checkout has no commit.
"""

import argparse
import json
import multiprocessing
import multiprocessing.process
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from measure import Result, commit, existing, make_parser, report
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sopdeploy.data.augment import AugmentedDataset
from sopdeploy.layers.normalize import Normalize
from sopdeploy.models.base import TrainingOutput
from sopdeploy.models.registry import create_model
from sopdeploy.photos.folder import open_folder
from sopdeploy.training.distributed import Strategy
from sopdeploy.training.loop import gradient, run, state
from sopdeploy.training.loop.losses import training_loss
from sopdeploy.training.recipe import Recipe, read_recipe
from sopdeploy.training.train import train_run

BATCH, GPU_WORKERS = 256, 8
NETWORKS = ("resnet20", "dsop-resnet20")
UNITS = {  # of the cases that begin so; cpu-ms of all others
    "loader processes started": "count",
    "images": "images/s",
    "busy": "%",
    "operators": "count",
    "waits": "count",
}
FEW, MANY = 2, 6  # epochs of two runs, whose difference has neither start nor first decoding


class Stages:
    """Seconds of the thread by stage, and counts of events."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.counts: Counter[str] = Counter()

    def timed(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Add the time of *function* to *stage*."""

        def call(*arguments: Any, **options: Any) -> Any:
            began = time.thread_time()
            try:
                return function(*arguments, **options)
            finally:
                self.seconds[stage] += time.thread_time() - began

        return call

    def batches(self, function: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        """Add the time between the batches of *function* to the stage "batches"."""

        def load(*arguments: Any) -> Iterator[Any]:
            loader = iter(function(*arguments))
            receive = self.timed("batches", lambda: next(loader, None))
            while (batch := receive()) is not None:
                yield batch

        return load


class Constant(torch.autograd.Function):
    """Logits that do not depend on the images, with gradients of zero for all parameters."""

    @staticmethod
    def forward(context: Any, logits: Tensor, *parameters: Tensor) -> Tensor:
        """Return a copy of *logits*."""
        context.zeros = [torch.zeros_like(parameter) for parameter in parameters]
        return logits.clone()

    @staticmethod
    def backward(context: Any, *_: Tensor) -> Any:
        """Return no gradient of the logits, and zeros."""
        return None, *context.zeros


def without_network(loop_run: Any) -> Any:
    """Replace the computation of the network of *loop_run*."""
    network, logits = loop_run.model, torch.zeros(BATCH, 10)
    parameters = list(network.parameters())

    def forward(images: Tensor) -> Tensor | TrainingOutput:
        few = logits[: len(images)]
        if not network.training:
            return few
        constant = Constant.apply(few, *parameters)
        return TrainingOutput(constant, dict.fromkeys(branches, constant), {})

    branches = [name for name in network.loss_weights() if name != "main"]
    network.forward = forward
    network.heads = lambda images: {"main": logits[: len(images)]}
    return loop_run


class CountOperators(TorchDispatchMode):
    """Counts all calls of operators, and those that read a number from the device."""

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts = counts

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts["waits" if function is torch.ops.aten._local_scalar_dense.default else "operators"] += 1
        return function(*args, **(kwargs or {}))


def train(recipe: Recipe, stages: Stages, *, counted: bool = False) -> None:
    """Train *recipe* without its network."""
    loop: Any = run
    epoch, tolist = loop.train_epoch, Tensor.tolist
    start = multiprocessing.process.BaseProcess.start

    def count_start(process: Any) -> None:
        stages.counts["processes"] += 1
        start(process)

    def count_list(tensor: Tensor) -> Any:
        stages.counts["waits"] += 1
        return tolist(tensor)

    def counted_epoch(*arguments: Any) -> None:
        with patch.object(Tensor, "tolist", count_list), CountOperators(stages.counts):
            epoch(*arguments)

    name_of_state = "LoopState" if hasattr(state, "LoopState") else "LoopRun"  # of older sources
    loop_of = getattr(state, name_of_state)

    def build(*arguments: Any) -> Any:
        stages.counts["networks replaced"] += 1
        return without_network(loop_of(*arguments))

    replaced: list[tuple[Any, str, Any]] = [
        *((module, name_of_state, build) for module in (state, loop) if hasattr(module, name_of_state)),
        (loop, "load_batches", stages.batches(loop.load_batches)),
        (loop, "train_epoch", counted_epoch if counted else stages.timed("epochs", epoch)),
        (loop, "fit_best", lambda loop_run, *_: (new_or_old(loop_run, "synchronized_fit", "fit")(), {})),
        (gradient, "compute_gradient", stages.timed("constant network", gradient.compute_gradient)),
        (torch.optim.SGD, "step", stages.timed("optimizer", torch.optim.SGD.step)),
        (Normalize, "forward", stages.timed("normalize", Normalize.forward)),
        (multiprocessing.process.BaseProcess, "start", count_start),
    ]
    with ExitStack() as stack:
        for place, name, value in replaced:
            stack.enter_context(patch.object(place, name, value))
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        train_run(recipe, Path(folder) / "run", strategy=Strategy(torch.device("cpu")))
    if stages.counts["networks replaced"] != 1:
        sys.exit("the network was not replaced: these sources build their loop elsewhere")


def new_or_old(owner: Any, new: str, old: str) -> Any:
    """Return the method *new* of *owner*, which older checkouts call *old*."""
    return getattr(owner, new, None) or getattr(owner, old)


def launching_ms(name: str) -> float:
    """Measure forward and backward pass of the network *name* on two small images, in ms of this thread."""
    network = create_model(name, num_classes=10).train()
    images, labels = torch.zeros(2, 3, 8, 8), torch.zeros(2, dtype=torch.long)
    taken = []
    for _ in range(20):
        began = time.thread_time()
        training_loss(network(images), labels, network.loss_weights()).total.backward()  # type: ignore[no-untyped-call]
        taken.append(time.thread_time() - began)
    return statistics.median(taken) * 1e3


def measure(data: Path, workers: int) -> dict[str, float]:
    """Measure the sources that are imported: ms of a step of 256 by stage, and counts of a step."""
    torch.set_num_threads(1)
    if hasattr(state, "STEPS_PER_READ"):  # read as rarely as on a GPU
        state.STEPS_PER_READ["cpu"] = state.STEPS_PER_READ["cuda"]

    def recipe(epochs: int, processes: int) -> Recipe:
        folder = ["data.kind=folder", f"data.path={data}", f"workers={processes}", "threads=1", "device=cpu"]
        return read_recipe("cifar10-dsop-resnet20", [*folder, f"epochs={epochs}", "schedule.milestones=[1]"])

    images = open_folder(data).train
    few, many, counted = Stages(), Stages(), Stages()
    train(recipe(1, 0), counted, counted=True)  # the first run also imports what optimizers need
    loader_seconds = []
    for epochs, stages in ((FEW, few), (MANY, many)):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        train(recipe(epochs, workers), stages)
        for process in multiprocessing.active_children():
            process.join()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        loader_seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    num_epochs = MANY - FEW
    images_per_epoch = round(len(images) * 0.8)  # without those that are held out
    steps_per_epoch = -(-images_per_epoch // BATCH)
    step = 1e3 / (num_epochs * images_per_epoch / BATCH)  # ms of a step of 256, per second of all steps
    seconds = {stage: many.seconds[stage] - few.seconds[stage] for stage in many.seconds}
    stages_of_epochs = ("constant network", "optimizer", "batches", "normalize")
    rest = seconds["epochs"] - sum(seconds[stage] for stage in stages_of_epochs)
    source: Any = AugmentedDataset(images, *augmentation(recipe(1, 0)))
    chosen = list(range(0, len(images), max(1, len(images) // BATCH)))[:BATCH]
    decode_one = new_or_old(images, "decode", "__getitem__")
    decode = timed_ms(lambda: [decode_one(index) for index in chosen], len(chosen))
    batch = getattr(source, "pixels", lambda indices: [source[index] for index in indices])  # older
    whole = timed_ms(lambda: [batch([index]) for index in chosen], len(chosen))
    main = (rest + seconds["optimizer"] + seconds["batches"]) * step
    return {
        "read and decode, without memory": decode,
        "fit and augment, without memory": max(0.0, whole - decode),
        "loader processes": (loader_seconds[1] - loader_seconds[0]) * step,
        "receive batches": seconds["batches"] * step,
        "normalize, on the GPU there": seconds["normalize"] * step,
        "optimizer": seconds["optimizer"] * step,
        "checks, reading, callbacks": rest * step,
        "main thread": main,
        "loader processes started in an epoch": (many.counts["processes"] - few.counts["processes"])
        / num_epochs,
        "operators of a step": counted.counts["operators"] / steps_per_epoch,
        "waits for the device of a step": counted.counts["waits"] / steps_per_epoch,
        **{f"launching {name}": launching_ms(name) for name in NETWORKS},
    }


def augmentation(recipe: Recipe) -> tuple[Any, ...]:
    """Return the arguments of `AugmentedDataset` after the images."""
    return recipe.augment, recipe.preprocess, recipe.seed, 0, recipe.color


def timed_ms(function: Callable[[], object], count: int) -> float:
    """Return the ms of the thread for 256 images; *function* processes *count*."""
    taken = []
    for _ in range(5):
        began = time.thread_time()
        function()
        taken.append(time.thread_time() - began)
    return statistics.median(taken) * 1e3 * BATCH / count


def write_images(folder: Path, count: int = 3000) -> Path:
    """Write *count* JPEGs of 32 x 32 pixels of ten classes."""
    random = np.random.default_rng(0)
    for number in range(count):
        path = folder / f"class-{number % 10}" / f"{number:05d}.jpg"
        path.parent.mkdir(exist_ok=True)
        coarse = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((32, 32)).save(path, quality=90)
    return folder


def measure_checkout(checkout: Path, data: Path, workers: int) -> dict[str, float]:
    """Measure the sources in *checkout* in a process."""
    environment = os.environ | {"PYTHONPATH": f"{checkout}:{Path(__file__).parent}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--one", "--data", str(data), "--workers", str(workers)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{checkout}: {done.stderr}")
    found: dict[str, float] = json.loads(done.stdout)
    return found


def busy(found: dict[str, float], gpu_ms: float, launching: float = 0.0) -> float:
    """Return the share of the time in which the GPU works, in percent."""
    main = found["main thread"] + launching
    return 100 * gpu_ms / max(gpu_ms, main, found["loader processes"] / GPU_WORKERS)


def main(arguments: argparse.Namespace) -> None:
    """Measure both sides alternately and report the medians."""
    if arguments.one:
        print(json.dumps(measure(arguments.data, arguments.workers)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        data = arguments.data or write_images(Path(temporary))
        sides = [Path(__file__).parent.parent, *([arguments.against] if arguments.against else [])]
        found: list[list[dict[str, float]]] = [[] for _ in sides]
        for _ in range(arguments.rounds):
            for side, values in zip(sides, found, strict=True):
                values.append(measure_checkout(side, data, arguments.workers))
    medians = [{name: statistics.median(row[name] for row in rows) for name in rows[0]} for rows in found]
    for row in medians:
        row["images a second and core, without the network"] = (
            1e3 * BATCH / (row["main thread"] + row["loader processes"])
        )
        row["busy"] = busy(row, arguments.gpu_ms)
        for name in NETWORKS:
            launching = row[f"launching {name}"]
            row[f"busy, with launching {name}"] = busy(row, arguments.gpu_ms, launching)
    against = commit(arguments.against) if arguments.against else ""
    results = []
    for name, value in medians[0].items():
        unit = next((unit for start, unit in UNITS.items() if name.startswith(start)), "cpu-ms")
        other = medians[1][name] if against else None
        results.append(
            Result(case=name, against=against, ours=value, other=other, unit=unit, runs=arguments.rounds)
        )
    report(results, as_json=arguments.json, step=BATCH, gpu_ms=arguments.gpu_ms, workers=arguments.workers)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--against", type=existing, help="folder with the sources to compare with")
    parser.add_argument("--data", type=existing, help="folder of classes with images")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gpu-ms", type=float, default=4.0, help="time of a step on the GPU")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_arguments())
