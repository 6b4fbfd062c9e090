"""The few-shot procedure: a linear classifier on first- and second-order statistics of a frozen network.

1. Compute the features of the frozen network once per image.
2. Cross-validate heads, taps and regularization, and choose one. With several networks, do so for each.
3. Fit the chosen head to all training images. The reported score stays the cross-validated one, or that of a
   held-out folder.

The only checkpoints are those of the finished run. Letters: N images, K classes.
"""

import time
from collections.abc import Callable

import numpy as np
import torch

from sopdeploy.data.base import LabeledImages, PreprocessedDataset, Split, derive_seed
from sopdeploy.data.image_files import unreadable_images_error
from sopdeploy.data.near import connect
from sopdeploy.decision import Decision, sigmoid
from sopdeploy.errors import ConfigError, DataError
from sopdeploy.evaluation.decision_fit import fit_decision, missing_threshold, predict_unknown
from sopdeploy.evaluation.metrics import Rate
from sopdeploy.evaluation.multi_label import fit_presence
from sopdeploy.evaluation.prediction import HeldOutMetrics, held_out_metrics, predict_logits
from sopdeploy.layers.normalize import Normalize
from sopdeploy.models.registry import entry
from sopdeploy.models.second_order_head import head_name
from sopdeploy.training.callbacks import Callback
from sopdeploy.training.diagnostics import EpochRow
from sopdeploy.training.few_shot.candidates import Network, list_heads, other_recipe
from sopdeploy.training.few_shot.classifier import GRID, Array, Indices, Targets
from sopdeploy.training.few_shot.config import FewShotConfig, FewShotResult
from sopdeploy.training.few_shot.estimates import choose, compose, estimate
from sopdeploy.training.few_shot.selection import propose
from sopdeploy.training.few_shot.unknown import recognize_unknown
from sopdeploy.training.procedure import Procedure, Proposal
from sopdeploy.training.recipe import Recipe
from sopdeploy.training.run import Position, Run
from sopdeploy.training.run_folder import RunFolder
from sopdeploy.training.signals import StopRequested, TrainingStoppedError, handle_signals
from sopdeploy.training.start_weights import create_initial_model


class FewShot(Procedure):
    """Choose a linear classifier on features of the frozen network by cross-validation."""

    def __init__(self, config: FewShotConfig) -> None:
        self.config = config

    def training_data(self, recipe: Recipe, data: Split) -> Split:
        """Use all images: cross-validation replaces a hold-out.

        Raises `ConfigError` if the procedure has no head for the network of *recipe*, which has training-only
        parts other than the branches of DSoP.
        """
        entry(head_name(recipe.model.name))
        return data

    def propose(self, recipe: Recipe, data: Split, max_minutes: float) -> Proposal:
        """Decide by the number of images, the predicted time and memory; see `selection.propose`."""
        return propose(recipe, data, max_minutes)

    def fit(self, run: Run, data: Split, folder: RunFolder, callback: Callback) -> FewShotResult:
        """Run the procedure on the training images of *data* and write `best.pt`, `last.pt` and the history.

        A finished run is not trained again. The decision is fitted to the out-of-fold predictions. Held-out
        images, if there are any, are used only for the score. Raises `ConfigError` for several processes, an
        average or a teacher, `TrainingStoppedError` after a stop signal, and `DataError` for images that
        cannot be used.
        """
        if run.strategy.world > 1 or run.ema is not None or run.teacher is not None:
            raise ConfigError(
                "procedure few_shot: needs one process; start it without torchrun, and remove the tables ema "
                "and teacher"
            )
        if isinstance(run.result, FewShotResult):
            result = _fit_decision(run, data.train, run.result)  # with another `rejection.accepts`
            run.strategy.save(folder.best, run.checkpoint(resumable=False))
            return result
        since = time.monotonic()
        with handle_signals(run.strategy) as signals:

            def on_progress(step: str, done: int, total: int) -> None:
                callback.on_stage(name=step, done=done, total=total)
                signals.exchange()

            try:
                targets, result, logits_NK = self._choose_and_fit(run, data.train, on_progress)
                result, metrics = self._evaluate(run, data, logits_NK, result)
            except StopRequested as stop:
                raise TrainingStoppedError(
                    "stopped before the first checkpoint; start the same command again", stop.signal_number
                ) from None
            except DataError as error:
                raise unreadable_images_error(error, data.train, data.held_out) from None
        result = _fit_decision(run, data.train, result)
        seconds, lr = time.monotonic() - since, run.recipe.optimizer.lr
        loss = float((targets.losses(logits_NK) / targets.weights).mean())  # all images have equal weights
        row = EpochRow(epoch=1, lr=lr, losses={"loss": loss}, metrics=metrics, seconds=seconds)
        run.position = Position(epoch=1, seconds=seconds, history=(row,))
        folder.save_last(run)
        folder.save_derived_files(run)
        callback.on_epoch_end(row)
        return result

    def _choose_and_fit(
        self, run: Run, images: LabeledImages, on_progress: Callable[[str, int, int], None]
    ) -> tuple[Targets, FewShotResult, Array]:
        """Choose a head for *images*, fit it, and give *run* the network and the out-of-fold logits.

        *on_progress* receives (step, done, total). Returns the targets of *images*, the result and the logits
        (N, K). Raises `ConfigError` if a network has no linear classifier, `DataError` if all images have the
        same pixels.
        """
        targets = Targets.of(images)
        networks, groups_N, folds_N = self._compare_heads(run, images, targets, on_progress)
        losses = [[candidate.losses for candidate in network.candidates] for network in networks]
        logits = [[candidate.logits for candidate in network.candidates] for network in networks]
        choice = choose(losses, np.arange(len(images)), groups_N)
        cross_validated_NK = compose(losses, logits, folds_N, groups_N)
        network = networks[choice.network]
        chosen, strength = network.candidates[choice.candidate], GRID[choice.strength]
        on_progress("heads without one class", 0, 1)
        since = time.monotonic()
        aurocs, distance_weight = recognize_unknown(
            chosen.problem, folds_N, strength, with_distance=chosen.head.kind != "gap"
        )
        candidates = [candidate for compared in networks for candidate in compared.candidates]
        seconds = {
            "features": sum(compared.seconds for compared in networks),
            "choice": sum(candidate.result.seconds for candidate in candidates),
            "unknown images": time.monotonic() - since,
        }
        reason = "its loss is smaller than that of the default head by more than two standard errors"
        if choice.candidate == 0:
            reason = "the default head; no other has a clearly smaller loss (two standard errors)"
        if len(networks) > 1:
            reason += "; of the networks, it has the smallest loss"
        score = estimate(targets, cross_validated_NK, run.recipe.seed, groups_N, int(folds_N.max()) + 1)
        names = [images.identity(index) for index in range(len(images))]
        group_counts = targets.group_counts(groups_N)
        result = FewShotResult(
            **{"top1" if isinstance(score, Rate) else "map": score},
            estimated_on="cross-validation",
            class_counts=dict(
                zip(images.labels, targets.classes.sum(axis=0).astype(int).tolist(), strict=True)
            ),
            balanced=targets.balanced,
            num_duplicates=len(images) - len(set(network.hashes)),
            num_groups=int(groups_N.max()) + 1,
            one_group=tuple(np.asarray(images.labels)[group_counts == 1].tolist()),
            contradictions=tuple(
                " = ".join(names[index] for index in group) for group in targets.contradictions(groups_N)
            ),
            candidates=tuple(
                candidate.result.model_copy(update={"kept": candidate is chosen}) for candidate in candidates
            ),
            choice=f"{network.describe(chosen.head)}, {reason}",
            auroc=aurocs,
            seconds={step: round(value, 3) for step, value in seconds.items()},
        )
        model = network.build(chosen, chosen.problem.fit_all(strength), distance_weight)
        run.recipe = run.recipe.model_copy(update={"preprocess": network.recipe.preprocess})
        run.normalize = Normalize(run.recipe.preprocess).to(run.strategy.device)
        run.replace_model(head_name(network.recipe.model.name), model)
        logits_NK = cross_validated_NK - distance_weight * chosen.problem.distances(folds_N)[:, None]
        run.state = {"out_of_fold": torch.from_numpy(logits_NK), "groups": torch.from_numpy(groups_N)}
        if targets.activation == "softmax":
            doubted_NK = chosen.problem.doubt_labels(cross_validated_NK, folds_N, strength)
            run.state["label_logits"] = torch.from_numpy(doubted_NK)
        return targets, result, logits_NK

    def _compare_heads(
        self,
        run: Run,
        images: LabeledImages,
        targets: Targets,
        on_progress: Callable[[str, int, int], None],
    ) -> tuple[list[Network], Indices, Indices]:
        """Cross-validate the heads of all networks; return the networks, the groups (N,) and the folds (N,).

        The groups are those of the features of the first network.
        """
        strategy, compared = run.strategy, [(run.model, run.recipe)]
        for text in self.config.models:
            model, recipe, _ = create_initial_model(other_recipe(run.recipe, text), images.labels, strategy)
            compared.append((model, recipe))
        networks: list[Network] = []
        count = len(images)
        total = 2 * count * len(compared)  # the heads of a network take at most as much time as its features
        starts = range(0, total, 2 * count)
        for start, (model, recipe) in zip(starts, compared, strict=True):
            name = recipe.model.name

            def features_done(done: int, _count: int, name: str = name, start: int = start) -> None:
                on_progress(f"features of {name}", start + done, total)

            network = Network(recipe, model.to(strategy.device), images, features_done)
            networks.append(network)
            if network is networks[0]:
                pairs = network.find_copies(images) if self.config.group_copies else np.zeros((2, 0), np.intp)
                groups_N = connect(len(images), pairs, network.hashes, images.groups)
                _, first_G = np.unique(groups_N, return_index=True)  # the first image of each group
                keys_N = np.asarray(network.hashes)[first_G][groups_N]
                folds_N = targets.folds(keys_N.tolist(), self.config.folds, derive_seed(recipe.seed, "folds"))
            heads = list_heads(network.full, self.config)
            for place, head in enumerate(heads):
                on_progress(f"cross-validation of {name}", start + count + count * place // len(heads), total)
                network.cross_validate(head, targets, folds_N, groups_N)
        return networks, groups_N, folds_N

    def _evaluate(
        self, run: Run, data: Split, out_of_fold_NK: Array, result: FewShotResult
    ) -> tuple[FewShotResult, HeldOutMetrics]:
        """Compute the metrics on the held-out images; without such images, those of the out-of-fold logits.

        With held-out images, their score replaces the cross-validated score in the returned *result*.
        """
        recipe, images = run.recipe, data.held_out
        if not len(images):
            return result, held_out_metrics(run.labels, out_of_fold_NK, data.train.targets)
        logits_NK, targets = predict_logits(
            run.model.eval(),
            PreprocessedDataset(images, recipe.preprocess),
            recipe.preprocess,
            batch_size=recipe.batch_size,
            workers=recipe.workers,
        )
        groups_N = np.arange(len(images)) if images.groups is None else images.groups
        score = estimate(Targets.of(images), logits_NK, recipe.seed, groups_N)
        field = "top1" if isinstance(score, Rate) else "map"
        result = result.model_copy(update={field: score, "estimated_on": "held-out"})
        return result, held_out_metrics(run.labels, logits_NK, targets)


def _fit_decision(run: Run, images: LabeledImages, result: FewShotResult) -> FewShotResult:
    """Fit `run.decision` to the out-of-fold logits of *images*; the result says why it has no threshold."""
    logits, groups = run.state["out_of_fold"].double().numpy(), run.state["groups"].numpy()
    accepts = run.recipe.rejection.accepts
    if run.activation == "sigmoid":
        run.decision = fit_presence(images.targets.astype(np.float64), sigmoid(logits))
    else:
        reason = missing_threshold(result.num_groups, logits.shape[1], accepts)
        result = result.model_copy(update={"unknown": reason})
        decision = fit_decision(
            logits,
            images.targets.astype(np.int64),
            estimated_on="cross-validation",
            accepts=accepts,
            scalable=False,  # heads that saw fewer images are less certain than the final one
            refitted=result.auroc,
            groups=groups,
            unknown=predict_unknown(
                run.model,
                run.recipe.rejection.unknown,
                run.recipe.preprocess,
                batch_size=run.recipe.batch_size,
                workers=run.recipe.workers,
            ),
        )
        run.decision = None if decision == Decision() else decision
    run.result = result
    return result
