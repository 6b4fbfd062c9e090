"""The few-shot procedure: a linear classifier on first- and second-order statistics of a frozen network.

1. Compute the features of the frozen network once per image.
2. Cross-validate heads, taps and regularization, and choose one. With several networks, do so for each.
3. Fit the chosen head to all training images. The reported score stays the cross-validated one, or that of a
   held-out folder.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from sopdeploy.data.base import LabeledImages, Split, derive_seed
from sopdeploy.data.image_files import ImageFiles
from sopdeploy.errors import ConfigError
from sopdeploy.evaluation.metrics import Rate
from sopdeploy.files import expand_user
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.models.base import Classifier, is_in
from sopdeploy.models.registry import create_model, entry, with_head
from sopdeploy.models.second_order_head import POOLED_HEAD, HeadConfig, SecondOrderHead, head_name
from sopdeploy.models.stats import tally
from sopdeploy.training.distributed.strategy import Strategy
from sopdeploy.training.few_shot.classifier import GRID, Array, Problem, Targets
from sopdeploy.training.few_shot.config import FEATURES_FILE, CandidateResult, FewShotConfig, FewShotResult
from sopdeploy.training.few_shot.estimates import choose, compose, estimate
from sopdeploy.training.few_shot.features import Features, compute_features
from sopdeploy.training.few_shot.unknown import recognize_unknown
from sopdeploy.training.fine_tuning import StartConfig
from sopdeploy.training.recipe import ModelConfig, Recipe
from sopdeploy.training.start_weights import create_initial_model

WIDTH, TAPS = 64, 2  # channels of the covariances, and number of feature maps
TIMED_IMAGES = 5
Progress = Callable[[str, int, int], None]  # name of the step, done, total


@dataclass(frozen=True, slots=True)
class Outcome:
    """The trained network, its `name` in the catalog, the recipe with its preprocessing, and its estimates.

    `logits` (N, K) are the out-of-fold logits of the training images, `targets` their targets, and `loss` is
    their mean loss.
    """

    name: str
    model: Classifier
    recipe: Recipe
    logits: Array
    targets: Targets
    result: FewShotResult
    loss: float


class Candidate(NamedTuple):
    """A head, its problem, its out-of-fold logits (G, N, K) and losses (G, N), and seconds."""

    head: HeadConfig
    problem: Problem
    logits: Array
    losses: Array
    seconds: float


@dataclass(frozen=True, slots=True)
class Network:
    """A network, its copy `full` with all statistics, its features and candidates."""

    model: Classifier
    recipe: Recipe
    full: SecondOrderHead
    features: Features
    candidates: list[Candidate] = field(default_factory=list)

    def columns(self, head: HeadConfig) -> list[slice]:
        """Find the columns of the vector of `full` that *head* reads, by statistic and tap."""
        pooled = self.full.pooled_head
        roots = {tap: pooled.pooling(tap).out_features for tap in pooled.channels if pooled.poolings}
        rest = pooled.fc.in_features - sum(roots.values())
        own = rest - sum(pooled.channels.values())
        parts = [("gap", "", own), *(("mean", tap, length) for tap, length in pooled.channels.items())]
        parts += [("isqrt", tap, length) for tap, length in roots.items()]
        ends = np.cumsum([length for _, _, length in parts]).tolist()
        return [
            slice(end - length, end)
            for (part, tap, length), end in zip(parts, ends, strict=True)
            if part in head.parts and (part == "gap" or tap in (head.taps or ()))
        ]

    def cross_validate(self, head: HeadConfig, targets: Targets, folds_N: Any) -> None:
        """Cross-validate *head* and add it to the candidates."""
        since = time.monotonic()
        problem = Problem.create([self.features.vectors[:, part] for part in self.columns(head)], targets)
        logits = problem.cross_validate(folds_N)
        seconds = time.monotonic() - since
        self.candidates.append(Candidate(head, problem, logits, targets.losses(logits), seconds))

    def describe(self, head: HeadConfig) -> str:
        """Describe the network with *head* in a few words."""
        return f"{self.recipe.model.name} {head.kind}" + (f" of {', '.join(head.taps)}" if head.taps else "")

    def results(self, targets: Targets, kept: Candidate, seed: int) -> list[CandidateResult]:
        """Describe all candidates; *kept* was chosen."""
        counts, milliseconds = tally(self.full, self.recipe.preprocess.crop), self._milliseconds()
        found = []
        for one in self.candidates:
            best, taps = int(one.losses.mean(axis=1).argmin()), one.head.taps or ()
            roots = [f"{POOLED_HEAD}.poolings.{tap.replace('.', '_')}" for tap in taps]
            macs, parameters = (
                sum(n for name, n in part.items() if is_in(name, *roots) or not is_in(name, POOLED_HEAD))
                for part in (counts.macs, counts.parameters)
            )
            features, classes = one.problem.basis.shape[0], self.full.num_classes
            result = CandidateResult(
                name=self.describe(one.head),
                kept=one is kept,
                pareto=False,
                score=estimate(targets, one.logits[best], seed),
                loss=float(one.losses[best].mean()),
                features=features,
                strength=GRID[best],
                macs=macs + features * classes,
                parameters=parameters + (features + 1) * classes,
                milliseconds=milliseconds,
                seconds=round(one.seconds, 3),
            )
            found.append(result)
        return found

    @torch.no_grad()
    def _milliseconds(self) -> float:
        """Measure the median time of one image with all statistics."""
        side, device = self.recipe.preprocess.crop, next(self.full.parameters()).device
        image, times = torch.zeros(1, 3, side, side, device=device), []
        for _ in range(TIMED_IMAGES):
            since = time.perf_counter()
            self.full(image).cpu()
            times.append(1000 * (time.perf_counter() - since))
        return round(statistics.median(times), 2)

    def build(self, kept: Candidate, strength: float, weight: float) -> tuple[str, Classifier]:
        """Fit *kept* to all images; return the name in the catalog and the network with this head.

        *weight* is that of the distance in the logits. With the network's own vector, the result is the plain
        network.
        """
        everything = np.arange(len(self.features.keys))
        fitted = kept.problem.linear(kept.problem.fit(everything, strength))
        name = self.recipe.model.name
        plain = name.removeprefix("dsop-")
        final = with_head(name, self.model, kept.head.model_copy(update={"distance": weight > 0}))
        assert isinstance(final, SecondOrderHead)  # noqa: S101  # head:NAME
        pooled, weights = final.pooled_head, fitted.weight
        for tap in pooled.channels if pooled.poolings else ():
            pooled.pooling(tap).load_state_dict(self.full.pooled_head.pooling(tap).state_dict())
        if weight > 0:
            pooled.center.copy_(torch.from_numpy(kept.problem.center))
            pooled.scale.copy_(torch.from_numpy(kept.problem.scale))
            weights = np.concatenate([weights, np.full((len(weights), 1), -weight)], axis=1)
        name, model, layer = head_name(name), final, pooled.fc
        if kept.head.kind == "gap" and (found := self._plain(plain)) is not None:
            name, model, layer = plain, *found
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(weights))
            layer.bias.copy_(torch.from_numpy(fitted.bias))
        return name, model.eval()

    def _plain(self, name: str) -> tuple[Any, torch.nn.Linear] | None:
        """Build the network *name* without branches, and find its linear layer; `None` without one."""
        fields = entry(name).config.model_fields
        options = {key: value for key, value in self.model.config.model_dump().items() if key in fields}
        plain = create_model(name, num_classes=self.model.num_classes, **options)
        own = plain.state_dict()
        plain.load_state_dict({**own, **{k: v for k, v in self.model.state_dict().items() if k in own}})
        layer = plain.logits_layer()
        if layer is None or layer.in_features != self.columns(HeadConfig(kind="gap"))[0].stop:
            return None
        return plain.to(next(self.model.parameters()).device), layer


def select_split(recipe: Recipe, data: Split) -> tuple[Split, bool]:
    """Return the images to train on, and whether the few-shot procedure applies to them.

    Images that were split off the training images are trained on, too, because cross-validation on all
    images is more precise. A held-out folder of the user is used only for the score. The training loop trains
    networks with training-only parts other than the branches of DSoP.
    """
    config = recipe.few_shot
    if config is None or len(data.train) > config.max_images:
        return data, False
    try:
        entry(head_name(recipe.model.name))
    except ConfigError:
        return data, False
    train, held_out = data.train, data.held_out
    if not (data.divided and isinstance(train, ImageFiles) and isinstance(held_out, ImageFiles)):
        return data, True
    paths = np.concatenate([train.paths, held_out.paths])
    order = np.argsort(paths, kind="stable")
    targets = np.concatenate([train.targets, held_out.targets])
    joined = replace(train, paths=paths[order], targets=targets[order])
    return replace(data, train=joined, held_out=joined.select(np.zeros(len(joined), np.bool_))), True


def fit_few_shot(
    recipe: Recipe, model: Classifier, images: LabeledImages, out: Path, on: Progress, strategy: Strategy
) -> Outcome:
    """Run the procedure for *images*, starting from *model*; features are cached in the folder *out*.

    *on* receives the progress. Raises `ConfigError` if a network has no linear classifier, `DataError` if all
    images have the same pixels.
    """
    config, seed, since = recipe.few_shot or FewShotConfig(), recipe.seed, time.monotonic()
    targets, everything = Targets.of(images, config.balance_above), np.arange(len(images))
    out.mkdir(parents=True, exist_ok=True)
    networks: list[Network] = []
    skipped, seconds, last = [], dict.fromkeys(("features", "choice", "unknown images"), 0.0), since

    def measure(step: str) -> None:
        nonlocal last
        now = time.monotonic()
        seconds[step], last = round(seconds.get(step, 0.0) + now - last, 3), now

    for number, text in enumerate(("", *config.models)):
        changed, built = recipe, model
        if text:
            built, changed, _ = create_initial_model(other_recipe(recipe, text), images.labels, strategy)
        full, name = full_head(changed, built.to(strategy.device)), changed.model.name
        on_image = partial(on, f"features of {name}")
        cache = out / (f"{number}-{FEATURES_FILE}" if number else FEATURES_FILE)
        rules, workers = changed.preprocess, recipe.workers
        features = compute_features(full, images, rules, workers=workers, cache=cache, on_image=on_image)
        networks.append(Network(built, changed, full, features))
        measure("features")
        folds_N = targets.folds(networks[0].features.keys, config.folds, derive_seed(seed, "folds"))
        heads = list_heads(full, config)
        for place, head in enumerate(heads):
            on(f"cross-validation of {name}", place, len(heads))
            if place and config.budget and time.monotonic() - since > config.budget:
                skipped.append(networks[-1].describe(head))
            else:
                networks[-1].cross_validate(head, targets, folds_N)
        measure("choice")
    losses = [[one.losses for one in network.candidates] for network in networks]
    logits = [[one.logits for one in network.candidates] for network in networks]
    chosen, composed = choose(losses, everything), compose(losses, logits, folds_N)
    network = networks[chosen.network]
    kept, strength = network.candidates[chosen.candidate], GRID[chosen.strength]
    on("heads without one class", 0, 1)
    unknown = recognize_unknown(kept.problem, folds_N, strength, with_distance=kept.head.kind != "gap")
    measure("unknown images")
    name, final = network.build(kept, strength, unknown.weight)
    score = estimate(targets, composed, seed)
    result = FewShotResult(
        **{"top1" if isinstance(score, Rate) else "map": score},
        estimated_on="cross-validation",
        class_counts=dict(zip(images.labels, targets.classes.sum(axis=0).astype(int).tolist(), strict=True)),
        balanced=targets.balanced,
        duplicates=len(network.features.keys) - len(set(network.features.keys)),
        candidates=mark_pareto([one for each in networks for one in each.results(targets, kept, seed)]),
        choice=f"{network.describe(kept.head)}, "
        + (
            "the default head; no other has a clearly smaller loss (two standard errors)"
            if chosen.candidate == 0
            else "its loss is smaller than that of the default head by more than two standard errors"
        )
        + ("; of the networks, it has the smallest loss" if len(networks) > 1 else ""),
        skipped=tuple(skipped),
        auroc=unknown.areas,
        seconds=seconds,
    )
    return Outcome(
        name=name,
        model=final,
        recipe=recipe.model_copy(update={"preprocess": network.recipe.preprocess}),
        logits=composed - unknown.weight * kept.problem.distances()[:, None],
        targets=targets,
        result=result,
        loss=float((targets.losses(composed) / targets.weights).mean()),
    )


def other_recipe(recipe: Recipe, text: str) -> Recipe:
    """Change *recipe* to the network of *text*, NAME or NAME=FILE; preprocessing is that of its weights."""
    name, equals, file = text.partition("=")
    start = recipe.start or StartConfig()
    if equals:
        start = start.model_copy(update={"weights": expand_user(Path(file))})
    rules = recipe.preprocess if start.weights == "none" else Preprocess()
    return recipe.model_copy(update={"model": ModelConfig(name=name), "start": start, "preprocess": rules})


def full_head(recipe: Recipe, model: Classifier) -> SecondOrderHead:
    """Give *model* a head with all statistics of its last taps; without feature maps, of its own vector."""
    torch.manual_seed(derive_seed(recipe.seed, "head"))
    taps = tuple(model.tap_channels)[-TAPS:] or None
    try:
        head = HeadConfig(kind="gap+mean+isqrt", taps=taps, width=WIDTH)
        network = with_head(recipe.model.name, model, head)
    except ConfigError as error:
        if not str(error).startswith("head.taps"):
            raise
        network = with_head(recipe.model.name, model, HeadConfig(kind="gap"))
    assert isinstance(network, SecondOrderHead)  # noqa: S101  # head:NAME
    return network.eval()


def list_heads(full: SecondOrderHead, config: FewShotConfig) -> list[HeadConfig]:
    """List the heads to compare, the default one first.

    The means of the feature maps are compared only if the vector of the network is not their mean already.
    """
    taps, kinds = tuple(full.pooled_head.channels), config.heads
    if not taps:
        return [HeadConfig(kind="gap")]
    if not kinds:
        kinds = ("gap+isqrt", "gap") if full.averages_last_map else ("gap+isqrt", "gap+mean+isqrt", "gap")
    return [
        HeadConfig(kind=kind, taps=some, width=WIDTH)
        for kind in kinds
        for some in ((None,) if kind == "gap" else dict.fromkeys((taps, taps[-1:])))
    ]


def mark_pareto(candidates: Sequence[CandidateResult]) -> tuple[CandidateResult, ...]:
    """Mark the candidates that no other one beats in accuracy, latency and size."""

    def cost(one: CandidateResult) -> tuple[float, float, int]:
        return -one.score.share, one.milliseconds, one.parameters

    def is_beaten(one: CandidateResult) -> bool:
        return any(
            all(a <= b for a, b in zip(cost(other), cost(one), strict=True)) and cost(other) != cost(one)
            for other in candidates
        )

    return tuple(one.model_copy(update={"pareto": not is_beaten(one)}) for one in candidates)
