"""Choose among networks by accuracy and time: `sopdeploy train --models A,B --within 20ms`.

It asks first whether the start weights can be reached. Each network is then built with random
weights and the head that the few-shot procedure fits, exported, and measured on one thread.
Those that are fast enough are cross-validated with their start weights, so that only these are
downloaded. Without `--models`, the networks are those of `choices.toml`, and one whose weights
cannot be reached is skipped. Of the most accurate one and those that do not differ from it
significantly, the fastest is chosen.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from sopdeploy.bundle.manifest import BatchRange
from sopdeploy.errors import ConfigError, DataError, WeightsError, shorten
from sopdeploy.evaluation.metrics import Rate
from sopdeploy.evaluation.multi_label import MeanPrecision
from sopdeploy.evaluation.statistics import difference_interval
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.models.choices import file_stem
from sopdeploy.models.registry import entry
from sopdeploy.photos.file_checks import leave_out_unreadable
from sopdeploy.photos.photo import LabeledImages, Split
from sopdeploy.training.callback import Callback
from sopdeploy.training.distributed import Strategy, select_device
from sopdeploy.training.few_shot.cross_validation import cross_validate
from sopdeploy.training.few_shot.features import unfitted_network
from sopdeploy.training.head_settings import FeatureSettings, HeadOptions
from sopdeploy.training.recipe import Recipe
from sopdeploy.training.results import NetworkScore
from sopdeploy.training.setup import (
    Given,
    check_count,
    move_to_device,
    open_images,
    select_procedure,
)
from sopdeploy.training.start_weights import (
    WeightSource,
    complete_preprocess,
    create_initial_model,
    create_sized,
    fetch_published,
)
from sopdeploy_export.capture.deployed import INPUT, output_names
from sopdeploy_export.capture.program import capture_any_batch
from sopdeploy_export.lower.to_onnx import lower
from sopdeploy_service.runtime.onnxruntime import CPU, import_onnxruntime, session_options

MIN_ROUNDS = 4  # the first one is not counted
MEASURED_SECONDS = 1.5  # of all rounds together


class Speed(NamedTuple):
    """Processor time of an image, and size of the graph."""

    milliseconds: float
    megabytes: float


class Validated(NamedTuple):
    """The score of a network in cross-validation, on N images.

    `right` (N,) says which images it classifies correctly; None with several classes per image.
    `groups` (N,) are equal for images that count as one.
    """

    score: Rate | MeanPrecision
    right: NDArray[np.bool_] | None
    groups: NDArray[np.int64]


def choose_network(
    configured: Mapping[str, tuple[Recipe, Given]],
    within: float | None,
    callback: Callback,
    *,
    may_skip: bool = False,
) -> tuple[NetworkScore, ...]:
    """Measure and cross-validate networks; `chosen` is the fastest of the best.

    *configured* are the recipes by name, with what is known of each run. Only networks that
    need at most *within* milliseconds for an image are cross-validated; their weights are
    downloaded. With *may_skip*, networks whose weights cannot be reached are skipped. Images that
    turn out to be unreadable are left out from then on. Returns a row for each network, also for
    those that were not cross-validated. The function also sets the threads of torch.

    Raises `ConfigError` if all networks take longer, or if one would not be trained by the
    few-shot procedure, and the errors of `fetch_weights` and `score_network`.
    """
    shared, given = next(iter(configured.values()))  # the recipes differ in the network only
    data, _ = given.images or open_images(shared)
    strategy = Strategy(select_device(shared.device))
    if shared.threads:
        # As in the run, which then finds the features in the cache.
        torch.set_num_threads(shared.threads)
    recipes = select_procedures(configured, data)
    # Weights that cannot be reached are an error before the measurements.
    reachable = fetch_weights(recipes, callback, may_skip=may_skip, download=False)
    speeds = measure_networks(recipes, len(data.train.labels), callback)

    # Only networks that are fast enough and whose weights can be had are validated: this takes
    # minutes.
    fast = [
        name for name, speed in speeds.items() if within is None or speed.milliseconds <= within
    ]
    if not fast:
        name, speed = min(speeds.items(), key=lambda pair: pair[1].milliseconds)
        fastest = f"the fastest is {name} with {speed.milliseconds:.1f} ms"
        raise ConfigError(
            f"no network needs at most {within:g} ms; {fastest}", setting="within"
        )

    candidates = {name: recipes[name] for name in fast if name in reachable}
    if not candidates:
        raise WeightsError(
            f"the weights of {shorten(fast)}, which are fast enough, cannot be reached"
        )

    # Cross-validate each; the features stay in the cache for the run with the chosen network.
    validated = {}
    for name in fetch_weights(candidates, callback, may_skip=may_skip):
        weights = configured[name][1].weights
        score = partial(score_network, recipes[name], weights, strategy, callback)
        try:
            validated[name] = score(data.train)
        except DataError as error:
            # Perhaps of an image that cannot be read; otherwise, this raises the error again.
            data = leave_out_unreadable(data, error)
            validated[name] = score(data.train)

    # Of the most accurate network and those that are not significantly worse, the fastest.
    best = max(validated.values(), key=lambda network: network.score.value)
    as_good = [
        name
        for name, network in validated.items()
        if not is_significantly_better(best, network)
    ]
    chosen = min(as_good, key=lambda name: speeds[name].milliseconds)

    rows = []
    for name, speed in speeds.items():
        is_validated = name in validated  # each fast one that has its weights
        row = NetworkScore(
            name=name,
            **speed._asdict(),
            score=validated[name].score if is_validated else None,
            has_weights=is_validated or name not in fast,
            chosen=name == chosen,
        )
        rows.append(row)

    return tuple(rows)


def select_procedures(
    configured: Mapping[str, tuple[Recipe, Given]], data: Split
) -> dict[str, Recipe]:
    """Return the recipes with the procedure for *data*.

    Raises `ConfigError` for a network that cannot be cross-validated: all its weights are
    random, or another procedure than the few-shot one trains it.
    """
    count = len(data.train)
    recipes = {
        name: select_procedure(recipe, count).recipe for name, (recipe, _) in configured.items()
    }

    for name, recipe in recipes.items():
        if recipe.starts_random or not isinstance(recipe.procedure, HeadOptions):
            reason = (
                f"the procedure {recipe.procedure.kind} trains it, without cross-validation"
            )
            if recipe.starts_random:
                reason = "all its weights are random, so there is nothing to cross-validate yet"
            advice = "choose a network with --set model.name"
            raise ConfigError(f"{name}: {reason}; {advice}", setting="models")
        recipe.check_effect(configured[name][1].keys, holds_out=not len(data.held_out))

    return recipes


def measure_networks(
    recipes: Mapping[str, Recipe], num_classes: int, callback: Callback
) -> dict[str, Speed]:
    """Export the network of each of *recipes* with random weights; measure its size and time for an image."""
    onnxruntime = import_onnxruntime()
    graphs: dict[str, bytes] = {}
    images: dict[str, NDArray[np.uint8]] = {}

    # Random weights take as long as trained ones, so no weights are needed to measure the time.
    for number, (name, recipe) in enumerate(recipes.items()):
        callback.on_stage(name=f"time of {name}", done=number, total=len(recipes))
        graphs[name], images[name] = _export_unfitted(recipe, num_classes)

    def run_alternately() -> dict[str, list[float]]:
        """Measure all graphs in sessions of one thread."""
        options = session_options(onnxruntime, 1, CPU)
        # Random weights can give denormal numbers, which a processor computes slowly.
        options.add_session_config_entry("session.set_denormal_as_zero", "1")
        sessions = {
            name: onnxruntime.InferenceSession(graph, options, [CPU])
            for name, graph in graphs.items()
        }
        runs = {
            name: partial(session.run, None, {INPUT: images[name]})
            for name, session in sessions.items()
        }
        return _measure_alternately(runs)

    # `set_denormal_as_zero` changes the floating-point mode of the thread, so the sessions have
    # their own.
    with ThreadPoolExecutor(1) as thread:
        times = thread.submit(run_alternately).result()
    return {
        name: Speed(1000 * statistics.median(times[name]), megabytes=len(graph) / 1e6)
        for name, graph in graphs.items()
    }


def _export_unfitted(recipe: Recipe, num_classes: int) -> tuple[bytes, NDArray[np.uint8]]:
    """Export the network of *recipe* with random weights to ONNX; return the file and an image of noise."""
    side = entry(recipe.model.name).image_size
    preprocess = complete_preprocess(recipe, Preprocess(resize=side, crop=side)).preprocess

    model = create_sized(recipe, num_classes, tensors={})  # no start weights decide its size
    network = unfitted_network(recipe, recipe.head_options.head, model)
    program = capture_any_batch(network, preprocess, BatchRange())
    graph: bytes = lower(program, output_names(network)).SerializeToString()
    shape = (1, preprocess.crop, preprocess.crop, 3)
    return graph, np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def fetch_weights(
    recipes: Mapping[str, Recipe], callback: Callback, *, may_skip: bool, download: bool = True
) -> list[str]:
    """Fetch the published start weights of *recipes*; return the names of the networks that have their weights.

    Networks with other start weights, such as a file, count as having them. Without *download*,
    only ask whether the weights can be fetched. Weights that cannot be fetched raise
    `WeightsError`. With *may_skip*, their networks are left out instead, and a warning names
    them; then, `WeightsError` is raised if no network remains.
    """
    problems: dict[str, WeightsError] = {}

    for number, (name, recipe) in enumerate(recipes.items()):
        if recipe.start is not None and recipe.start.weights == "imagenet":
            callback.on_stage(name=f"weights of {name}", done=number, total=len(recipes))
            try:
                fetch_published(recipe.model, download=download)
            except WeightsError as error:
                if not may_skip:
                    raise
                problems[name] = error

    if not problems:
        return list(recipes)

    # With *may_skip*, some networks must remain.
    first = next(iter(problems.values())).message
    if len(problems) == len(recipes):
        advice = (
            f"put files named like {file_stem(next(iter(recipes)))}.safetensors into a folder"
        )
        message = f"no weights of {shorten(list(problems))} can be reached ({first}); {advice}"
        raise WeightsError(message, remedies={"weights": "FOLDER"})

    callback.on_warning(
        f"skipped, because their weights cannot be reached: {', '.join(problems)} ({first})"
    )
    return [name for name in recipes if name not in problems]


def score_network(
    recipe: Recipe,
    weights: WeightSource | None,
    strategy: Strategy,
    callback: Callback,
    images: LabeledImages,
) -> Validated:
    """Cross-validate the network of *recipe* on *images*; a cache keeps their features for a later run."""
    check_count(images)

    model, configured, _ = create_initial_model(recipe, images.labels, strategy, weights)
    validation = cross_validate(
        configured.part(FeatureSettings),
        configured.head_options,
        move_to_device(configured, model, strategy),
        images,
        lambda step, done, total: callback.on_stage(name=step, done=done, total=total),
        groups_by_name=configured.groups_by_name,
    )
    score = validation.score()
    if score is None:
        raise DataError(
            "networks cannot be compared: fewer than two classes have two different photos"
        )

    # With one class per image, a prediction is either right or wrong. `shifted_logits` are those
    # of the exported network, with the shift of each class.
    right = None
    if not images.is_multi_label:
        right = validation.shifted_logits.argmax(axis=1) == images.targets
    return Validated(score, right, validation.groups)


def is_significantly_better(best: Validated, other: Validated) -> bool:
    """Tell whether *best* is significantly better than *other*.

    With one class per image, the interval of their difference must be above 0; otherwise, the
    score of *other* must be below the interval of *best*.
    """
    if best.right is None or other.right is None:
        return other.score.value < best.score.low
    first_G = np.unique(best.groups, return_index=True)[1]  # the first image of each group
    best_right = best.right[first_G]
    other_right = other.right[first_G]
    wins = int((best_right & ~other_right).sum())
    losses = int((other_right & ~best_right).sum())
    return difference_interval(wins, losses, len(first_G)).low > 0


def _measure_alternately(runs: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Measure the processor seconds of *runs* in rounds, in which each runs once; the first is not counted."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    end = time.process_time() + MEASURED_SECONDS
    rounds = 0

    while rounds < MIN_ROUNDS or time.process_time() < end:
        rounds += 1
        for name, run in runs.items():
            began = time.process_time()
            run()
            times[name].append(time.process_time() - began)

    return {name: seconds[1:] for name, seconds in times.items()}
