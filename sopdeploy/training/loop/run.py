"""The training loop: epochs of steps on augmented images, each with an evaluation on held-out images."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sopdeploy.bundle.decision import Decision
from sopdeploy.data.augment import AugmentedDataset
from sopdeploy.data.batches import Loader, load_batches, shuffled_batches
from sopdeploy.data.photos.network_inputs import PreprocessedDataset
from sopdeploy.data.photos.photo import LabeledImages
from sopdeploy.evaluation.decision_fit import MIN_IMAGES, fit_decision
from sopdeploy.evaluation.metrics import Rate, effective_count
from sopdeploy.evaluation.prediction import (
    as_evaluated,
    evaluate_network,
    predict_logits,
    predict_unknown,
)
from sopdeploy.models.base import Classifier
from sopdeploy.training.callback import Callback, ExpectedTime
from sopdeploy.training.diagnostics import EpochRow, best_epoch, diagnose
from sopdeploy.training.distributed import SignalState, TrainingStoppedError, handle_signals
from sopdeploy.training.loop.gradient import branch_shares, train_step
from sopdeploy.training.loop.state import (
    STEPS_PER_READ,
    LoopState,
    last_loop_record,
    set_train_mode,
)
from sopdeploy.training.records.checkpoints import Fit, run_record, with_result
from sopdeploy.training.records.results import LoopResult, SelectedBy
from sopdeploy.training.records.run_folder import RunFolder
from sopdeploy.weights.checkpoint import build_classifier, read_checkpoint

_NUM_RESAMPLES = 1000
MIN_SHARE = 0.2  # of the gradient of a branch, relative to that of the main head
Finish = Callable[
    [LoopState, PreprocessedDataset, RunFolder, Callback], tuple[Fit, Mapping[str, Any]]
]


def fit_loop(
    run: LoopState, folder: RunFolder, callback: Callback, finish: Finish | None = None
) -> tuple[Fit, Mapping[str, Any]]:
    """Train the network of *run*, which may be a resumed one, by gradient descent.

    Writes `last.pt`, the history and, unless it starts from a frozen network, `best.pt` of the
    best epoch. At the end, calls *finish*, by default `fit_best`, and returns its result: the
    fit, and the entry `training` of `best.pt`, which is empty in all but the first process.

    Raises `TrainingStoppedError` after a stop signal, `DataError` for images that cannot be used,
    and `TrainingError` if a value is not finite.
    """
    recipe = run.recipe
    data = run.setup.data

    # The images as the network sees them.
    augmentations = run.augmentations
    held_out = augmentations.evaluated_images(data.held_out, recipe.preprocess)
    training = augmentations.training_images(
        data.train, recipe.preprocess, recipe.seed, run.position.epoch
    )

    expected = ExpectedTime(callback, "`epochs` changes it")
    save_derived_files(run, folder)  # the process may have been killed before it wrote them

    with (
        handle_signals(run.strategy) as signals,
        Loader((training, held_out), recipe.workers, run.strategy.device) as loader,
    ):
        try:
            while run.position.epoch < recipe.epochs:
                signals.exchange()
                run.start_epoch()
                train_epoch(run, training, loader, folder, signals, callback, expected)
                evaluate_epoch(run, held_out, loader, signals, callback)
                folder.save_last(last_loop_record(run))
                save_derived_files(run, folder)
                callback.on_epoch_end(run.position.history[-1])

            for branch in idle_branches(run.position.history[-1:], data.held_out):
                callback.on_warning(branch)
            # A first signal does not stop what follows.
            finish_run = fit_best if finish is None else finish
            return finish_run(run, held_out, folder, callback)
        except TrainingStoppedError as stop:
            folder.save_last(last_loop_record(run))
            stop.message = (
                f"stopped in epoch {run.position.epoch + 1} of {recipe.epochs} "
                f"after {run.position.step} steps of it; {folder.last} is saved"
            )
            raise


def idle_branches(last: Sequence[EpochRow], held_out: LabeledImages) -> Iterator[str]:
    """Describe each auxiliary branch that is not better than the most frequent class of the *held_out* images.

    *last* has the row of the last epoch, if an epoch was trained. Such a branch had nothing to
    teach. An accuracy less than two standard errors above the share of this class counts as no
    better.
    """
    if not last or last[0].diagnostics is None or held_out.is_multi_label:
        return
    diagnostics = last[0].diagnostics
    chance = float(held_out.class_counts().max()) / max(1, len(held_out))
    limit = chance + 2 * (chance * (1 - chance) / max(1, diagnostics.num_images)) ** 0.5
    for name, metrics in diagnostics.heads.items():
        if name != "main" and metrics.score <= limit:
            yield (
                f"the auxiliary branch {name} has an accuracy of {100 * metrics.score:.1f} % on "
                f"{diagnostics.num_images} validation images, where the most frequent class has "
                f"{100 * chance:.1f} %; it taught the network nothing, so compare with a plain network"
            )


def _tell_branch_shares(
    shares: Mapping[str, float], callback: Callback, *, is_trained: bool
) -> None:
    """Tell the *shares* of `branch_shares`; if the network *is_trained*, warn of those below `MIN_SHARE`.

    From random weights, there is no warning: those of the paper for small networks, 0.1, 0.2 and 0.3,
    begin with shares of 0.05, 0.14 and 0.26.
    """
    if not shares:
        return
    listed = ", ".join(f"{name} {share:.2f}" for name, share in shares.items())
    callback.on_message(
        f"gradient of the auxiliary branches in shared layers, as a share of the main head's: {listed}"
    )
    if not is_trained:
        return

    early = [name for name, share in shares.items() if share == 0]
    if early:
        callback.on_warning(
            f"auxiliary branches that cannot teach the network: {', '.join(early)}. No layer before them "
            "learns; leave them out by 0 blocks in model.config.aux_blocks"
        )
    weak = [f"{name} ({share:.2f})" for name, share in shares.items() if 0 < share < MIN_SHARE]
    if weak:
        callback.on_warning(
            f"auxiliary branches that will hardly teach the network: {', '.join(weak)}. Their gradient in "
            f"shared layers is below {MIN_SHARE:g} of the main head's; raise model.config.aux_weights"
        )


def train_epoch(
    run: LoopState,
    training: AugmentedDataset,
    loader: Loader,
    folder: RunFolder,
    signals: SignalState,
    callback: Callback,
    expected: ExpectedTime,
) -> None:
    """Run the remaining steps of the current epoch on the images of *training*.

    The values of `STEPS_PER_READ` steps are read and reported together. After that,
    `TrainingStoppedError` is raised if a process was stopped, and `last.pt` is written if it is
    due.
    """
    recipe = run.recipe
    epoch = run.position.epoch
    position = run.position
    num_samples = run.augmentations.num_copies * len(training)
    batches = shuffled_batches(num_samples, recipe.batch_size, recipe.seed, epoch)
    set_train_mode(run.model, run.updates.settings.start_of(epoch), run.setup.new_parts)
    shards = [run.strategy.shard(samples) for samples in batches[position.step :]]

    since = time.monotonic()
    for batch in load_batches(
        replace(training, epoch=epoch), shards, loader, run.strategy.device
    ):
        if position.step == 0 and epoch in (0, run.updates.settings.first_phase):
            is_trained = run.frozen is not None or not recipe.starts_random
            _tell_branch_shares(branch_shares(run, batch), callback, is_trained=is_trained)

        size = len(batches[position.step])  # samples of all processes
        run.unread.append(train_step(run, batch, num_samples=size, steps=len(batches)))
        position.step += 1

        is_last = position.step == len(batches)

        # Losses are read in groups, because each reading waits for the device.
        if len(run.unread) < STEPS_PER_READ[run.strategy.device.type] and not is_last:
            continue
        first = position.step - len(run.unread)
        losses = run.read_steps()
        now = time.monotonic()
        position.train_seconds += now - since
        position.seconds += now - since  # to which `begin_next_epoch` adds the evaluation
        since = now

        for step, loss in enumerate(losses, first):
            callback.on_step_end(
                epoch=epoch, epochs=recipe.epochs, step=step, steps=len(batches), loss=loss
            )
        expected.update(epoch * len(batches) + position.step, recipe.epochs * len(batches))

        if signals.exchange(save_due=folder.is_save_due(recipe.save)):
            folder.save_last(last_loop_record(run))


def evaluate_epoch(
    run: LoopState,
    held_out: PreprocessedDataset,
    loader: Loader,
    signals: SignalState,
    callback: Callback,
) -> None:
    """Evaluate the exported weights on held-out images, and begin the next epoch.

    Raises `TrainingStoppedError` between two batches if a process was stopped.
    """
    since = time.monotonic()
    epoch = run.position.epoch
    recipe = run.recipe
    mirror = recipe.validation.mirror
    run.synchronize_buffers()

    def on_batch(done: int) -> None:
        callback.on_evaluation_batch(epoch=epoch, epochs=recipe.epochs, done=done)
        signals.exchange()

    metrics = evaluate_network(
        as_evaluated(run.exported, mirror=mirror),
        held_out,
        recipe.preprocess,
        batch_size=recipe.batch_size // run.strategy.world,
        workers=loader,
        processes=run.strategy,
        on_batch=on_batch,
    )

    # Every process computes these for the same few images itself, so its batches are whole
    # ones.
    diagnostics = diagnose(
        run.exported, held_out, recipe.preprocess, recipe.batch_size, mirror=mirror
    )

    run.begin_next_epoch(metrics, diagnostics, time.monotonic() - since)


def save_derived_files(run: LoopState, folder: RunFolder) -> None:
    """Write the history, the link `latest`, and `best.pt` if the network has the weights of the best epoch.

    Without a finished epoch, nothing is written. A run that starts from a frozen network keeps
    its `best.pt`.
    """
    position = run.position
    history = run.position.history
    if not history:
        return

    best = best_epoch(history, frozen_backbone=run.recipe.frozen_backbone)
    # Whether the network still has the weights of the best epoch: no step was made since.
    has_best_weights = position.step == 0 and best.epoch == position.epoch
    # In a run that starts from a frozen network, `best.pt` has that network until the end.
    if has_best_weights and run.frozen is None:
        # All processes call this, because they average the running statistics together.
        folder.save_best(run_record(run.setup, run.synchronized_fit()))
    folder.save_history(history)


def fit_best(
    run: LoopState, held_out: PreprocessedDataset, folder: RunFolder, callback: Callback
) -> tuple[Fit, Mapping[str, Any]]:
    """Estimate the score of `best.pt`, fit its decision to the held-out images, and add both to it.

    The decision is fitted without mirror images, because a server computes none. With fewer
    than `MIN_IMAGES`, or several classes per image, that of `best.pt` remains. The other
    processes only estimate the score.
    """
    # The score of the epoch that is in `best.pt`.
    recipe = run.recipe
    result = estimate_best(
        run.position.history,
        held_out.images.groups,
        frozen_backbone=recipe.frozen_backbone,
        mirrored=recipe.validation.mirror,
    )

    setup = run.setup
    facts = {"left_out": tuple(map(str, setup.data.left_out)), "num_seen": setup.num_seen}
    result = result.model_copy(update=facts)
    fit = replace(run.synchronized_fit(), result=result)
    if run.strategy.rank != 0:
        return fit, {}

    # Only the first process fits the decision, with the weights that were saved.
    checkpoint = read_checkpoint(folder.best)
    model = build_classifier(checkpoint, folder.best).to(run.strategy.device)
    decision = checkpoint.decision
    if run.activation == "softmax" and len(held_out) >= MIN_IMAGES:
        decision = _fit_to_held_out(run, model, held_out, callback)

    best = with_result(checkpoint, result, decision, setup.all_warnings(decision))
    folder.save_best(best)
    return replace(fit, network=model, decision=decision), best.training


def _fit_to_held_out(
    run: LoopState, model: Classifier, held_out: PreprocessedDataset, callback: Callback
) -> Decision:
    """Fit the decision of *model* to the *held_out* images; the progress is that of the last epoch."""
    recipe = run.recipe
    epochs = recipe.epochs
    logits, targets = predict_logits(
        model,
        held_out,
        recipe.preprocess,
        batch_size=recipe.batch_size,
        workers=recipe.workers,
        on_batch=lambda done: callback.on_evaluation_batch(
            epoch=epochs - 1, epochs=epochs, done=done
        ),
    )
    return fit_decision(
        logits,
        targets,
        estimated_on="held-out",
        accepts=recipe.rejection.accepts,
        scalable=model.has_scalable_logits(),
        groups=held_out.images.groups,
        unknown=predict_unknown(model, run.setup.unknown, recipe.preprocess, recipe.workers),
    )


def estimate_best(
    history: Sequence[EpochRow],
    groups: NDArray[Any] | None = None,
    *,
    frozen_backbone: bool = False,
    mirrored: bool = False,
) -> LoopResult:
    """Estimate the score of the best epoch of *history* on new images.

    The images that select the epoch measure too high a score. An accuracy is therefore
    corrected by resamples of the *groups* (N,), by default images: each resample selects an
    epoch, and the images outside of the resample measure it (bootstrap bias corrected
    cross-validation: Tsamardinos et al., Machine Learning 107, 2018). This needs the
    predictions of all epochs for all images, which `diagnose` makes of at most `MAX_IMAGES`,
    and several groups. With *frozen_backbone*, no image selects the epoch (`best_epoch`).
    *mirrored* is noted in the result.
    """
    best = best_epoch(history, frozen_backbone=frozen_backbone)
    count = best.metrics.count
    score = best.metrics.score
    is_map = best.metrics.score_name == "mAP"
    group_N = np.arange(count) if groups is None else np.unique(groups, return_inverse=True)[1]

    # For each epoch, a text with a character per image: "1" if its predicted class is right,
    # else "0".
    texts = [row.diagnostics.right if row.diagnostics else "" for row in history]
    are_complete = not is_map and all(len(text) == count == len(group_N) for text in texts)

    # What selected the epoch: nothing, or these images, whose score bootstrap can correct.
    selected_by: SelectedBy = "nothing"
    if len(history) > 1 and not frozen_backbone:
        selected_by = "same images"
        if are_complete and group_N.any():  # several groups, numbered from 0
            score = corrected_score(np.array([list(text) for text in texts]) == "1", group_N)
            selected_by = "other images"

    # The scores of all heads, if there are branches beside the network.
    diagnostics = best.diagnostics
    heads = {} if diagnostics is None else diagnostics.heads
    has_branches = len(heads) > 1

    return LoopResult(
        epoch=best.epoch,
        num_epochs=len(history),
        top1=None if is_map else Rate.of(round(score * count), count, effective_count(group_N)),
        map=score if is_map else None,
        count=count,
        selected_by=selected_by,
        mirrored=mirrored,
        branches={name: head.score for name, head in heads.items()} if has_branches else {},
        num_diagnosed=diagnostics.num_images if diagnostics and has_branches else 0,
    )


def corrected_score(right_EN: NDArray[np.bool_], group_N: NDArray[np.intp]) -> float:
    """Estimate the accuracy of the best of E epochs by B resamples of the groups of N images.

    *right_EN* tells which images each epoch classifies correctly, *group_N* the group of each
    image, from 0 to G - 1.
    """
    count = int(group_N.max()) + 1
    resamples_BG = np.random.default_rng(0).multinomial(
        count, [1 / count] * count, _NUM_RESAMPLES
    )
    resamples_BN = resamples_BG[:, group_N]  # how often each one contains each image

    # Each resample selects an epoch, which is judged by the images outside of the resample.
    selected_B = (resamples_BN @ right_EN.T).argmax(axis=1)  # of equally good epochs the first
    outside_BN = resamples_BN == 0
    num_outside_B = outside_BN.sum(axis=1)
    num_right_B = (right_EN[selected_B] & outside_BN).sum(axis=1)

    some_outside_B = num_outside_B > 0
    return float((num_right_B[some_outside_B] / num_outside_B[some_outside_B]).mean())
