"""The run of the training loop: what learns, its optimizer, average and teacher, and their `last.pt`."""

import itertools
import math
import operator
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property, wraps
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sopdeploy.bundle.decision import Activation
from sopdeploy.data.augment import Augmentations
from sopdeploy.errors import ConfigError, TrainingError, first_line
from sopdeploy.evaluation.prediction import HeldOutMetrics
from sopdeploy.layers.normalize import Normalize, images_format
from sopdeploy.models.base import Classifier, is_in
from sopdeploy.models.second_order_head import tuned_name
from sopdeploy.training.device import find_images_format, move_to_device
from sopdeploy.training.diagnostics import Diagnostics, EpochRow
from sopdeploy.training.few_shot.state import FewShotFit, last_few_shot_record
from sopdeploy.training.loop.average import ExponentialMovingAverage
from sopdeploy.training.loop.losses import Loss, Teacher, create_teacher
from sopdeploy.training.loop.updates import Updates, group_parameters
from sopdeploy.training.records.checkpoints import (
    Fit,
    Position,
    Setup,
    check_parts,
    resume_of,
    run_record,
    state_errors,
)
from sopdeploy.training.settings.loop import StartConfig, StepSettings, UpdateSettings
from sopdeploy.training.settings.recipe import LoopRecipe
from sopdeploy.training.start_weights import classifier_name
from sopdeploy.weights.checkpoint import Checkpoint, parse_checkpoint, plain_content

# Key in `last.pt` of a checkpoint: the fit of the frozen network from which the loop started.
FROZEN = "frozen"

# Steps after which their values are read, by device. Reading waits for all of its work.
STEPS_PER_READ = {"cpu": 1, "cuda": 16}


@dataclass(frozen=True, slots=True)
class FinishedStep:
    """What a step has computed, on the device; `finite_count` counts the processes whose values are finite."""

    loss: Loss
    norm: Tensor
    finite_count: Tensor
    num_samples: int

    def values(self) -> Tensor:
        """Join all values: total and parts of the loss, norm, count of processes, counts of components."""
        values = [self.loss.total, *self.loss.parts.values(), self.norm, self.finite_count]
        if self.loss.component_counts is not None:
            values += self.loss.component_counts.unbind()
        return torch.stack([value.detach().double() for value in values])


class Stateful(Protocol):
    """A part of a run whose state is in `last.pt`."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""
        ...

    def load_state_dict(self, state: Any, /) -> Any:
        """Restore *state*."""
        ...


class LoopState:
    """A training loop in progress; raises `ConfigError` for a teacher that does not fit the images.

    `parameters` and `float_buffers` are made when they are first read. If `start_epoch` replaces
    the model, or more of it learns, they are deleted and made again, as the optimizer is.

    Attributes:
        frozen: What the few-shot procedure has fitted, if the loop starts from it.
        model: The network that learns; `start_epoch` may replace it.
        trainable: Names of the parameters that learn unless `start.learn` freezes them.
        unread: Finished steps whose values are not read yet; only `position.step` counts them.
    """

    def __init__(self, setup: Setup, frozen: FewShotFit | None = None) -> None:
        recipe = setup.recipe
        if not isinstance(recipe, LoopRecipe):
            raise TypeError("the few-shot procedure has no loop")
        self.setup = setup
        self.recipe = recipe
        self.strategy = setup.strategy
        self.frozen = frozen
        self.name = recipe.model.name if frozen is None else tuned_name(recipe.model.name)
        self.activation: Activation = setup.activation
        self.augmentations = recipe.part(Augmentations)
        self.steps = recipe.part(StepSettings)
        self.updates = Updates(
            recipe.part(UpdateSettings),
            self.strategy.device,
            scaled=self.steps.precision == "fp16",
        )
        self.position = setup.position
        self.unread: list[FinishedStep] = []

        # The network, what of it can learn, and what makes its input of images.
        self.model = setup.model
        self.trainable = {
            name for name, value in setup.model.named_parameters() if value.requires_grad
        }
        normalize = Normalize(recipe.preprocess, images_format(self.model))
        self.normalize = normalize.to(self.strategy.device)

        # The teacher: a stored network, or that of a plug-in, which may learn, too.
        self.teacher: Teacher | None = None
        if recipe.teacher is not None:
            if self.activation == "sigmoid":
                raise ConfigError(
                    "teacher: distillation needs one class per image; remove the table"
                )
            smoothing = recipe.loss.label_smoothing
            self.teacher = create_teacher(
                recipe.teacher, setup.labels, recipe.preprocess, smoothing, recipe.seed
            )

        self._prepare_training()

        # A teacher that cannot compute training images must fail here, not after an epoch. The
        # check leaves it in eval mode.
        if self.teacher is not None:
            teacher = self.teacher.model
            sides = {recipe.training_crop}
            find_images_format(
                sides,
                teacher,
                self.strategy.device,
                "teacher: its network",
                recipe.preprocess.channels,
            )
            teacher.train(self.teacher.learns)

        # The average begins with the weights of the network.
        self.average: ExponentialMovingAverage | None = None
        if recipe.ema is not None:
            self.average = ExponentialMovingAverage(recipe.ema.decay, self.model)

    @property
    def exported(self) -> Classifier:
        """The model with the weights that are evaluated and exported: their average, if there is one."""
        if self.average is None or not self.average.count:
            return self.model
        return self.average.model

    def trained(self) -> nn.Module:
        """Return the module that learns: the model, together with its teacher if both are trained jointly."""
        if self.teacher is None or not self.teacher.learns:
            return self.model
        return nn.ModuleDict({"model": self.model, "teacher": self.teacher.model})

    @cached_property
    def compiled(self) -> Callable[[Tensor], Any]:
        """The model as it is called in training: compiled by torch, with `compile`.

        A kernel of its own for each size of a batch does not depend on the sizes before it, which
        differ in a resumed run.
        """
        if not self.steps.compile:
            return self.model
        return naming_compiler(torch.compile(self.model, dynamic=False))

    @property
    def parts(self) -> dict[str, Stateful]:
        """What has a state, by its key in `last.pt`."""
        parts: dict[str, Stateful] = self.updates.parts
        if self.average is not None:
            parts["average"] = self.average
        if self.teacher is not None and self.teacher.learns:
            parts["teacher"] = self.teacher
        return parts

    @cached_property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters of what learns, with the frozen ones; torch would search all modules for them."""
        return list(self.trained().parameters())

    @cached_property
    def float_buffers(self) -> list[Tensor]:
        """The floating-point buffers of what learns, such as the running statistics of batch norms."""
        return [buffer for buffer in self.trained().buffers() if buffer.is_floating_point()]

    def read_steps(self) -> list[float]:
        """Add the unread steps to the position and return their losses, in one wait for the device.

        Raises `TrainingError` if a value of a step is not finite.
        """
        steps = self.unread
        position = self.position
        if not steps:
            return []

        self.unread = []

        # A scale below 1 does not help: the gradient itself is not finite.
        scaler = self.updates.scaler
        if scaler.is_enabled() and scaler.get_scale() < 1:
            raise TrainingError(
                f"epoch {position.epoch + 1}: the gradient is not finite in fp16; lower "
                "optimizer.lr, or set precision to fp32 or bf16"
            )

        # All values of all steps as one tensor, so that the device is read once. Their number
        # differs: a network may have penalties in some steps only.
        values_of_steps = [step.values() for step in steps]
        numbers = iter(torch.cat(values_of_steps).tolist())
        rows = [list(itertools.islice(numbers, len(values))) for values in values_of_steps]

        losses = []
        first_number = position.step - len(steps) + 1
        for number, (step, row) in enumerate(zip(steps, rows, strict=True), first_number):
            total, *parts = row[: 1 + len(step.loss.parts)]
            norm, finite_count, *counts = row[1 + len(parts) :]
            part_of_name = dict(zip(step.loss.parts, parts, strict=True))

            # A process with a value that is not finite makes the count too low, in all processes.
            if finite_count != self.strategy.world:
                damaged = (
                    name for name, part in part_of_name.items() if not math.isfinite(part)
                )
                raise TrainingError(
                    f"epoch {position.epoch + 1}, step {number}: "
                    f"{next(damaged, 'the gradient or a running statistic')} "
                    "is not finite; lower optimizer.lr or set "
                    "optimizer.clip_norm"
                )

            # Sums over samples, from which the row of the epoch takes means.
            for name, part in {"loss": total, **part_of_name}.items():
                position.sums[name] = position.sums.get(name, 0.0) + part * step.num_samples
            if counts:
                before = position.component_counts or (0,) * len(counts)  # () at first
                position.component_counts = tuple(map(operator.add, before, map(int, counts)))

            position.seen += step.num_samples
            position.gradient += norm * step.num_samples
            losses.append(total)
        return losses

    def begin_next_epoch(
        self, metrics: HeldOutMetrics, diagnostics: Diagnostics, seconds: float
    ) -> None:
        """Add the row of the finished epoch to the history, and begin the next one.

        `read_steps` must have read the values of all its steps. Its evaluation took *seconds*.
        """
        position = self.position
        train_seconds = max(position.train_seconds, 1e-9)  # a coarse clock gives 0 s
        row = EpochRow(
            epoch=position.epoch + 1,
            lr=self.updates.rate,
            losses={name: total / position.seen for name, total in position.sums.items()},
            metrics=metrics,
            gradient=position.gradient / position.seen,
            component_counts=position.component_counts,
            images_per_second=position.seen / train_seconds,
            diagnostics=diagnostics,
            seconds=position.seconds + seconds,
        )

        self.position = Position(
            epoch=row.epoch, seconds=row.seconds, history=(*position.history, row)
        )

    def synchronize_buffers(self) -> None:
        """Set the floating-point buffers, such as running statistics, to their means over processes.

        They are linear in the statistics of the batches, so averaging once equals averaging in
        every step.
        """
        if self.strategy.world == 1:
            return
        models = [self.trained()]
        if self.average is not None:
            models.append(self.average.model)
        for model in models:
            for buffer in filter(torch.is_floating_point, model.buffers()):
                buffer.copy_(self.strategy.all_reduce(buffer) / self.strategy.world)

    def synchronized_fit(self) -> Fit:
        """Synchronize the buffers, and return what is fitted so far; all processes call it."""
        self.synchronize_buffers()
        return Fit(
            name=self.name,
            network=self.exported,
            learning=None if self.exported is self.model else self.model,
            position=self.position,
            file_hashes=self.setup.file_hashes,
        )

    def _prepare_training(self) -> None:
        """Set train mode, frozen parameters and their groups in the epoch; move the teacher to the device."""
        recipe = self.recipe

        # All that can learn; `freeze` below excludes what does not learn in this epoch.
        start = self.updates.settings.start_of(self.position.epoch)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in self.trainable)
        set_train_mode(self.model, start, self.setup.new_parts)

        # Forget the cached properties, which are of an earlier model.
        for name in ("compiled", "parameters", "float_buffers"):
            vars(self).pop(name, None)

        freeze(self.model, start)
        self.updates.groups = group_parameters(self.model, start, self.setup.new_parts)

        if self.teacher is not None:
            layout = torch.channels_last if recipe.channels_last else torch.preserve_format
            self.teacher.model.to(self.strategy.device, memory_format=layout)  # type: ignore[call-overload]
            if self.teacher.learns:
                self.updates.groups.append({"params": list(self.teacher.model.parameters())})

        # The balance loss divides by the images of a step, and a call sees a part of them.
        for module in self.trained().modules():
            if isinstance(module, Classifier):
                module.batches_per_step = self.steps.grad_accum_steps

    def start_epoch(self) -> None:
        """Prepare the model if this epoch trains another one (`model.remove_branches_at`) or more of it."""
        epoch = self.position.epoch
        removal = self.recipe.model.remove_branches_at
        model = self.model
        if removal is not None and epoch >= removal:
            model = model.without_branches()

        # Within an epoch, a resumed run needs nothing: `__init__` has prepared it for this epoch.
        # A new optimizer would lose the learning rate of the last step, which the history shows.
        begins = self.position.step == 0
        is_second_phase = begins and epoch > 0 and epoch == self.updates.settings.first_phase
        if model is self.model and not is_second_phase:
            return

        # Parameters that remain keep their state in the new optimizer.
        states = self.updates.take_states(dict(self.trained().named_parameters()))
        self.model = move_to_device(self.recipe, model, self.strategy)
        self.normalize.memory_format = images_format(self.model)
        self._prepare_training()
        self.updates.give_states(dict(self.trained().named_parameters()), states)

        if self.average is not None:
            self.average.narrow(self.model)


def naming_compiler(network: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    """Call *network*, and raise `TrainingError` if torch cannot compile it."""
    from torch._dynamo.exc import TorchDynamoException  # noqa: PLC0415 - imports the compiler

    @wraps(network)
    def call(images: Tensor) -> Any:
        try:
            return network(images)
        except TorchDynamoException as error:
            raise TrainingError(
                f"compile: torch cannot compile the network ({first_line(error)}); set "
                "compile to false"
            ) from error

    return call


def set_train_mode(
    model: Classifier, start: StartConfig | None, new: Collection[str] = ()
) -> None:
    """Put what learns of *model* into train mode, with the modules that contain it; see `StartConfig`.

    *new* are the parts that the weights to start from do not have.
    """
    model.train()
    if start is None or start.learn == "all":
        return
    learn = start.learn

    # The second half of the stages; batch norms keep their statistics, except in branches, and
    # those that have none yet if the recipe says so.
    if learn == "last_stages":
        frozen = first_stages(model)
        updated = (*model.training_only, *(new if start.keep_statistics == "loaded" else ()))
        for name, module in model.named_modules():
            keeps_statistics = isinstance(module, _BatchNorm) and not is_in(name, *updated)
            is_root = name == ""  # its mode decides whether it computes the branches
            if not is_root and (name in frozen or keeps_statistics):
                module.training = False
        return

    # The branches, with or without the classifier, and the modules around them.
    parts = learning_parts(model, learn)
    for name, module in model.named_modules():
        contains_part = any(part.startswith(f"{name}.") for part in parts)
        is_root = name == ""  # its mode decides whether it computes the branches
        module.training = is_root or contains_part or is_in(name, *parts)


def learning_parts(model: Classifier, learn: str) -> tuple[str, ...]:
    """Return the dotted names of the parts that "branches" or "classifier" train."""
    branches = model.training_only
    return branches if learn == "branches" else (classifier_name(model), *branches)


def first_stages(model: Classifier) -> set[str]:
    """Return the names of the modules up to the end of the first half of the stages; "" is the root.

    A stage is the module that contains several taps, such as `layer1` of `layer1.0` and
    `layer1.1`, or each tap if one module contains all. "Up to" is by the order of
    `named_modules`, in which a network creates its modules. Empty with fewer than two stages.
    """
    taps = list(model.tap_channels)
    stages = {tap: tap.rpartition(".")[0] for tap in taps}
    if len(set(stages.values())) == 1:
        stages = {tap: tap for tap in taps}

    in_order = list(dict.fromkeys(stages.values()))
    first = in_order[: len(in_order) // 2]
    frozen_taps = [tap for tap in taps if stages[tap] in first]

    # Modules are listed in the order of their creation; all up to the last frozen tap are
    # frozen.
    names = [name for name, _ in model.named_modules()]
    ends = [index for index, name in enumerate(names, 1) if is_in(name, *frozen_taps)]
    return set(names[: max(ends, default=0)])


def freeze(model: Classifier, start: StartConfig | None) -> None:
    """Freeze the parameters that `start.learn` excludes; raises `ConfigError` without branches to train."""
    learn = "all" if start is None else start.learn
    has_branches = any(is_in(name, *model.training_only) for name in model.state_dict())
    if learn == "branches" and not has_branches:
        raise ConfigError('start.learn: this network has no branches; use learn = "all"')

    if learn == "last_stages":
        frozen = first_stages(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.rpartition(".")[0] not in frozen)
    elif learn != "all":
        parts = learning_parts(model, learn)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(is_in(name, *parts))


def last_loop_record(run: LoopState) -> Checkpoint:
    """Build the content of `last.pt` of a training loop, which may be between any two steps.

    All processes call it, because it averages the running statistics over them, in place.
    """
    resume = {
        **resume_of(run.setup, run.position, run.model.state_dict()),
        **{name: part.state_dict() for name, part in run.parts.items()},
    }

    if run.frozen is not None:  # the run may keep this fit in the end
        frozen = last_few_shot_record(run.setup, run.frozen)
        state: Any = frozen.resume
        resume |= {"procedure": state["procedure"], FROZEN: plain_content(frozen)}

    return run_record(run.setup, run.synchronized_fit(), resume)


def read_frozen(last: Checkpoint, source: Path) -> Checkpoint:
    """Read the fit of the frozen network from which the loop of *last* started; `CheckpointError` if none."""
    with state_errors(last, source):
        state: Any = last.resume  # None raises a TypeError
        return parse_checkpoint(source, dict(state[FROZEN]), "")


def restore_loop(run: LoopState, last: Checkpoint, source: Path) -> None:
    """Restore the states of the parts of *run*; raises `CheckpointError`."""
    check_parts(last, source, [*run.parts, *([] if run.frozen is None else [FROZEN])])
    with state_errors(last, source):
        state: Any = last.resume
        for name, part in run.parts.items():
            part.load_state_dict(state[name])
