"""Read what `best.pt` and `last.pt` say about their run before its images and network are known."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pydantic
from numpy.typing import NDArray
from torch import Tensor

from sopdeploy.checkpoint import Checkpoint, is_state_dict
from sopdeploy.config import FieldValues, first_problem
from sopdeploy.errors import CheckpointError
from sopdeploy.training.fits import Position
from sopdeploy.training.recipe import Recipe, validate_recipe
from sopdeploy.training.start_weights import StartReport


def read_recorded_recipe(last: Checkpoint, source: Path) -> Recipe:
    """Read the recipe of the run of *last*; raises `ConfigError`."""
    return validate_recipe(recorded_recipe(last), str(source))


def recorded_recipe(last: Checkpoint) -> FieldValues:
    """Return the values of the recipe of the run of *last*."""
    return last.training.get("recipe", {})


def read_held_out(last: Checkpoint) -> NDArray[np.int64] | None:
    """Return the record of the images that the run of *last* holds out, (M, 2); None if it has no record."""
    record = (last.resume or {}).get("held_out")
    return None if record is None else record.numpy()


class Resumed(NamedTuple):
    """What every `last.pt` says about its run: weights to continue from, and number of training images."""

    position: Position
    train_count: Any
    weights: dict[str, Tensor]
    start_weights: StartReport | None


def read_resumed(last: Checkpoint, source: Path) -> Resumed:
    """Read the state of the run of *last*; raises `CheckpointError` if it has none or a damaged one."""
    state = last.resume
    if state is None:
        raise CheckpointError(f"{source}: has no state to resume from; start a new run in another folder")
    with state_errors(source):
        if not is_state_dict(state.get("weights")):  # the raw ones; those of the checkpoint may be averages
            raise ValueError
        report = last.training.get("start")
        report = None if report is None else StartReport.model_validate(report)
        position = Position.model_validate(state["position"])
        return Resumed(position, state.get("train_count"), state["weights"], report)


@contextmanager
def state_errors(source: Path) -> Iterator[None]:
    """Convert the errors of a damaged state in *source* to `CheckpointError`."""
    try:
        yield
    except pydantic.ValidationError as error:
        raise CheckpointError(f"{source}: {first_problem(error)}; start a new run") from error
    except (AttributeError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{source}: its state to resume from is damaged; start a new run") from error


class LabelCheck(NamedTuple):
    """The logits (N, K) of a few-shot run that contradict wrong labels, with the files and their targets."""

    logits: NDArray[np.float64]
    targets: NDArray[Any]
    file_hashes: NDArray[np.int64]


def read_label_check(last: Checkpoint) -> LabelCheck | None:
    """Read what a few-shot run found about its labels; None without it."""
    arrays = (last.resume or {}).get("procedure", {})
    if "label_logits" not in arrays:
        return None
    logits = arrays["label_logits"].double().numpy()
    return LabelCheck(logits, arrays["targets"].numpy(), arrays["file_hashes"].numpy())
