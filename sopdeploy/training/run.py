"""The state of a run in memory, its conversion to a checkpoint and back, and the callbacks that observe it.

Sample order, augmentation, dropout and learning rate are functions of (seed, epoch, step). Weights, optimizer
state and position are therefore enough to resume a run bit for bit.
"""

import platform
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pydantic
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from sopdeploy.checkpoint import Checkpoint
from sopdeploy.config import StrictModel
from sopdeploy.decision import Activation, Decision
from sopdeploy.environment import machine
from sopdeploy.errors import ConfigError, TrainingError, first_line, is_out_of_memory
from sopdeploy.evaluation.multi_label import DEFAULT_THRESHOLD, MultiLabelMetrics
from sopdeploy.layers.normalize import IMAGES_FORMAT, images_format
from sopdeploy.models.base import Classifier
from sopdeploy.plugins import makers
from sopdeploy.project import Origin
from sopdeploy.training.diagnostics import EpochRow
from sopdeploy.training.distributed import Strategy
from sopdeploy.training.recipe import Recipe
from sopdeploy.training.results import AnyProcedureResult
from sopdeploy.training.start_weights import StartReport
from sopdeploy.version import __version__


class Callback:
    """Base class of callbacks; every method does nothing.

    Epochs and steps count from 0. An exception raised by a callback ends the run.
    """

    def on_message(self, message: str) -> None:
        """Receive a line about the start of the run: weights, procedure, images."""

    def on_warning(self, warning: str) -> None:
        """Receive a one-line warning; the run continues."""

    def on_stage(self, *, name: str, done: int, total: int) -> None:
        """Receive the progress of a procedure without epochs: *done* of *total* parts, in the step *name*."""

    def on_step_end(self, *, epoch: int, epochs: int, step: int, steps: int, loss: float) -> None:
        """Run after *step* of the *steps* steps of *epoch*; *loss* is the mean over its samples."""

    def on_evaluation_batch(self, *, epoch: int, epochs: int, done: int) -> None:
        """Run after each evaluation batch; *done* is the number of held-out images evaluated so far."""

    def on_epoch_end(self, row: EpochRow) -> None:
        """Run after each epoch with its metrics."""


class Position(StrictModel, frozen=False):
    """The progress of a run, as checkpoints contain it; steps change it in place.

    `step` is the number of finished steps in the current epoch and `seen` the number of their images. Over
    these images, `sums` adds up the parts of the loss and `gradient` the gradient norms; `component_counts`
    counts the images that each component of a gated network received. `train_seconds` is the time of these
    steps, `seconds` that of the whole run.
    """

    epoch: int = 0
    step: int = 0
    seen: int = 0
    sums: dict[str, float] = pydantic.Field(default_factory=dict)
    gradient: float = 0.0
    component_counts: tuple[int, ...] = ()
    train_seconds: float = 0.0
    seconds: float = 0.0
    history: tuple[EpochRow, ...] = ()


@dataclass(kw_only=True)
class Run:
    """A run in progress: what every procedure has, and what checkpoints contain of it.

    `name` is the catalog name of `model`. A procedure that has ended sets its `result` and `decision`, and in
    `state` the tensors that `last.pt` contains for it. `file_hashes` (N,) are those of the training images in
    their order, or empty if unknown; `held_out` is the `Record` of the images that the run holds out, empty
    if it holds none out or their files are not hashed. `origin` is that of a checkpoint.
    """

    recipe: Recipe
    labels: tuple[str, ...]
    activation: Activation
    train_count: int
    strategy: Strategy
    name: str
    model: Classifier
    start: StartReport | None = None
    position: Position = field(default_factory=Position)
    result: AnyProcedureResult | None = None
    state: dict[str, Tensor] = field(default_factory=dict)
    decision: Decision | None = None
    file_hashes: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    held_out: Tensor = field(default_factory=lambda: torch.zeros((0, 2), dtype=torch.int64))
    origin: Origin | None = None

    def __post_init__(self) -> None:
        self.replace_model(self.name, self.model)

    @property
    def image_hashes(self) -> Tensor:
        """The different `file_hashes`, sorted, as a checkpoint contains them."""
        return torch.from_numpy(np.unique(self.file_hashes.numpy()))

    @property
    def exported(self) -> Classifier:
        """The model with the weights that are evaluated and exported."""
        return self.model

    def replace_model(self, name: str, model: Classifier) -> None:
        """Move *model*, named *name*, to the device; raise `ConfigError` if it cannot compute the images."""
        layout = torch.channels_last if self.recipe.channels_last else torch.preserve_format
        self.name = name
        self.model = model.to(self.strategy.device, memory_format=layout)  # type: ignore[call-overload]
        vars(self.model)[IMAGES_FORMAT] = find_images_format(self.recipe, self.model, self.strategy.device)

    def resume_state(self) -> dict[str, Any]:
        """Return what `last.pt` contains to resume the run; `load_resume_state` restores it."""
        return {
            "position": self.position.model_dump(mode="json"),
            "train_count": self.train_count,
            "held_out": self.held_out,
            "weights": self.model.state_dict(),
            "procedure": self.state,
        }

    def load_resume_state(self, state: dict[str, Any]) -> None:
        """Restore *state* but its `weights`; raises many types of error if it is damaged."""
        self.position, self.state = Position.model_validate(state["position"]), state["procedure"]

    def checkpoint(self, *, resumable: bool) -> Checkpoint:
        """Build a checkpoint; raise `TrainingError` if it or the raw weights contain a NaN or infinity."""
        weights = self.exported.state_dict()
        resume = self.resume_state() if resumable else None
        checked = tree_leaves({"weights": weights, "raw": self.model.state_dict(), "resume": resume})
        if not all(bool(value.isfinite().all()) for value in checked if isinstance(value, Tensor)):
            raise TrainingError(
                "weights or optimizer state are not finite; nothing was saved, lower optimizer.lr or set "
                "optimizer.clip_norm"
            )
        return Checkpoint(
            model=self.name,
            config=self.model.config.model_dump(mode="json"),
            weights=weights,
            labels=self.labels,
            preprocess=self.recipe.preprocess,
            training=self._training_record(),
            resume=resume,
            decision=self.decision or self._multi_label_decision(),
            image_hashes=self.image_hashes,
            project=self.recipe.project or "",
            origin=self.origin,
        )

    def _multi_label_decision(self) -> Decision | None:
        """Build the decision of a multi-label network, with the thresholds of the last finished epoch."""
        if self.activation == "softmax":
            return None
        metrics = self.position.history[-1].metrics if self.position.history else None
        fitted = metrics.thresholds if isinstance(metrics, MultiLabelMetrics) else None
        return Decision(activation="sigmoid", thresholds=fitted or (DEFAULT_THRESHOLD,) * len(self.labels))

    def _training_record(self) -> dict[str, Any]:
        """Describe how the weights were trained."""
        history, device = self.position.history, self.strategy.device
        plugins = makers([*self.model.modules(), self.recipe.data])
        start = {} if self.start is None else {"start": self.start.model_dump(mode="json")}
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "images_format": str(images_format(self.model)).removeprefix("torch."),
            **start,
            "seed": self.recipe.seed,
            "epoch": self.position.epoch,
            "step": self.position.step,
            "weights": "raw" if self.exported is self.model else "average",
            "metrics": history[-1].metrics.model_dump() if history else None,
            **({} if self.result is None else {"procedure": self.result.model_dump(mode="json")}),
            "versions": {
                "sopdeploy": __version__,
                "torch": str(torch.__version__),
                "python": platform.python_version(),
            },
            **({"plugins": plugins} if plugins else {}),
            "machine": {
                **{name: fact for name, fact in machine().items() if name != "load"},
                "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
                "processes": self.strategy.world,
            },
        }


@torch.no_grad()
def find_images_format(recipe: Recipe, model: Classifier, device: torch.device) -> torch.memory_format:
    """Put *model* into eval mode and run it on zeros of each image size; return the layout of its images.

    This is channels-last, the faster one, unless *model* needs contiguous images, as `view` behind a
    convolution does. Raises `ConfigError` if it cannot compute an image size in either layout.
    """
    model.eval()
    try:
        check_image_sizes(recipe, model, device, torch.channels_last)
    except ConfigError:
        check_image_sizes(recipe, model, device, torch.contiguous_format)
        return torch.contiguous_format
    return torch.channels_last


def check_image_sizes(
    recipe: Recipe, model: Classifier, device: torch.device, layout: torch.memory_format
) -> None:
    """Run *model* on zeros of each image size in *layout*; raise `ConfigError` if it cannot."""
    for side in {recipe.preprocess.crop, recipe.training_crop}:
        try:
            model(torch.zeros(1, 3, side, side, device=device).to(memory_format=layout))
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise ConfigError(
                f"preprocess.crop: {recipe.model.name} cannot compute images of {side} pixels "
                f"({first_line(error)}); choose another size"
            ) from error
