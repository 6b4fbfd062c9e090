"""What the procedures fit: values that the record and the page read."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pydantic
from numpy.typing import NDArray

from sopdeploy.config import StrictModel
from sopdeploy.decision import Decision
from sopdeploy.models.base import Classifier
from sopdeploy.training.diagnostics import EpochRow
from sopdeploy.training.results import AnyProcedureResult


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
