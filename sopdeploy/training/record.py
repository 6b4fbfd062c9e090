"""What `best.pt` and `last.pt` contain of every run, and `last.pt` of a few-shot run; reading them again.

Only this module, and `loop.state`, which adds the state of a loop, know the keys below `training` and
`resume`. Sample order, augmentation, dropout and learning rate are functions of
(seed, epoch, step). Weights, optimizer state and position are therefore enough to resume a run bit for bit.
"""

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np
import pydantic
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_leaves

from sopdeploy.checkpoint import Checkpoint, TrainingRecord, is_state_dict
from sopdeploy.config import FieldValues, first_problem, version_advice, writer_of
from sopdeploy.decision import Decision
from sopdeploy.environment import machine
from sopdeploy.errors import CheckpointError, ConfigError, TrainingError
from sopdeploy.evaluation.multi_label import DEFAULT_THRESHOLD, MultiLabelMetrics
from sopdeploy.layers.normalize import images_format
from sopdeploy.photos.photo import LabeledImages, LeftOut
from sopdeploy.plugins import plugin_versions
from sopdeploy.project import SAMPLED
from sopdeploy.training.fits import FewShotFit, Fit, Position, Start
from sopdeploy.training.recipe import Recipe, validate_recipe
from sopdeploy.training.results import AnyProcedureResult, read_result
from sopdeploy.training.start_weights import StartReport
from sopdeploy.version import __version__


class ResumeState(TypedDict, total=False):
    """What `last.pt` contains to resume a run, in the types of PyTorch's files.

    The last four are of a loop: `frozen` is the content of a checkpoint. `left_out` are the fields of each
    `LeftOut`, if there are any.
    """

    position: FieldValues
    train_count: int
    held_out: Tensor
    left_out: list[tuple[str, str, str]]
    weights: dict[str, Tensor]
    procedure: dict[str, Tensor]
    optimizer: FieldValues
    average: FieldValues | None
    teacher: dict[str, Tensor]
    frozen: FieldValues


def run_record(start: Start, fit: Fit, resume: ResumeState | None = None) -> Checkpoint:
    """Build the content of `best.pt`, or with *resume* that of `last.pt`.

    *resume* is what `last.pt` contains in addition. Raises `TrainingError` if a weight is a NaN or infinity.
    """
    weights = fit.network.state_dict()
    learning = {} if fit.learning is None else fit.learning.state_dict()  # raw, if *weights* are averages
    checked = tree_leaves({"weights": weights, "learning": learning, "resume": resume})
    if not all(bool(value.isfinite().all()) for value in checked if isinstance(value, Tensor)):
        raise TrainingError(
            "weights or optimizer state are not finite; nothing was saved, lower optimizer.lr or set "
            "optimizer.clip_norm"
        )
    decision = fit.decision
    if decision is None and start.activation == "sigmoid":  # with the thresholds of the last finished epoch
        thresholds: tuple[float, ...] = (DEFAULT_THRESHOLD,) * len(start.labels)
        metrics = fit.position.history[-1].metrics if fit.position.history else None
        if isinstance(metrics, MultiLabelMetrics) and metrics.thresholds:
            thresholds = metrics.thresholds
        decision = Decision(activation="sigmoid", thresholds=thresholds)
    hashes = np.unique(fit.file_hashes)  # sorted
    origin = start.origin
    if origin is not None:
        origin = origin.model_copy(update={"sample": tuple(hashes[:SAMPLED].tolist())})
    return Checkpoint(
        model=fit.name,
        config=fit.network.config.model_dump(mode="json"),
        weights=weights,
        labels=start.labels,
        preprocess=start.recipe.preprocess,
        training=_describe_training(start, fit),
        resume=resume,
        decision=decision,
        image_hashes=torch.from_numpy(hashes),
        project=start.recipe.project or "",
        origin=origin,
    )


def _describe_training(start: Start, fit: Fit) -> TrainingRecord:
    """Describe how the weights were trained."""
    history, device = fit.position.history, start.strategy.device
    plugins = plugin_versions([*fit.network.modules(), start.recipe.data])
    return {
        "recipe": start.recipe.model_dump(mode="json"),
        "images_format": str(images_format(fit.network)).removeprefix("torch."),
        **({} if start.weights is None else {"start": start.weights.model_dump(mode="json")}),
        "seed": start.recipe.seed,
        "epoch": fit.position.epoch,
        "step": fit.position.step,
        "weights": "raw" if fit.learning is None else "average",
        "metrics": history[-1].metrics.model_dump() if history else None,
        **({} if fit.result is None else {"procedure": fit.result.model_dump(mode="json")}),
        "versions": {
            "sopdeploy": __version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        },
        **({"plugins": plugins} if plugins else {}),
        "machine": {
            **{name: fact for name, fact in machine().items() if name != "load"},  # which other runs change
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "processes": start.strategy.world,
        },
    }


def with_result(best: Checkpoint, result: AnyProcedureResult, decision: Decision | None) -> Checkpoint:
    """Add the result and the decision to the content of `best.pt` of a finished training loop."""
    training = {**best.training, "procedure": result.model_dump(mode="json")}
    return replace(best, training=training, decision=decision)


def resume_of(start: Start, position: Position, weights: dict[str, Tensor]) -> ResumeState:
    """Return what `last.pt` contains of every run to resume it."""
    left_out = [(*one,) for one in start.data.left_out]
    return {
        **({"left_out": left_out} if left_out else {}),
        "position": position.model_dump(mode="json"),
        "train_count": len(start.data.train),
        "held_out": torch.from_numpy(start.held_out),
        "weights": weights,
        "procedure": {},
    }


def last_few_shot_record(start: Start, fit: FewShotFit) -> Checkpoint:
    """Build the content of `last.pt` of a few-shot run, which is finished."""
    arrays = {
        "out_of_fold": fit.logits,
        "groups": fit.groups,
        "judged": fit.judged,
        "copies": fit.copies,
        "targets": start.data.train.targets,
        "file_hashes": fit.file_hashes,
    }
    if fit.left_out is not None:
        arrays["left_out"] = fit.left_out
    if fit.label_logits is not None:
        arrays["label_logits"] = fit.label_logits
    resume = resume_of(start, fit.position, fit.network.state_dict())
    resume["procedure"] = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return run_record(start, fit, resume)


def read_few_shot_fit(start: Start, last: Checkpoint, source: Path) -> FewShotFit:
    """Read the fit of the finished few-shot run of *last*, whose network is that of *start*.

    Raises `CheckpointError` if the record is missing or damaged.
    """
    with state_errors(last, source):
        state: Any = last.resume  # None raises a TypeError
        arrays = state["procedure"]
        label_logits, left_out = arrays.get("label_logits"), arrays.get("left_out")
        return FewShotFit(
            name=last.model,
            network=start.model,
            position=start.position,
            file_hashes=arrays.get("file_hashes", last.image_hashes).numpy(),  # older runs may lack the order
            result=read_result(last.training),
            decision=last.decision,
            logits=arrays["out_of_fold"].double().numpy(),
            groups=arrays["groups"].numpy(),
            copies=arrays.get("copies", arrays["groups"]).numpy(),  # older runs have one array for both
            judged=arrays["judged"].numpy(),
            label_logits=None if label_logits is None else label_logits.double().numpy(),
            left_out=None if left_out is None else left_out.numpy(),
        )


def read_recorded_recipe(last: Checkpoint, source: Path) -> Recipe:
    """Read the recipe of the run of *last*; raises `ConfigError`."""
    try:
        return validate_recipe(last.training.get("recipe", {}), str(source))
    except ConfigError as error:
        raise ConfigError(f"{error}{version_advice(writer_of(last.training))}") from error


def read_held_out(last: Checkpoint) -> NDArray[np.int64] | None:
    """Return the record of the images that the run of *last* holds out, (M, 2); None if it has no record."""
    record = (last.resume or {}).get("held_out")
    return None if record is None else record.numpy()


def read_left_out(last: Checkpoint, source: Path) -> list[LeftOut]:
    """Return the damaged images that the run of *last* left out; raises `CheckpointError`."""
    with state_errors(last, source):
        return [LeftOut(*map(str, fields)) for fields in (last.resume or {}).get("left_out", [])]


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
    advice = version_advice(writer_of(last.training))
    if advice and (unknown := state.keys() - ResumeState.__annotations__.keys()):
        raise CheckpointError(f"{source}: resume.{min(unknown)}: unknown key{advice}")
    with state_errors(last, source):
        if not is_state_dict(state.get("weights")):  # the raw ones; those of the checkpoint may be averages
            raise ValueError  # which becomes a `CheckpointError`
        report = last.training.get("start")
        report = None if report is None else StartReport.model_validate(report)
        position = Position.model_validate(state["position"])
        return Resumed(position, state.get("train_count"), state["weights"], report)


@contextmanager
def state_errors(last: Checkpoint, source: Path) -> Iterator[None]:
    """Convert the errors of a damaged state of *last*, read from *source*, to `CheckpointError`."""
    advice = version_advice(writer_of(last.training)) or "; start a new run"
    try:
        yield
    except pydantic.ValidationError as error:
        raise CheckpointError(f"{source}: {first_problem(error)}{advice}") from error
    except (AttributeError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{source}: its state to resume from is damaged{advice}") from error


def has_same_images(
    last: Checkpoint, source: Path, images: LabeledImages, file_hashes: NDArray[np.int64]
) -> bool:
    """Check that *images*, whose files have the *file_hashes* (N,), are the training images of *last*.

    A run with out-of-fold predictions has recorded order and labels, others only which files they are. What
    is unknown is not compared: hashes that are empty, and what older runs do not record. Raises
    `CheckpointError` if the record is damaged.
    """
    with state_errors(last, source):
        arrays = (last.resume or {}).get("procedure", {})
        targets, recorded = arrays.get("targets"), arrays.get("file_hashes", last.image_hashes).numpy()
        if targets is not None and not np.array_equal(targets.numpy(), images.targets):
            return False
        if np.array_equal(recorded, np.unique(recorded)):  # of a loop, or resumed by an older version
            file_hashes = np.unique(file_hashes)
        return not len(recorded) or not len(file_hashes) or np.array_equal(recorded, file_hashes)


def read_label_logits(last: Checkpoint) -> NDArray[np.float64] | None:
    """Read the logits (N, K) of a few-shot run that contradict wrong labels; None if *last* has none."""
    logits = (last.resume or {}).get("procedure", {}).get("label_logits")
    return None if logits is None else logits.double().numpy()
