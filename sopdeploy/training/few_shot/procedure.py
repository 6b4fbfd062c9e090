"""The few-shot procedure: a linear classifier on first- and second-order statistics of a frozen network.

1. Compute the features of the frozen network once per image.
2. Cross-validate heads, taps and regularization, and choose one. With several networks, do so for each.
3. Fit the chosen head to all training images. The reported score stays the cross-validated one, or that of a
   held-out folder.
"""

import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from sopdeploy.data.base import LabeledImages, derive_seed
from sopdeploy.evaluation.metrics import Rate
from sopdeploy.layers.normalize import Normalize
from sopdeploy.models.second_order_head import head_name
from sopdeploy.training.few_shot.candidates import Network, list_heads, mark_pareto, other_recipe
from sopdeploy.training.few_shot.classifier import GRID, Array, Targets
from sopdeploy.training.few_shot.config import FewShotResult
from sopdeploy.training.few_shot.estimates import choose, compose, estimate
from sopdeploy.training.few_shot.unknown import recognize_unknown
from sopdeploy.training.run import Run
from sopdeploy.training.start_weights import create_initial_model

Progress = Callable[[str, int, int], None]  # name of the step, done, total


def fit_few_shot(run: Run, images: LabeledImages, on: Progress) -> tuple[Targets, Array]:
    """Run the procedure for *images*, starting from the model of *run*; *on* receives the progress.

    *run* receives the network, the record and the out-of-fold logits (N, K), which are returned with the
    targets of *images*. Raises `ConfigError` if a network has no linear classifier, `DataError` if all images
    have the same pixels.
    """
    recipe, config = run.recipe, run.recipe.few_shot
    targets, start = Targets.of(images, config.balance_above), time.monotonic()
    networks: list[Network] = []
    skipped: list[str] = []
    for text in ("", *config.models):
        built, changed = run.model, recipe
        if text:
            built, changed, _ = create_initial_model(other_recipe(recipe, text), images.labels, run.strategy)
        name = changed.model.name
        network = Network.create(
            changed, built.to(run.strategy.device), images, partial(on, f"features of {name}")
        )
        networks.append(network)
        folds_N = targets.folds(networks[0].hashes, config.folds, derive_seed(recipe.seed, "folds"))
        heads = list_heads(network.full, config)
        for number, head in enumerate(heads):
            on(f"cross-validation of {name}", number, len(heads))
            if number and config.budget and time.monotonic() - start > config.budget:
                skipped.append(network.describe(head))
            else:
                network.cross_validate(head, targets, folds_N)
    losses = [[candidate.losses for candidate in network.candidates] for network in networks]
    logits = [[candidate.logits for candidate in network.candidates] for network in networks]
    chosen, composed = choose(losses, np.arange(len(images))), compose(losses, logits, folds_N)
    network = networks[chosen.network]
    kept, strength = network.candidates[chosen.candidate], GRID[chosen.strength]
    on("heads without one class", 0, 1)
    chosen_at = time.monotonic()
    unknown = recognize_unknown(kept.problem, folds_N, strength, with_distance=kept.head.kind != "gap")
    seconds = {
        "features": sum(each.seconds for each in networks),
        "choice": sum(candidate.seconds for each in networks for candidate in each.candidates),
        "unknown images": time.monotonic() - chosen_at,
    }
    score = estimate(targets, composed, recipe.seed)
    results = [result for each in networks for result in each.results(targets, kept, recipe.seed)]
    why = "its loss is smaller than that of the default head by more than two standard errors"
    if chosen.candidate == 0:
        why = "the default head; no other has a clearly smaller loss (two standard errors)"
    if len(networks) > 1:
        why += "; of the networks, it has the smallest loss"
    final = network.build(kept, kept.problem.fit_all(strength), unknown.weight)
    run.recipe = recipe.model_copy(update={"preprocess": network.recipe.preprocess})
    run.normalize = Normalize(run.recipe.preprocess).to(run.strategy.device)
    run.replace_model(head_name(network.recipe.model.name), final, final.config.model_dump(mode="json"))
    out_of_fold = composed - unknown.weight * kept.problem.distances()[:, None]
    run.out_of_fold = torch.from_numpy(out_of_fold)
    run.few_shot = FewShotResult(
        **{"top1" if isinstance(score, Rate) else "map": score},
        estimated_on="cross-validation",
        class_counts=dict(zip(images.labels, targets.classes.sum(axis=0).astype(int).tolist(), strict=True)),
        balanced=targets.balanced,
        duplicates=len(images) - len(set(network.hashes)),
        candidates=mark_pareto(results),
        choice=f"{network.describe(kept.head)}, {why}",
        skipped=tuple(skipped),
        auroc=unknown.areas,
        seconds={step: round(value, 3) for step, value in seconds.items()},
    )
    return targets, out_of_fold
