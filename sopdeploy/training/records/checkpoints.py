"""What a run was given, what is fitted, and what its checkpoints contain.

Only this module, and the modules `state` of the procedures, know the keys below `resume` and
write those below `training`. Sample order, augmentation, dropout and learning rate are
functions of (seed, epoch, step). Weights, optimizer state and position are therefore enough to
resume a run bit for bit.
"""

import platform
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np
import pydantic
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_leaves

from sopdeploy.base.config import (
    FieldValues,
    StrictModel,
    first_problem,
    version_advice,
    writer_of,
)
from sopdeploy.base.environment import machine
from sopdeploy.base.plugins import plugin_versions
from sopdeploy.base.project import MAX_RECORDED, Origin
from sopdeploy.bundle.decision import Activation, Decision, Rejection
from sopdeploy.data.photos.photo import LabeledImages, LeftOut, Split
from sopdeploy.data.photos.split import Record
from sopdeploy.errors import CheckpointError, ConfigError, TrainingError, shorten
from sopdeploy.evaluation.decision_fit import describe_weakness
from sopdeploy.evaluation.multi_label import DEFAULT_THRESHOLD, MultiLabelMetrics
from sopdeploy.layers.normalize import images_format
from sopdeploy.models.base import Classifier, is_in
from sopdeploy.models.families import describe_options
from sopdeploy.training.diagnostics import EpochRow
from sopdeploy.training.distributed import Strategy
from sopdeploy.training.records.results import AnyProcedureResult
from sopdeploy.training.settings.head import FewShotConfig, HeadOptions
from sopdeploy.training.settings.recipe import LoopConfig, LoopRecipe, Recipe, change_recipe
from sopdeploy.training.start_weights import StartReport, classifier_name
from sopdeploy.version import __version__
from sopdeploy.weights.checkpoint import Checkpoint, TrainingRecord
from sopdeploy.weights.tensor_files import is_state_dict


class Position(StrictModel, frozen=False):
    """The progress of a run, as checkpoints contain it; steps change it in place.

    `step` is the number of finished steps in the current epoch and `seen` the number of their
    images. Over these images, `sums` adds up the parts of the loss and `gradient` the gradient
    norms; `component_counts` counts the images that each component of a gated network received.
    `train_seconds` is the time of these steps, `seconds` that of the whole run.
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
class Setup:
    """What a run was given: a new one, or one to resume.

    Attributes:
        recipe: The recipe with the selected procedure and complete preprocessing.
        file_hashes: Hashes (N,) int64 of the files of the training images; empty if unknown.
        held_out: Which images the run itself holds out, if any.
        model: The network with its weights on the device; the training loop changes them in place.
        weights: The report on the start weights; None for random ones.
        reason: Why "auto" selected the procedure; empty if it did not.
        unknown: Images of none of the classes, which test the rejection, if there are any.
        num_seen: Held-out images that are training images, too, and are judged all the same.
        rule_before: The rule of the run that this one starts from, which rejects unknown images.
        warnings: The warnings so far; procedures add to it by their callback.
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
    unknown: LabeledImages | None = None
    num_seen: int = 0
    rule_before: Rejection | None = None
    warnings: list[str] = field(default_factory=list)

    def all_warnings(self, decision: Decision | None) -> list[str]:
        """Return the warnings of a run with this *decision*, whose rule may be weak."""
        rule = None if decision is None else decision.rejection
        weakness = describe_weakness(rule, self.rule_before)
        return [*self.warnings, *([weakness] if weakness else [])]

    def without_seen(self, seen: NDArray[np.bool_] | None) -> "Setup":
        """Leave out the held-out images that are *seen* (M,) in training; None leaves out none."""
        if seen is None or not seen.any():
            return self
        return replace(self, data=self.data.without_held_out(seen))

    @property
    def new_parts(self) -> tuple[str, ...]:
        """The parts of the network that the start weights do not have."""
        return () if self.weights is None else self.weights.new

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
        """Whether the few-shot procedure fits the network; the run then has no epochs."""
        return isinstance(self.recipe.procedure, FewShotConfig)

    def name_random_frozen_parts(self) -> str:
        """Name the random parts of the frozen network to which a head is fitted, or ""."""
        if not isinstance(self.recipe.procedure, HeadOptions):
            return ""
        if self.weights is None:
            return "all weights"

        # The frozen network with a head does not contain these parts.
        replaced = (*self.model.training_only, classifier_name(self.model))

        remaining = []
        for part in self.weights.new:  # the random ones
            is_replaced = any(is_in(name, part) or is_in(part, name) for name in replaced)
            if not is_replaced:
                remaining.append(part)
        return shorten(remaining)

    def describe_network(self) -> str:
        """Name the network with its options, and count its parameters; those of auxiliary branches are named."""
        chosen = self.recipe.model
        named = describe_options(chosen.name, self.model.config, chosen.config)
        if self.is_few_shot:
            return f"network: {named}, frozen; a linear classifier on its features is trained"

        # The parts that only training needs, each with its number of parameters.
        total = sum(tensor.numel() for tensor in self.model.parameters())
        parts = []
        for part in self.model.training_only:
            numbers = [
                tensor.numel()
                for name, tensor in self.model.named_parameters()
                if is_in(name, part)
            ]
            if numbers:
                parts.append(f", {sum(numbers):,} of them in {part} (training only)")
        return f"network: {named}, {total:,} parameters{''.join(parts)}"

    def describe(self, *, is_new: bool) -> Iterator[str]:
        """Describe weights, procedure and images of a new or a resumed run, by line."""
        yield self.describe_network()
        if is_new and self.weights is not None:
            yield self.weights.describe()
        if self.reason:
            yield self.reason
        resumed = ""
        if isinstance(self.recipe, LoopRecipe):
            if self.recipe.first_phase:
                yield f"epochs 1 to {self.recipe.first_phase} train the classifier alone"
            next_epoch = self.position.epoch + 1
            if not is_new and next_epoch <= self.recipe.epochs:
                resumed = f", resumed at epoch {next_epoch}"

        crop = self.recipe.preprocess.crop
        yield (
            f"{len(self.data.train)} training images, "
            f"{len(self.data.held_out)} validation images{resumed}; the network sees "
            f"{crop} x {crop} pixels"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """A network that a procedure has fitted so far.

    Attributes:
        network: The network with the weights that are evaluated and exported.
        learning: The network that learns, if `network` has an average of its weights.
        file_hashes: Hashes (N,) int64 of the files of the training images; empty if unknown.
        result: The score to expect on new images; None before the end.
        decision: Temperature and thresholds; None if none were fitted.
        seen: The held-out images (M,) that training images show, too, so that they judge nothing.
    """

    name: str
    network: Classifier
    learning: Classifier | None = None
    position: Position
    file_hashes: NDArray[np.int64]
    result: AnyProcedureResult | None = None
    decision: Decision | None = None
    seen: NDArray[np.bool_] | None = None


class ResumeState(TypedDict, total=False):
    """What `last.pt` contains of every run to resume it; the parts of a procedure add their states.

    `procedure` has the arrays of the few-shot fit; it is empty without one.
    """

    position: FieldValues
    train_count: int
    held_out: Tensor
    left_out: list[tuple[str, str, str]]
    warnings: list[str]
    weights: dict[str, Tensor]
    procedure: dict[str, Tensor]


def run_record(setup: Setup, fit: Fit, resume: Mapping[str, Any] | None = None) -> Checkpoint:
    """Build the content of `best.pt`, or with *resume* of `last.pt`.

    Raises `TrainingError` if a value is not finite.
    """
    # A NaN must not replace the last good checkpoint.
    weights = fit.network.state_dict()
    # If `weights` are averages, these are the raw weights.
    learning = {} if fit.learning is None else fit.learning.state_dict()
    checked = tree_leaves({"weights": weights, "learning": learning, "resume": resume})
    if not all(bool(value.isfinite().all()) for value in checked if isinstance(value, Tensor)):
        raise TrainingError(
            "weights or optimizer state are not finite; nothing was saved, lower "
            "optimizer.lr or set optimizer.clip_norm"
        )

    # With several classes per image and no decision: the thresholds of the last finished epoch.
    decision = fit.decision
    if decision is None and setup.activation == "sigmoid":
        thresholds: tuple[float, ...] = (DEFAULT_THRESHOLD,) * len(setup.labels)
        metrics = fit.position.history[-1].metrics if fit.position.history else None
        if isinstance(metrics, MultiLabelMetrics) and metrics.thresholds:
            thresholds = metrics.thresholds
        decision = Decision(activation="sigmoid", thresholds=thresholds)

    # Bundles know their training images by these hashes.
    hashes = np.unique(fit.file_hashes)  # sorted
    origin = setup.origin
    if origin is not None:
        origin = origin.model_copy(update={"sample": tuple(hashes[:MAX_RECORDED].tolist())})

    return Checkpoint(
        model=fit.name,
        config=fit.network.config.model_dump(mode="json"),
        weights=weights,
        labels=setup.labels,
        preprocess=setup.recipe.preprocess,
        training=_describe_training(setup, fit),
        resume=resume,
        decision=decision,
        image_hashes=torch.from_numpy(hashes),
        project=setup.recipe.project or "",
        origin=origin,
    )


def _describe_training(setup: Setup, fit: Fit) -> TrainingRecord:
    """Describe how the weights were trained."""
    history = fit.position.history
    device = setup.strategy.device
    is_gpu = device.type == "cuda"
    plugins = plugin_versions([*fit.network.modules(), setup.recipe.data])
    warnings = setup.all_warnings(fit.decision)
    return {
        "recipe": setup.recipe.model_dump(mode="json"),
        "images_format": str(images_format(fit.network)).removeprefix("torch."),
        **({} if setup.weights is None else {"start": setup.weights.model_dump(mode="json")}),
        "seed": setup.recipe.seed,
        "epoch": fit.position.epoch,
        "step": fit.position.step,
        "weights": "raw" if fit.learning is None else "average",
        "metrics": history[-1].metrics.model_dump() if history else None,
        **({} if fit.result is None else {"procedure": fit.result.model_dump(mode="json")}),
        **({"warnings": warnings} if warnings else {}),
        "versions": {
            "sopdeploy": __version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        },
        **({"plugins": plugins} if plugins else {}),
        "machine": {
            # Without the load, which other runs change.
            **{name: fact for name, fact in machine().items() if name != "load"},
            "device": torch.cuda.get_device_name(device) if is_gpu else device.type,
            "processes": setup.strategy.world,
        },
    }


def with_result(
    best: Checkpoint,
    result: AnyProcedureResult,
    decision: Decision | None,
    warnings: Sequence[str],
) -> Checkpoint:
    """Add result, decision and warnings to the content of `best.pt` of a finished training loop."""
    training = {**best.training, "procedure": result.model_dump(mode="json")}
    if warnings:
        training["warnings"] = [*warnings]
    return replace(best, training=training, decision=decision)


def resume_of(setup: Setup, position: Position, weights: dict[str, Tensor]) -> ResumeState:
    """Return what `last.pt` contains of every run to resume it."""
    left_out = [(*file,) for file in setup.data.left_out]
    return {
        **({"left_out": left_out} if left_out else {}),
        **({"warnings": [*setup.warnings]} if setup.warnings else {}),
        "position": position.model_dump(mode="json"),
        "train_count": len(setup.data.train),
        "held_out": torch.from_numpy(setup.held_out),
        "weights": weights,
        "procedure": {},
    }


def read_recorded_recipe(last: Checkpoint, source: Path) -> Recipe:
    """Read the recipe of the run of *last*; raises `ConfigError`."""
    try:
        return change_recipe(last.training.get("recipe", {}), (), str(source))
    except ConfigError as error:
        raise ConfigError(f"{error}{version_advice(writer_of(last.training))}") from error


def read_warnings(last: Checkpoint) -> list[str]:
    """Read the warnings of the run of *last*, without that of a weak rule, which follows from its decision."""
    return [str(warning) for warning in (last.resume or {}).get("warnings", [])]


def read_held_out(last: Checkpoint) -> NDArray[np.int64] | None:
    """Return the record of the images that the run of *last* holds out, (M, 2); None if it has no record."""
    record = (last.resume or {}).get("held_out")
    return None if record is None else record.numpy()


def read_left_out(last: Checkpoint, source: Path) -> list[LeftOut]:
    """Return the unusable images that the run of *last* left out; raises `CheckpointError`."""
    with state_errors(last, source):
        return [
            LeftOut(*map(str, fields)) for fields in (last.resume or {}).get("left_out", [])
        ]


class Resumed(NamedTuple):
    """What every `last.pt` says about its run: weights to continue from, and number of training images."""

    position: Position
    train_count: Any
    weights: dict[str, Tensor]
    start_weights: StartReport | None


def read_resumed(last: Checkpoint, source: Path) -> Resumed:
    """Read the state of the run of *last*.

    Raises `CheckpointError` if it has none, or a damaged one.
    """
    state = last.resume
    if state is None:
        raise CheckpointError(
            f"{source}: has no state to resume from; start a new run in another folder"
        )

    with state_errors(last, source):
        # These are the raw weights; those of the checkpoint may be averages.
        if not is_state_dict(state.get("weights")):
            raise ValueError  # which becomes a `CheckpointError`
        report = last.training.get("start")
        report = None if report is None else StartReport.model_validate(report)
        position = Position.model_validate(state["position"])
        return Resumed(position, state.get("train_count"), state["weights"], report)


def check_parts(last: Checkpoint, source: Path, parts: Collection[str]) -> None:
    """Raise `CheckpointError` if another version wrote a state in *last* that none of the *parts* of its run has."""
    state = last.resume or {}
    known = {*ResumeState.__annotations__, *parts}
    unknown = sorted(key for key in state.keys() - known if state[key] is not None)
    if unknown and (advice := version_advice(writer_of(last.training))):
        raise CheckpointError(f"{source}: resume.{unknown[0]}: unknown key{advice}")


@contextmanager
def state_errors(last: Checkpoint, source: Path) -> Iterator[None]:
    """Convert the errors of a damaged state of *last*, read from *source*, to `CheckpointError`."""
    advice = version_advice(writer_of(last.training)) or "; start a new run"
    try:
        yield
    except pydantic.ValidationError as error:
        raise CheckpointError(f"{source}: {first_problem(error)}{advice}") from error
    except (AttributeError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"{source}: its state to resume from is damaged{advice}"
        ) from error


def has_same_images(
    last: Checkpoint, source: Path, images: LabeledImages, file_hashes: NDArray[np.int64]
) -> bool:
    """Tell whether *images*, whose files have the *file_hashes* (N,), are the training images of *last*.

    A run with a few-shot fit, also one of a loop before its training, has recorded the hashes
    in the order of the images, and the labels; other runs only sorted hashes. What is unknown
    is not compared: hashes that are empty, and what older runs do not record. Raises
    `CheckpointError` if the record is damaged.
    """
    with state_errors(last, source):
        # The arrays of the few-shot fit; a run without one has none.
        arrays = (last.resume or {}).get("procedure", {})
        targets = arrays.get("targets")
        recorded = arrays.get("file_hashes", last.image_hashes).numpy()
        if targets is not None and not np.array_equal(targets.numpy(), images.targets):
            return False

        # Sorted hashes, without such a fit or by an older version, do not tell the order.
        if np.array_equal(recorded, np.unique(recorded)):
            file_hashes = np.unique(file_hashes)
        return (
            not len(recorded) or not len(file_hashes) or np.array_equal(recorded, file_hashes)
        )
