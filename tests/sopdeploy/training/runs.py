"""Short runs of a small network on a seventh of the digits, and painted images, for the tests of training."""

import functools
import multiprocessing
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.utils import Bunch

from sopdeploy.data.batches import Batch, load_batches
from sopdeploy.data.photos.photo import LabeledImages, Split
from sopdeploy.data.sources import open_data
from sopdeploy.report.page import write_run_page
from sopdeploy.training.callback import Callback
from sopdeploy.training.diagnostics import EpochRow
from sopdeploy.training.distributed import Strategy, TrainingStoppedError
from sopdeploy.training.division import Division
from sopdeploy.training.loop.state import LoopState
from sopdeploy.training.settings.recipe import Recipe, read_recipe
from sopdeploy.training.setup import new_setup
from sopdeploy.training.train import TrainingResult, summarize_run, train_recipe, train_run
from sopdeploy.weights.checkpoint import read_checkpoint

SHORT = [
    "epochs=3",
    "batch_size=36",
    "model.config.base_width=4",
    "preprocess.resize=8",
    "preprocess.crop=8",
]


def start_run(recipe: Recipe, images: LabeledImages, strategy: Strategy) -> LoopState:
    """Create a run of the training loop with the initial weights of *recipe*."""
    division = Division(
        Split.undivided(images), np.zeros(0, np.int64), np.zeros((0, 2), np.int64)
    )
    return LoopState(new_setup(recipe, division, strategy))


def one_process_run(recipe: Recipe) -> tuple[LoopState, Batch]:
    """Create a run of *recipe* on the CPU, and the first batch of its training images."""
    images = open_data(recipe.data).train
    run = start_run(recipe, images, Strategy(torch.device("cpu")))
    training = run.augmentations.training_images(images, recipe.preprocess, recipe.seed, 0)
    indices = [list(range(recipe.batch_size))]
    (batch,) = load_batches(training, indices, 0, torch.device("cpu"))
    return run, batch


@contextmanager
def few_digits(every: int = 7) -> Iterator[None]:
    """Reduce the digits; every seventh image is 205 for training, 52 held out, enough to fit a decision."""
    whole = load_digits()
    few = Bunch(images=whole.images[::every], target=whole.target[::every])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sklearn.datasets.load_digits", lambda: few)
        yield


@functools.cache
def forkserver() -> ForkServerContext:
    """Return a context that forks from a process with this module and the compiler that optimizers import."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "torch._dynamo"])
    return context


def train_with_page(recipe: Recipe, folder: Path, **options: Any) -> TrainingResult:
    """Train *recipe* and write the page about the run."""
    run = train_run(recipe, folder, **options)
    facts = write_run_page(run, folder)
    return summarize_run(
        run,
        folder,
        mistakes=tuple(facts.mistakes),
        thresholds=facts.thresholds,
        classes=facts.classes,
    )


def short_recipe(*overrides: str) -> Recipe:
    """Read the narrowed demo recipe on 8 x 8 pixels: three epochs of six steps on `few_digits`."""
    return read_recipe("digits-dsop", [*SHORT, *overrides])


def deliver(number: int) -> None:
    """Call the handler of the signal *number*; `test_two_processes` sends real signals to other processes."""
    handler = signal.getsignal(number)
    assert callable(handler)
    handler(number, None)


@dataclass
class RecordingCallback(Callback):
    """Records all events, and delivers a signal at the event `stop_at` (name, epoch, number)."""

    stop_at: tuple[str, int, int] | None = None
    signal_number: int = signal.SIGINT
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def on_message(self, message: str) -> None:
        self.events.append(("message", {"message": message}))

    def on_warning(self, warning: str) -> None:
        self.events.append(("warning", {"warning": warning}))

    def on_step_end(self, **progress: Any) -> None:
        self.record("step", progress, progress["epoch"], progress["step"])

    def on_evaluation_batch(self, **progress: int) -> None:
        self.record("evaluation", progress, progress["epoch"], progress["done"])

    def on_epoch_end(self, row: EpochRow) -> None:
        self.record("epoch", {"row": row}, row.epoch - 1, 0)

    def record(self, name: str, values: dict[str, Any], epoch: int, number: int) -> None:
        self.events.append((name, values))
        if (name, epoch, number) == self.stop_at:
            deliver(self.signal_number)


def interrupt(
    recipe: Recipe, out: Path, *event: Any, signal_number: int = signal.SIGINT, **options: Any
) -> TrainingStoppedError:
    """Train *recipe* until a signal at *event* (name, epoch, number) stops it; return the error."""
    with pytest.raises(TrainingStoppedError) as stopped:
        train_recipe(recipe, out, callback=RecordingCallback(event, signal_number), **options)
    return stopped.value


def same_bits(left: Any, right: Any) -> bool:
    """Compare nested dicts, lists and tensors bit for bit."""
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(
            same_bits(left[key], right[key]) for key in left
        )
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same_bits, left, right))
    return bool(left == right)


def same_run(left: Path, right: Path) -> bool:
    """Compare the final weights, optimizer states and histories of two runs, without times."""
    states = []
    for folder in (left, right):
        checkpoint = read_checkpoint(folder / "last.pt")
        assert checkpoint.resume is not None
        position = dict(checkpoint.resume["position"], seconds=0, train_seconds=0)
        position["history"] = [
            dict(row, seconds=0, images_per_second=None) for row in position["history"]
        ]
        states.append((checkpoint.weights, {**checkpoint.resume, "position": position}))
    return same_bits(*states)


COLORS = {"blue": (40, 60, 200), "green": (50, 190, 60), "red": (200, 50, 40)}


SMALL = [
    "model.name=dsop-resnet8",
    "model.config={aux_widths=[8,8,8], iterations=2}",
    "start.weights=none",
    "preprocess.resize=16",
    "preprocess.crop=16",
]


def paint(root: Path, each: int, seed: int = 0) -> Path:
    """Write *each* noisy images of three colors below *root*, one folder per color."""
    random = np.random.default_rng(seed)
    for name, color in COLORS.items():
        (root / name).mkdir(parents=True)
        for number in range(each):
            pixels = np.clip(random.normal(color, 40.0, (20, 24, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root
