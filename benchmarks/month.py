"""A month of use: from the first labels to the last promotion, with the product's rules and a hidden test.

    python benchmarks/month.py --data DIR --unknown DIR --weights FILE [--new CLASS] [--seed 0] [--json]

--data is a folder of photographs, <class>/*.jpg, --unknown one of other things. The world sends 220
photographs a day, two of each object, a tenth of them other things. From day 8 on, a quarter shows the class
--new, which nobody has trained; from day 12 on, a lamp is at 60 %; from day 20 on, the first class is
missing. 45 % of the photographs of each class are a hidden test, of which the accuracy of a day's mix is
computed.

The operator begins with ten photographs per class and follows what is printed: after an alarm, and each
week, 60 labels (half of the sample, half of what the server keeps, one photograph of each object), `train`,
`promote`; if that is undecided, the labels that it asks for, up to 60. One label in forty is wrong. The
heads are those of `train` on EfficientNet-Lite0, the alarm and the verdict the functions of the server and
of `promote`; there is no server. Answers do not change with the lamp, as was measured; only the measures of
the photographs do. Exit status 1: no alarm on days 8 to 15, more than one alarm on days 1 to 7, or a
live bundle that is not better on the last day than the first bundle.
"""

import argparse
import os
import sys
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from measure import Result, markdown, one_line_errors, report
from numpy.typing import NDArray
from photo_vectors import (
    class_folders,
    draw_photographs,
    fit_draw,
    join_vectors,
    open_network,
    read_batches,
)
from PIL import Image, ImageEnhance

from sopdeploy.decision import log_sum_exp, softmax
from sopdeploy.evaluation.drift import (
    BLOCK,
    Answers,
    Comparison,
    compare_answers,
    measure_image,
)
from sopdeploy.evaluation.permission import TOLERANCE, Bound, Counts, rule_of_all, rule_of_old
from sopdeploy.photos.photo import ImageFiles
from sopdeploy.training.few_shot.classifier import unit_length
from sopdeploy.training.few_shot.run import make_folds
from sopdeploy_service.inference.drift import NUM_BLOCKS, TEST_BLOCKS

Array = NDArray[Any]
DAYS = 28
PER_DAY = 220
FRAMES = 2
FOREIGN = 0.1
NEW_SHARE = 0.25
SAMPLE = 0.2
LOW_MARGIN = 0.2
LABELS = 60
WRONG = 40  # one label in so many
NONE = -1  # class of other things


@dataclass
class Photographs:
    """Vectors (N, D), own length, classes (N,), and measures (N, F) in usual light and under the dim lamp."""

    vectors: Array
    columns: list[slice]
    classes: Array
    usual: Array
    dim: Array
    labels: tuple[str, ...]


def read_photographs(folder: Path, network: Any, fitted: Any = None) -> tuple[Photographs, Any]:
    """Read all photographs below *folder*; the projections are those of *fitted* batches, or its own."""
    labels = class_folders(folder)
    files = [
        (number, path)
        for number, label in enumerate(labels)
        for path in sorted((folder / label).iterdir())
    ]
    names = np.asarray([os.fsencode(path.relative_to(folder)) for _, path in files], np.bytes_)
    classes = np.asarray([number for number, _ in files], np.int64)
    images = ImageFiles(folder, labels, names, classes)
    batches = read_batches(network, images)
    vectors = join_vectors(network, batches, fitted or batches)
    measures: list[list[Array]] = [[], []]
    for index in range(len(images)):
        image = Image.fromarray(np.asarray(images.preprocess(index, network.recipe.preprocess)))
        for of_light, light in zip(measures, (1.0, 0.6), strict=True):
            of_light.append(
                measure_image(np.asarray(ImageEnhance.Brightness(image).enhance(light)))
            )
    usual, dim = (np.stack(of_light) for of_light in measures)
    columns = network.network.pooled_head.columns()
    return Photographs(vectors, columns, classes, usual, dim, labels), batches


class Bundle:
    """A head on *vectors* (n, D) of the *classes* (n,), with the threshold of `known`."""

    def __init__(
        self, photographs: Photographs, chosen: Array, labels: Array, seed: int
    ) -> None:
        # Only the classes that have photographs.
        self.known_classes = np.unique(labels)
        numbers = np.searchsorted(self.known_classes, labels)
        vectors = photographs.vectors[chosen]
        fitted = fit_draw(
            vectors, numbers, photographs.columns, seed, chosen, len(self.known_classes)
        )
        self.head = fitted.problem.fit_all(fitted.scaling)
        self.own = photographs.columns[0]
        self.means = fitted.problem.class_means()
        folds = make_folds(fitted.problem.targets, [str(index) for index in chosen], 5, seed)[0]
        self.threshold = float(np.quantile(fitted.problem.cosines(folds), 0.05))

    def logits(self, vectors: Array) -> Array:
        """Compute the logits (n, K), whose log-sum-exp is the cosine to the nearest class mean."""
        logits = self.head.logits(vectors)
        cosines = (unit_length(vectors[:, self.own]) @ self.means.T).max(axis=1)
        return np.asarray(logits - log_sum_exp(logits)[:, None] + cosines[:, None], np.float32)

    def answers(self, vectors: Array) -> Array:
        """Return the most probable classes (n,)."""
        return np.asarray(self.known_classes[self.logits(vectors).argmax(axis=1)])


@dataclass
class Sent:
    """What a day sent: numbers of photographs (n,), whether they are other things, their measures, the sample."""

    numbers: Array
    is_foreign: Array
    measures: Array
    in_sample: Array


def join(bundle: Bundle, blocks: Iterable[tuple[Array, Array]]) -> Answers:
    """Let *bundle* answer the vectors of *blocks*, and join the answers with the measures."""
    vectors, measures = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
    return Answers.of(bundle.logits(vectors), measures.astype(np.float32))


@dataclass
class Monitor:
    """Reference and window in blocks, as of a server; vectors are kept, so that a new bundle can answer again."""

    num_untested: int = 0
    reference: list[tuple[Array, Array]] = field(default_factory=list)
    window: deque[tuple[Array, Array]] = field(default_factory=lambda: deque(maxlen=NUM_BLOCKS))

    def replace(self) -> None:
        """Make the newest answers the reference, as after a promotion."""
        self.reference = [*self.reference, *self.window][-NUM_BLOCKS:]
        self.window.clear()
        self.num_untested = 0

    def add(
        self, bundle: Bundle, vectors: Array, measures: Array
    ) -> list[dict[str, Comparison]]:
        """Add answers, and return the comparisons of the windows that are due."""
        compared = []
        for start in range(0, len(vectors) - BLOCK + 1, BLOCK):
            block = vectors[start : start + BLOCK], measures[start : start + BLOCK]
            if len(self.reference) < NUM_BLOCKS and not self.window:
                self.reference.append(block)
                continue
            self.window.append(block)
            self.num_untested += 1
            if len(self.window) == NUM_BLOCKS and self.num_untested >= TEST_BLOCKS:
                self.num_untested = 0
                reference = join(bundle, self.reference)
                window = join(bundle, self.window)
                compared.append(compare_answers(reference, window, len(bundle.known_classes)))
        return compared


class World:
    """Photographs that are sent, and a hidden test."""

    def __init__(
        self, photographs: Photographs, foreign: Photographs, new: int, seed: int
    ) -> None:
        self.photographs = photographs
        self.foreign = foreign
        self.new = new
        self.random = np.random.default_rng(seed)
        order = self.random.permutation(len(photographs.classes))
        is_hidden = np.zeros(len(order), np.bool_)
        for label in range(len(photographs.labels)):
            of_class = order[photographs.classes[order] == label]
            is_hidden[of_class[: round(0.45 * len(of_class))]] = True
        self.hidden = np.flatnonzero(is_hidden)
        self.pool = np.flatnonzero(~is_hidden)

    def shares(self, day: int) -> Array:
        """Return the share of each class among the photographs of *day* that show one."""
        shares = np.ones(len(self.photographs.labels))
        shares[self.new] = 0.0
        if day >= 20:
            shares[0 if self.new else 1] = 0.0
        shares /= shares.sum()
        if day >= 8:
            shares *= 1 - NEW_SHARE
            shares[self.new] = NEW_SHARE
        return shares

    def send(self, day: int) -> Sent:
        """Draw the photographs of *day*, in their order."""
        classes = self.photographs.classes
        weights = (
            self.shares(day)
            / np.bincount(classes[self.pool], minlength=len(self.photographs.labels))
        )[classes[self.pool]]
        objects = PER_DAY // FRAMES
        numbers = self.random.choice(self.pool, objects, p=weights / weights.sum())
        is_foreign = self.random.random(objects) < FOREIGN
        numbers[is_foreign] = self.random.integers(
            len(self.foreign.classes), size=int(is_foreign.sum())
        )
        numbers, is_foreign = np.repeat(numbers, FRAMES), np.repeat(is_foreign, FRAMES)
        lights = ("usual", "dim") if day >= 12 else ("usual", "usual")
        measures = np.stack(
            [
                getattr(self.foreign if other else self.photographs, lights[1])[number]
                for number, other in zip(numbers, is_foreign, strict=True)
            ]
        )
        return Sent(numbers, is_foreign, measures, self.random.random(len(numbers)) < SAMPLE)

    def vectors(self, sent: Sent) -> Array:
        """Return the vectors of *sent*; frames of one photograph differ a little."""
        own = self.photographs.vectors[sent.numbers % len(self.photographs.vectors)]
        others = self.foreign.vectors[sent.numbers % len(self.foreign.vectors)]
        vectors = np.where(sent.is_foreign[:, None], others, own)
        return np.asarray(
            vectors + self.random.normal(0, 0.1 * vectors.std(axis=0), vectors.shape),
            np.float32,
        )

    def accuracy(self, bundle: Bundle, day: int) -> float:
        """Compute the accuracy of *bundle* on the hidden test, weighted as the traffic of *day*."""
        targets = self.photographs.classes[self.hidden]
        right = bundle.answers(self.photographs.vectors[self.hidden]) == targets
        per_class = [
            right[targets == label].mean() for label in range(len(self.photographs.labels))
        ]
        return float(np.dot(self.shares(day), per_class))


def permit(
    live: Bundle, new: Bundle, vectors: Array, labels: Array, attempt: int
) -> tuple[str, int]:
    """Return the verdict of `promote` on the held-out photographs, and how many labels it asks for."""
    before = live.answers(vectors) == labels
    after = new.answers(vectors) == labels
    is_old = np.isin(labels, live.known_classes)

    def counts(mask: Array) -> Counts:
        return Counts(
            int(mask.sum()),
            int((after & ~before & mask).sum()),
            int((before & ~after & mask).sum()),
        )

    everything = np.ones(len(labels), np.bool_)
    checks: list[tuple[Counts, Any]] = [(counts(everything), rule_of_all(TOLERANCE, attempt))]
    if not is_old.all():
        checks.append((counts(is_old), rule_of_old(TOLERANCE)))
    bounds: list[Bound] = [rule.bound(one) for one, rule in checks]
    difference, low, limit = (100 * part for part in bounds[0])
    figures = f"{difference:+.1f} (at least {low:+.1f}, limit {limit:+.1f})"
    if all(bound.passes for bound in bounds):
        return f"passes: {figures}", 0
    needed = [
        rule.labels_to_pass(one)
        for (one, rule), bound in zip(checks, bounds, strict=True)
        if not bound.passes
    ]
    return f"undecided: {figures}", max((one or LABELS) for one in needed)


@dataclass
class Month:
    """The state of the operator: labelled photographs, and the bundles."""

    world: World
    seed: int
    chosen: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    held_out: list[tuple[Array, int]] = field(default_factory=list)
    sample: deque[tuple[int, bool, Array]] = field(default_factory=deque)
    kept: deque[tuple[int, bool, Array]] = field(default_factory=deque)
    num_labels: int = 0
    attempt: int = 1

    def label(self, count: int) -> int:
        """Label up to *count* photographs: the sample first, then one of each object that was kept."""
        random = self.world.random
        classes = self.world.photographs.classes
        done = 0
        while done < count and (self.sample or self.kept):
            is_sample = bool(self.sample)
            number, is_foreign, vector = (self.sample or self.kept).popleft()
            if not is_sample and not is_foreign and number in self.chosen:
                continue
            done += 1
            if is_foreign:
                continue
            label = int(classes[number])
            if random.integers(WRONG) == 0:
                label = int(random.integers(len(self.world.photographs.labels)))
            if is_sample:
                self.held_out.append((vector, label))
            else:
                self.chosen.append(number)
                self.labels.append(label)
        self.num_labels += done
        return done

    def train(self) -> Bundle:
        """Train on what is labelled."""
        return Bundle(
            self.world.photographs, np.asarray(self.chosen), np.asarray(self.labels), self.seed
        )


def keep(month: Month, sent: Sent, vectors: Array, live: Bundle) -> None:
    """Put the sample, and what is unknown or close, into the queues of labels."""
    logits = live.logits(vectors)
    largest = np.sort(softmax(logits), axis=1)
    is_close = largest[:, -1] - largest[:, -2] < LOW_MARGIN
    is_worth = is_close | (log_sum_exp(logits) < live.threshold)
    for place, number in enumerate(sent.numbers.tolist()):
        entry = number, bool(sent.is_foreign[place]), vectors[place]
        # The newest of what was kept is labelled first, the sample in its order.
        if sent.in_sample[place]:
            month.sample.append(entry)
        elif is_worth[place] and place % FRAMES == 0:
            month.kept.appendleft(entry)


def promote(month: Month, live: Bundle) -> tuple[Bundle, list[str]]:
    """Label, train and promote as the operator does; return what is live, and the verdicts."""
    month.label(LABELS // 2)
    sample = month.sample
    month.sample = deque()  # the other half from what was kept
    month.label(LABELS // 2)
    month.sample = sample
    candidate = month.train()
    verdicts = []
    for _ in range(3):
        recent = month.held_out[-150:]
        vectors = np.stack([vector for vector, _ in recent])
        labels = np.asarray([label for _, label in recent])
        verdict, needed = permit(live, candidate, vectors, labels, month.attempt)
        verdicts.append(f"{verdict}, {len(recent)} photographs")
        if not needed:
            month.attempt = 1
            return candidate, verdicts
        month.attempt += 1
        if not month.sample or not month.label(min(LABELS, needed, len(month.sample))):
            break
    return live, verdicts


def run_month(world: World, seed: int) -> tuple[list[list[object]], list[str]]:
    """Live through the month; return a row for each day with an event, and what failed."""
    month = Month(world, seed)
    own = draw_photographs(world.photographs.classes[world.pool], 10, world.random)
    first = world.pool[own]
    first = first[world.photographs.classes[first] != world.new]
    month.chosen = first.tolist()
    month.labels = world.photographs.classes[first].tolist()
    live = first_live = month.train()
    monitor = Monitor()
    rows: list[list[object]] = []
    alarms: dict[int, str] = {}
    for day in range(1, DAYS + 1):
        sent = world.send(day)
        vectors = world.vectors(sent)
        keep(month, sent, vectors, live)
        compared = monitor.add(live, vectors, sent.measures)
        causes = sorted(
            {name for one in compared for name, result in one.items() if result.is_alarm}
        )
        if causes:
            alarms[day] = ", ".join(causes)
        verdicts: list[str] = []
        is_first_alarm = bool(causes) and day - 1 not in alarms
        if is_first_alarm or day % 7 == 0:
            before = live
            live, verdicts = promote(month, live)
            if live is not before:
                monitor.replace()
        if day == 1 or causes or verdicts or day == DAYS:
            accuracies = [f"{100 * world.accuracy(one, day):.1f}" for one in (live, first_live)]
            rows.append(
                [day, alarms.get(day, ""), month.num_labels, "; ".join(verdicts), *accuracies]
            )
    failures = []
    if not any(8 <= day <= 15 for day in alarms):
        failures.append("no alarm on days 8 to 15")
    if sum(day < 8 for day in alarms) > 1:
        failures.append("alarms on usual days")
    if float(str(rows[-1][-2])) <= float(str(rows[-1][-1])):
        failures.append("not better than the first bundle")
    return rows, failures


def main(arguments: list[str]) -> int:
    """Run the benchmark and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("data", "unknown", "weights"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--new", help="the new class; by default the last one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    with one_line_errors():
        network = open_network(given.weights)
        photographs, batches = read_photographs(given.data, network)
        foreign, _ = read_photographs(given.unknown, network, batches)
        new = photographs.labels.index(given.new) if given.new else len(photographs.labels) - 1
        rows, failures = run_month(World(photographs, foreign, new, given.seed), given.seed)
    if given.json:
        results = [
            Result(
                case=f"day {day}, {labels} labels",
                against="first bundle",
                ours=float(str(of_live)),
                other=float(str(of_first)),
                unit="%",
                runs=1,
            )
            for day, _, labels, _, of_live, of_first in rows
        ]
        report(results, as_json=True)
    else:
        print(
            markdown(
                ["day", "alarm", "labels", "`promote` says", "accuracy", "first bundle"], rows
            )
        )
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
