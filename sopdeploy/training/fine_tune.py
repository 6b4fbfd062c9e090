"""The procedure `fine_tune`: the training loop, started from the few-shot procedure's network.

1. Fit a head to the frozen network, as the few-shot procedure does, without the held-out photographs.
2. Train the last stages, with branches if the network has them, from the same head with a covariance that is
   shrunk further, because a head that interpolates the training images gives no gradient
   (`LinearProblem.shrink_to_learn`). The branch of `dsop-head:NAME` is fitted in the same way. The last epoch
   counts.
3. Fit the class means and the temperature again, and compare both networks on the held-out photographs by the
   rule of `sopdeploy compare`. The fine-tuned network is kept only if it is better.

Until the comparison, `best.pt` has the frozen network. `last.pt` has both. Letters: N images, K
classes, D length of the network's own vector.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import log_softmax, logsumexp
from torch import Tensor, nn

from sopdeploy.base.seeds import derive_seed
from sopdeploy.bundle.decision import Decision
from sopdeploy.data.photos.copies import Groups
from sopdeploy.data.photos.network_inputs import PreprocessedDataset
from sopdeploy.evaluation.decision_fit import (
    fit_decision,
    fit_temperature,
    temperature_lowers_loss,
)
from sopdeploy.evaluation.metrics import Rate
from sopdeploy.evaluation.prediction import predict_logits, predict_unknown
from sopdeploy.evaluation.statistics import TESTABLE
from sopdeploy.layers.normalize import IMAGES_FORMAT, images_format
from sopdeploy.models.base import is_in
from sopdeploy.models.dsop import DSoP
from sopdeploy.models.registry import create_model
from sopdeploy.models.second_order_head import (
    POOLED_HEAD,
    DetachableHead,
    SecondOrderHead,
    tuned_name,
)
from sopdeploy.training.callback import Callback
from sopdeploy.training.device import move_to_device
from sopdeploy.training.few_shot.branches import count_images, fit_branches
from sopdeploy.training.few_shot.classifier import mean_vectors, unit_length
from sopdeploy.training.few_shot.cross_validation import weights_in_means
from sopdeploy.training.few_shot.groups import group_by_network
from sopdeploy.training.few_shot.run import fit_new, fit_start, with_decision
from sopdeploy.training.few_shot.state import FewShotFit, read_few_shot_fit
from sopdeploy.training.few_shot.targets import Targets
from sopdeploy.training.loop.run import fit_loop
from sopdeploy.training.loop.state import LoopState, last_loop_record, read_frozen, restore_loop
from sopdeploy.training.records.checkpoints import Fit, Setup, read_resumed, run_record
from sopdeploy.training.records.results import LoopResult, Tuning
from sopdeploy.training.records.run_folder import RunFolder
from sopdeploy.weights.checkpoint import Checkpoint, build_classifier


def fit_fine_tune(
    setup: Setup, last: Checkpoint | None, folder: RunFolder, callback: Callback
) -> tuple[Fit, Mapping[str, Any]]:
    """Fit a head to the frozen network of *setup*, fine-tune network and head, and keep the better result.

    *last* resumes a run. Without enough held-out images to decide, nothing is fine-tuned. At
    first, `best.pt` has the frozen network; in the end, it has the network that is kept. Returns
    the fit and the entry `training` of `best.pt`.

    Raises `TrainingStoppedError` after a stop signal, `TrainingError` if a value is not finite,
    and `DataError` for images that cannot be used.
    """
    if last is None:
        run, frozen = _start(setup, folder, callback)
    else:
        run, frozen = _resume(setup, last, folder)

    # Near-duplicates are not independent. With too few groups no comparison can decide, so all
    # epochs count as trained.
    setup = run.setup
    held_out = setup.data.held_out
    groups = np.arange(len(held_out))
    if len(held_out) >= TESTABLE:  # fewer need no search
        groups = group_by_network(setup.recipe, frozen.network, held_out).groups
    if len(np.unique(groups)) < TESTABLE:
        run.position.epoch = run.recipe.epochs

    folder.save_best(run_record(setup, frozen))
    return fit_loop(run, folder, callback, partial(keep_better, groups))


def _start(setup: Setup, folder: RunFolder, callback: Callback) -> tuple[LoopState, FewShotFit]:
    """Fit a head to the frozen network of *setup*; return the loop that starts with it, and this fit.

    Writes `last.pt`.
    """
    frozen = fit_new(setup, callback)
    options = setup.model.config.model_dump()
    options["head"] = options.get("head", {}) | frozen.network.config.model_dump()["head"]
    name = tuned_name(setup.recipe.model.name)

    # The branches of DSoP and the gate of GM-SOP, if there are any, start with the weights of *setup*; a
    # branch that is a head starts from its own closed form.
    own_parts = ("branches", f"{POOLED_HEAD}.gate")
    others = {
        key: tensor
        for key, tensor in setup.model.state_dict().items()
        if is_in(key, *own_parts)
    }
    if isinstance(setup.model, DetachableHead):
        branch = fit_start(setup, callback, "gap+isqrt")
        options["branch"] = branch.config.model_copy(update={"cosine": False}).model_dump()
        others = {
            f"branch.{key}": tensor
            for key, tensor in branch.state_dict().items()
            if key != "means"  # of the cosine
        }

    network: Any = create_model(name, num_classes=len(setup.labels), **options)
    network.start_from(frozen.network, others)
    start = fit_start(setup, callback, setup.recipe.head_options.head)
    network.pooled_head.fc.load_state_dict(start.fc.state_dict())

    network = move_to_device(setup.recipe, network, setup.strategy)
    if isinstance(network, DSoP) and network.taps:
        _fit_branches(setup, network)
    run = LoopState(replace(setup.without_seen(frozen.seen), model=network), frozen)
    folder.save_last(last_loop_record(run))
    return run, frozen


def _fit_branches(setup: Setup, network: DSoP) -> None:
    """Set the classifiers of the branches of *network* to closed forms on training images of *setup*."""
    recipe = setup.recipe
    images = setup.data.train
    count = count_images(network, len(images))
    # In random order: the batch norms of the branches average batches, and a folder lists class by class.
    random = np.random.default_rng(derive_seed(recipe.seed, "branches"))
    chosen = images.select(random.permutation(len(images))[:count])
    dataset = PreprocessedDataset(chosen, recipe.preprocess)

    def compute(module: nn.Module) -> NDArray[np.float64]:
        vars(module)[IMAGES_FORMAT] = images_format(network)
        rows, _ = predict_logits(module, dataset, recipe.preprocess, workers=recipe.workers)
        return rows

    groups = range(count) if chosen.groups is None else chosen.groups
    keys = [str(group) for group in groups]
    fit_branches(network, compute, Targets.of(chosen), keys, recipe.seed)


def _resume(setup: Setup, last: Checkpoint, folder: RunFolder) -> tuple[LoopState, FewShotFit]:
    """Restore the loop of the run of *last*, and the fit of the frozen network, of which it has a record."""
    record = read_frozen(last, folder.last)
    network = move_to_device(
        setup.recipe, build_classifier(record, folder.last), setup.strategy
    )
    # The frozen network is that of the record; `setup.model` is the network that is fine-tuned.
    position = read_resumed(record, folder.last).position
    of_frozen = replace(setup, model=network, position=position)
    frozen = with_decision(setup, read_few_shot_fit(of_frozen, record, folder.last))

    run = LoopState(setup.without_seen(frozen.seen), frozen)
    restore_loop(run, last, folder.last)
    return run, frozen


def keep_better(
    groups: Groups,
    run: LoopState,
    held_out: PreprocessedDataset,
    folder: RunFolder,
    _callback: Callback,
) -> tuple[Fit, Mapping[str, Any]]:
    """Compare the trained network of *run* with the frozen one; write `best.pt` with the better one.

    Without enough *groups* (N,) of the *held_out* images to decide, this is the frozen one.
    Otherwise, the class means of the trained network are set in place. If it is better, and a
    temperature lowers its loss, its classifier is divided by this, also in place.
    """
    frozen = run.frozen
    tuned = run.exported
    recipe = run.recipe
    if frozen is None or not isinstance(tuned, SecondOrderHead):
        raise TypeError("the loop did not start from a fitted head")

    # One photograph of each group counts; too few of them decide nothing.
    first_of_group = np.unique(groups, return_index=True)[1]
    if len(first_of_group) < TESTABLE:
        return _keep_frozen(run, frozen, Tuning(count=len(first_of_group)), folder)
    frozen_logits_NK, targets = _predict(frozen.network, held_out, run)

    # The loop has changed the features, so the class means are computed anew.
    _set_class_means(tuned, PreprocessedDataset(run.setup.data.train, recipe.preprocess), run)
    logits_NK, _ = _predict(tuned, held_out, run)

    # McNemar's test on the photographs that the two networks answer differently.
    frozen_is_right_N = frozen_logits_NK.argmax(axis=1) == targets
    tuned_is_right_N = logits_NK.argmax(axis=1) == targets
    tuning = Tuning.of(frozen_is_right_N[first_of_group], tuned_is_right_N[first_of_group])
    if not tuning.is_better:
        return _keep_frozen(run, frozen, tuning, folder)

    # The fine-tuned network is better: fit its temperature and its decision.
    logits_NK = _apply_temperature(tuned, logits_NK, targets)
    decision = fit_decision(
        logits_NK,
        targets,
        estimated_on="held-out",
        accepts=recipe.rejection.accepts,
        scalable=False,  # the network contains the temperature
        groups=groups,
        unknown=predict_unknown(tuned, run.setup.unknown, recipe.preprocess, recipe.workers),
        are_cosines=True,
    )
    return _keep_tuned(run, frozen, tuning, decision, folder)


def _keep_tuned(
    run: LoopState, frozen: FewShotFit, tuning: Tuning, decision: Decision, folder: RunFolder
) -> tuple[Fit, Mapping[str, Any]]:
    """Write `best.pt` with the trained network of *run*, which *tuning* selected, and its *decision*."""
    result = LoopResult(
        epoch=run.position.epoch,  # the last one
        num_epochs=run.position.epoch,
        top1=Rate.of(tuning.second, tuning.count),
        count=tuning.count,
        selected_by="same images",
        tuning=tuning,
    )
    seconds = frozen.position.seconds + run.position.seconds
    fit = replace(
        run.synchronized_fit(),
        result=result,
        decision=None if decision == Decision() else decision,  # None if nothing was fitted
        seen=frozen.seen,
        position=run.position.model_copy(update={"seconds": seconds}),
    )

    best = run_record(run.setup, fit)
    folder.save_best(best)
    return fit, best.training


def _keep_frozen(
    run: LoopState, frozen: FewShotFit, tuning: Tuning, folder: RunFolder
) -> tuple[Fit, Mapping[str, Any]]:
    """Write `best.pt` with the *frozen* network, and the history; its result gets the comparison *tuning*."""
    result: Any = frozen.result
    seconds = frozen.position.seconds + run.position.seconds
    position = frozen.position.model_copy(update={"seconds": seconds})
    fit = replace(
        frozen, result=result.model_copy(update={"tuning": tuning}), position=position
    )

    best = run_record(run.setup, fit)
    folder.save_best(best)
    # The epochs of the loop or, if it has trained none, the row of the frozen network.
    folder.save_history(run.position.history or position.history)
    return fit, best.training


def _predict(
    network: nn.Module, images: PreprocessedDataset, run: LoopState
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Compute outputs of *network*, such as logits (N, K), and targets of *images*."""
    recipe = run.recipe
    return predict_logits(
        network, images, recipe.preprocess, batch_size=recipe.batch_size, workers=recipe.workers
    )


class OwnVectors(nn.Module):
    """Compute the own vectors (B, D_0) of a network with a head."""

    def __init__(self, network: SecondOrderHead) -> None:
        super().__init__()
        self.network = network
        vars(self)[IMAGES_FORMAT] = images_format(network)

    def forward(self, images: Tensor) -> Tensor:
        """Compute the vectors of normalized (B, 3, H, W) images."""
        return self.network.head_inputs(images)[0]


@torch.no_grad()
def _set_class_means(
    network: SecondOrderHead, images: PreprocessedDataset, run: LoopState
) -> None:
    """Set the class means of *network*, whose cosines recognize unknown images, to those of its *images*."""
    vectors_ND, targets = _predict(OwnVectors(network), images, run)
    classes_NK = np.eye(network.num_classes)[targets] * weights_in_means(images.images)[:, None]
    means_KD = mean_vectors(unit_length(vectors_ND), classes_NK)
    network.pooled_head.means.copy_(torch.from_numpy(means_KD))


@torch.no_grad()
def _apply_temperature(
    network: SecondOrderHead, logits_NK: NDArray[np.float64], targets: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Divide the classifier of *network* by the temperature of *logits_NK*, if this lowers their loss.

    Returns its new logits. Their energies, the cosines, stay the same.
    """
    if not temperature_lowers_loss(logits_NK, targets):
        return logits_NK
    temperature = fit_temperature(logits_NK, targets)
    for parameter in network.logits_layer().parameters():
        parameter.div_(temperature)

    energies_N1 = logsumexp(logits_NK, axis=1, keepdims=True)
    return log_softmax(logits_NK / temperature, axis=1) + energies_N1
