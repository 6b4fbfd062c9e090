"""One step of training: the gradient over all processes, and the update of the weights.

Before the first step, `branch_shares` measures how much each auxiliary branch would teach.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from sopdeploy.base.seeds import derive_seed
from sopdeploy.data.batches import Batch
from sopdeploy.evaluation.prediction import classification_loss
from sopdeploy.models.base import TrainingOutput, is_in
from sopdeploy.training.loop.losses import Loss, sum_losses, training_loss
from sopdeploy.training.loop.optimizer import CurvatureOptimizer
from sopdeploy.training.loop.state import FinishedStep, LoopState

# Types of autocast by `precision`; fp32 has none
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def train_step(run: LoopState, batch: Batch, *, num_samples: int, steps: int) -> FinishedStep:
    """Run one of the *steps* steps of an epoch on *batch*, this process' part of the *num_samples* samples.

    A single process waits for no result of the device, except in fp16, where the scaler must know
    whether the gradient is finite. `LoopState.read_steps` later finds
    values that are not finite, before a checkpoint is written.
    """
    recipe = run.recipe
    position = run.position

    # Each process draws other random numbers; process 0 draws those of a run of a single
    # process.
    rank_key = [run.strategy.rank] if run.strategy.rank > 0 else []
    torch.manual_seed(
        derive_seed(recipe.seed, "step", position.epoch, position.step, *rank_key)
    )

    run.updates.set_rates(position.epoch + position.step / steps)

    # The images and targets of this process, perhaps erased and mixed.
    pixels, labels = batch
    images = run.normalize(pixels)
    targets = run.augmentations.change_batch(
        images,
        labels,
        len(run.setup.labels),
        is_multi_label=run.activation == "sigmoid",
        seed=derive_seed(
            recipe.seed, "batch augment", position.epoch, position.step, *rank_key
        ),
    )

    optimizer, scaler = run.updates.optimizer, run.updates.scaler
    optimizer.zero_grad()
    loss = compute_gradient(run, (images, targets), num_samples)
    scaler.unscale_(optimizer)  # only fp16 has a scale
    norm = get_total_norm(
        [parameter.grad for parameter in run.parameters if parameter.grad is not None]
    )

    # Count the processes in which gradient, loss and all buffers are finite, before weights
    # change. The buffers are above all the running statistics of batch norms, which include this
    # batch; their norm is the largest absolute value.
    checked = [norm, loss.total]
    if scaler.is_enabled():  # a scale that is too large is not an error: the step is left out
        checked = [loss.total]
    if run.float_buffers:
        checked.append(get_total_norm(run.float_buffers, math.inf))
    is_finite = torch.stack([value.double() for value in checked]).isfinite().all()
    finite_count = run.strategy.all_reduce(is_finite.double())

    run.updates.apply(run.parameters, norm)
    if run.average is not None:
        run.average.update(run.model)

    if scaler.is_enabled():
        norm = norm.nan_to_num(0.0, 0.0)
    return FinishedStep(loss, norm, finite_count, num_samples)


def compute_gradient(run: LoopState, batch: Batch, num_samples: int) -> Loss:
    """Compute the gradient of a step from a *batch* of normalized images; return the loss over all processes.

    The batch is divided into `grad_accum_steps` batches, each of which adds its gradient and its
    loss. Each one computes its mean loss. It is weighted by its share of the *num_samples* of the
    step, so that the sum over all processes is the mean over the step.
    """
    images, targets = batch
    parts = list(
        zip(
            images.tensor_split(run.steps.grad_accum_steps),
            targets.tensor_split(run.steps.grad_accum_steps),
            strict=True,
        )
    )

    # The gradient, summed over all processes with the last part.
    optimizer = run.updates.optimizer
    losses = []
    for number, part in enumerate(parts, 1):
        share = len(part[1]) / num_samples
        loss = compute_loss(run, part)
        scaled = run.updates.scaler.scale(loss.total * share)

        if number < len(parts):
            scaled.backward()  # type: ignore[no-untyped-call]
        elif isinstance(optimizer, CurvatureOptimizer):
            seed = derive_seed(
                run.recipe.seed, "curvature", run.position.epoch, run.position.step
            )
            optimizer.backward(scaled, seed)
            optimizer.all_reduce(run.strategy.sum_by_parameter)
        else:
            run.strategy.backward(scaled, run.trained())
        losses.append(loss.weighted(share))

    # The values of the loss, summed over all processes, too.
    whole = sum_losses(losses)
    total, *values = run.strategy.all_reduce(torch.stack([whole.total, *whole.parts.values()]))

    counts = whole.component_counts
    if counts is not None:
        counts = run.strategy.all_reduce(counts)
    return Loss(total, dict(zip(whole.parts, values, strict=True)), counts)


def compute_loss(run: LoopState, batch: Batch) -> Loss:
    """Compute the mean loss of a *batch* of normalized images, in the precision of the run."""
    images, targets = batch
    steps = run.steps
    device = run.strategy.device.type

    # Second-order layers disable autocast themselves.
    precision = AUTOCAST.get(steps.precision)
    with torch.autocast(device, precision, enabled=precision is not None):
        output = run.compiled(images)
        weights = run.model.loss_weights()
        loss = training_loss(
            output, targets, weights, steps.loss.label_smoothing, run.activation
        )
        if run.teacher is not None:
            loss = run.teacher.distillation_loss(loss, images, targets, output)
    return loss


def branch_shares(run: LoopState, batch: Batch) -> dict[str, float]:
    """Measure what each auxiliary branch of the network of *run* adds to the gradient of the main head.

    The share of a branch is the norm of the gradient of its weighted loss on *batch*, divided by
    that of the main head, over the parameters that both reach and that learn. It is 0 if there are
    none. Empty without branches, or if only branches and classifiers learn. Changes nothing: each
    step draws its own random numbers, and the buffers are restored.
    """
    model = run.model
    shared = [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not is_in(name, *model.training_only)
    ]
    before = [buffer.clone() for buffer in model.buffers()]

    # The losses of all heads, of a part of the batch that fits into memory.
    pixels, labels = (values.tensor_split(run.steps.grad_accum_steps)[0] for values in batch)
    precision = AUTOCAST.get(run.steps.precision)
    with torch.autocast(run.strategy.device.type, precision, enabled=precision is not None):
        output = model(run.normalize(pixels))
        heads: dict[str, Tensor] = {}
        if isinstance(output, TrainingOutput) and output.branches:
            heads = {"main": output.logits, **output.branches}
        losses = {
            name: weight * classification_loss(heads[name], labels, run.activation)
            for name, weight in model.loss_weights().items()
            if name in heads
        }

    def gradient_of(name: str) -> Sequence[Tensor | None]:
        scaled = run.updates.scaler.scale(losses[name])
        return torch.autograd.grad(scaled, shared, retain_graph=True, allow_unused=True)

    # The norms, over the parameters that both heads reach.
    shares = {}
    of_main = gradient_of("main") if len(heads) > 1 and shared else ()
    for name in heads:
        if name == "main" or not any(part is not None for part in of_main):
            continue
        pairs = [
            (own, main)
            for own, main in zip(gradient_of(name), of_main, strict=True)
            if own is not None and main is not None
        ]
        own_norm, main_norm = (
            float(get_total_norm([pair[side] for pair in pairs])) for side in (0, 1)
        )
        shares[name] = own_norm / main_norm if main_norm else 0.0

    for buffer, value in zip(model.buffers(), before, strict=True):
        buffer.copy_(value)
    return shares
