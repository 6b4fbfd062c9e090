"""The values of a run, which its record and its page read: what it was given, what is fitted."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pydantic
from numpy.typing import NDArray

from sopdeploy.config import StrictModel
from sopdeploy.decision import Activation, Decision
from sopdeploy.errors import shorten
from sopdeploy.models.base import Classifier, is_in
from sopdeploy.photos.photo import Split
from sopdeploy.photos.split import Record
from sopdeploy.project import Origin
from sopdeploy.training.diagnostics import EpochRow
from sopdeploy.training.distributed import Strategy
from sopdeploy.training.recipe import FewShotConfig, HeadOptions, LoopConfig, Recipe
from sopdeploy.training.results import AnyProcedureResult
from sopdeploy.training.start_weights import StartReport, classifier_name


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """What a run was given: a new one, or one to resume.

    Attributes:
        recipe: The recipe with the selected procedure and complete preprocessing.
        data: Training and held-out images.
        file_hashes, held_out: Those of `Division`.
        strategy: The device, and the processes that train together.
        model: The network with its weights on the device; the training loop changes them in place.
        weights: The report on the start weights; None for random ones.
        position: From where the run continues.
        origin: The run and its images, as checkpoints contain them.
        reason: Why "auto" selected the procedure; empty if it did not.
    """

    recipe: Recipe
    data: Split
    file_hashes: NDArray[np.int64]
    held_out: Record
    strategy: Strategy
    model: Classifier
    weights: StartReport | None = None
    position: Position = field(default_factory=Position)
    origin: Origin | None = None
    reason: str = ""

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes in output order."""
        return self.data.train.labels

    @property
    def activation(self) -> Activation:
        """How logits become probabilities: "sigmoid" if images have several classes."""
        return "sigmoid" if self.data.train.is_multi_label else "softmax"

    @property
    def uses_loop(self) -> bool:
        """Whether the training loop alone trains the network."""
        return isinstance(self.recipe.procedure, LoopConfig)

    @property
    def is_few_shot(self) -> bool:
        """Whether the run has no epochs."""
        return isinstance(self.recipe.procedure, FewShotConfig)

    def random_frozen_parts(self) -> str:
        """Name the random parts of the frozen network to which a head is fitted, or "".

        There are none in the training loop, which fits no head to a frozen network.
        """
        if not isinstance(self.recipe.procedure, HeadOptions):
            return ""
        if self.weights is None:
            return "all weights"
        replaced = (*self.model.training_only, classifier_name(self.model))  # not below the head
        remaining = []
        for part in self.weights.new:  # the random ones
            is_replaced = any(is_in(name, part) or is_in(part, name) for name in replaced)
            if not is_replaced:
                remaining.append(part)
        return shorten(remaining)

    def describe(self, *, is_new: bool) -> Iterator[str]:
        """Describe weights, procedure and images of a new or a resumed run, by line."""
        if is_new and self.weights is not None:
            yield self.weights.describe()
        if self.reason:
            yield self.reason
        if self.uses_loop and self.recipe.first_phase:
            yield f"epochs 1 to {self.recipe.first_phase} train the classifier alone"
        next_epoch, crop = self.position.epoch + 1, self.recipe.preprocess.crop
        is_resumed = not is_new and not self.is_few_shot and next_epoch <= self.recipe.epochs
        resumed = f", resumed at epoch {next_epoch}" if is_resumed else ""
        yield (
            f"{len(self.data.train)} training images, {len(self.data.held_out)} held out{resumed}; "
            f"the network sees {crop} x {crop} pixels"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """A network that a procedure has fitted so far.

    Attributes:
        name: Catalog name of the network.
        network: The network with the weights that are evaluated and exported.
        learning: The network that learns, if `network` has an average of its weights.
        position: The progress, with the history.
        file_hashes: Hashes (N,) int64 of the files of the training images; empty if unknown.
        result: The score to expect on new images; None before the end.
        decision: Temperature and thresholds; None if none were fitted.
    """

    name: str
    network: Classifier
    learning: Classifier | None = None
    position: Position
    file_hashes: NDArray[np.int64]
    result: AnyProcedureResult | None = None
    decision: Decision | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class FewShotFit(Fit):
    """What the few-shot procedure has fitted to N training images of K classes.

    Attributes:
        logits: Out-of-fold logits (N, K) float64, with the energies of the deployed network.
        groups: The group (N,) int64 of each image: copies of a photograph, and images that show one object.
        copies: The photograph (N,) int64 that each image shows.
        judged: Indices of the images that the score counts: one of the copies of a photograph.
        label_logits: Out-of-fold logits (N, K) that contradict wrong labels; None with several classes per
            image.
        left_out: The energies (N,) of the images by networks without their class; None with several classes
            per image.
    """

    logits: NDArray[np.float64]
    groups: NDArray[np.int64]
    copies: NDArray[np.int64]
    judged: NDArray[Any]
    label_logits: NDArray[np.float64] | None
    left_out: NDArray[np.float64] | None
