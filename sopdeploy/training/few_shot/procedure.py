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
from sopdeploy.training.few_shot.candidates import Network, list_heads, other_recipe
from sopdeploy.training.few_shot.classifier import GRID, Array, Indices, Targets
from sopdeploy.training.few_shot.config import FewShotResult
from sopdeploy.training.few_shot.estimates import choose, compose, estimate
from sopdeploy.training.few_shot.unknown import recognize_unknown
from sopdeploy.training.run import Run
from sopdeploy.training.start_weights import create_initial_model


def fit_few_shot(run: Run, images: LabeledImages, on: Callable[..., None]) -> tuple[Targets, Array]:
    """Run the procedure for *images*, starting from the model of *run*; *on* receives (step, done, total).

    *run* receives the network, the record and the out-of-fold logits (N, K), which are returned with the
    targets of *images*. Raises `ConfigError` if a network has no linear classifier, `DataError` if all images
    have the same pixels.
    """
    targets = Targets.of(images, run.recipe.few_shot.balance_above)
    networks, folds_N = compare_heads(run, images, targets, on)
    losses = [[candidate.losses for candidate in network.candidates] for network in networks]
    logits = [[candidate.logits for candidate in network.candidates] for network in networks]
    chosen, composed = choose(losses, np.arange(len(images))), compose(losses, logits, folds_N)
    network = networks[chosen.network]
    kept, strength = network.candidates[chosen.candidate], GRID[chosen.strength]
    on("heads without one class", 0, 1)
    since = time.monotonic()
    areas, weight = recognize_unknown(kept.problem, folds_N, strength, with_distance=kept.head.kind != "gap")
    candidates = [candidate for each in networks for candidate in each.candidates]
    seconds = {
        "features": sum(each.seconds for each in networks),
        "choice": sum(candidate.result.seconds for candidate in candidates),
        "unknown images": time.monotonic() - since,
    }
    why = "its loss is smaller than that of the default head by more than two standard errors"
    if chosen.candidate == 0:
        why = "the default head; no other has a clearly smaller loss (two standard errors)"
    if len(networks) > 1:
        why += "; of the networks, it has the smallest loss"
    score = estimate(targets, composed, run.recipe.seed)
    run.few_shot = FewShotResult(
        **{"top1" if isinstance(score, Rate) else "map": score},
        estimated_on="cross-validation",
        class_counts=dict(zip(images.labels, targets.classes.sum(axis=0).astype(int).tolist(), strict=True)),
        balanced=targets.balanced,
        duplicates=len(images) - len(set(network.hashes)),
        candidates=tuple(
            candidate.result.model_copy(update={"kept": candidate is kept}) for candidate in candidates
        ),
        choice=f"{network.describe(kept.head)}, {why}",
        auroc=areas,
        seconds={step: round(value, 3) for step, value in seconds.items()},
    )
    model = network.build(kept, kept.problem.fit_all(strength), weight)
    run.recipe = run.recipe.model_copy(update={"preprocess": network.recipe.preprocess})
    run.normalize = Normalize(run.recipe.preprocess).to(run.strategy.device)
    run.replace_model(head_name(network.recipe.model.name), model, model.config.model_dump(mode="json"))
    out_of_fold = composed - weight * kept.problem.distances(folds_N)[:, None]
    run.out_of_fold = torch.from_numpy(out_of_fold)
    return targets, out_of_fold


def compare_heads(
    run: Run, images: LabeledImages, targets: Targets, on: Callable[..., None]
) -> tuple[list[Network], Indices]:
    """Cross-validate the heads of all networks; return the networks and the folds (N,)."""
    config, strategy = run.recipe.few_shot, run.strategy
    networks: list[Network] = []
    for text in ("", *config.models):
        model, recipe = run.model, run.recipe
        if text:
            model, recipe, _ = create_initial_model(other_recipe(recipe, text), images.labels, strategy)
        name = recipe.model.name
        network = Network(recipe, model.to(strategy.device), images, partial(on, f"features of {name}"))
        networks.append(network)
        folds_N = targets.folds(networks[0].hashes, config.folds, derive_seed(recipe.seed, "folds"))
        heads = list_heads(network.full, config)
        for number, head in enumerate(heads):
            on(f"cross-validation of {name}", number, len(heads))
            network.cross_validate(head, targets, folds_N)
    return networks, folds_N
