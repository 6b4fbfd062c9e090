"""A month of use: from the first labels to the last promotion, with the product's rules and a hidden test.

    python benchmarks/month.py --data DIR --unknown DIR --weights FILE [--cache DIR] [--new CLASS]
        [--days 28] [--seed 0] [--per-day 220] [--largest SHARE] [--reports SHARE] [--json]

--data is a folder of photographs, <class>/*.jpg, --unknown one of other things. The world sends 220
photographs a day, two of each object, a tenth of them other things. From day 8 on, a quarter shows the class
--new, which nobody has trained; from day 15 on, another camera blurs and tints all photographs; from day 20 on,
the first class is missing. With --largest, one class has this share of the others. With --reports, customers
report this share of wrong predictions, which then wait for labels as what the server keeps. 30 % of the
photographs of each class are a hidden test, of which the accuracy of a day's mix is computed. With --cache, the
vectors and measures of the photographs are computed once, which takes most of the time.

The operator begins with ten photographs per class and follows what is printed: when an alarm begins, if the
next bundle does not end it, and each week, 60 labels as `label` asks for them, two fifths of the sample that
decides, as many of the sample that trains, and the others of what the server keeps, `train`, `promote`. During an
alarm, the days since it began come first. If `promote` asks for labels, up to 60 more follow; if the bundle is
worse in a class, this class's labels are corrected; in both cases it is trained again, at most twice. What has
decided about a bundle that is then live trains from then on, but for the newest 60. One label in forty is wrong.
`train` fits the heads on EfficientNet-Lite0. The alarm, the order and the verdict are the functions of the server, of
`label` and of `promote`; there is no server. A fifth of the objects of a day are in the uniform sample.

Accuracies: "new" is the bundle that was offered, "live" the bundle that then answers, "first" the first
bundle, and "all labels" a training with the right labels of all objects that were sent.
Exit status 1: an alarm on days 1 to 7, a change that costs more than 10 points without an alarm within a week, a
lost label, or a live bundle that is not better on the last day than the first bundle.
"""

import argparse
import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from measure import Result, existing, make_parser, markdown, one_line_errors, report
from month_world import CAMERA_DAY, NEW_DAY, PER_DAY, Sent, Traffic, World
from numpy.typing import NDArray
from photo_sets import Bundle, read_sets
from verdicts import decide

from sopdeploy.decision import log_sum_exp, softmax
from sopdeploy.evaluation.drift import BLOCK, Answers, Comparison, compare_answers
from sopdeploy.evaluation.permission import MIN_IMAGES
from sopdeploy.evaluation.watch import News, Watch
from sopdeploy_commands.promotion.decided import KEEP_DECIDING
from sopdeploy_commands.promotion.photographs import MIN_RECENT, RECENT_DAYS
from sopdeploy_service.labelling.keep.keeper import LOW_MARGIN
from sopdeploy_service.labelling.label.order import LABELS_PER_DECIDING, SAMPLE_DAYS

Array = NDArray[Any]
DAYS = 28
LARGE = 10.0  # points of accuracy that a large change costs
LABELS = 60
WRONG = 40  # one label in so many


class Block(NamedTuple):
    """Consecutive answers of a day: their vectors and measures."""

    vectors: Array
    measures: Array
    day: int


def join(bundle: Bundle, blocks: Sequence[Block]) -> Answers:
    """Let *bundle* answer the vectors of *blocks*, and join the answers with the measures."""
    vectors = np.concatenate([block.vectors for block in blocks])
    measures = np.concatenate([block.measures for block in blocks])
    logits = bundle.logits(vectors)
    unknown = (log_sum_exp(logits) < bundle.threshold).astype(np.float32)
    return Answers.of(logits, measures.astype(np.float32), unknown)


@dataclass
class Monitor:
    """The watch of a server; vectors are kept, so that a new bundle can answer again.

    *changed* is the day since which the traffic differs, during an alarm. *alarms* tells after how many
    photographs a comparison was an alarm.
    """

    watch: Watch[Block] = field(default_factory=Watch)
    changed: int | None = None
    num_photographs: int = 0
    alarms: list[int] = field(default_factory=list)

    def replace(self) -> None:
        """Let a new bundle answer the reference again."""
        self.watch.replace(self.watch.reference)

    def add(
        self, bundle: Bundle, blocks: Sequence[Block]
    ) -> tuple[list[Mapping[str, Comparison]], set[News]]:
        """Add answers; return the comparisons of the windows that are due, and the news of an alarm.

        Also counts the photographs.
        """

        def compare(
            reference: Sequence[Block], window: Sequence[Block]
        ) -> Mapping[str, Comparison]:
            return compare_answers(
                join(bundle, reference), join(bundle, window), len(bundle.known_classes)
            )

        compared = []
        told = set[News]()
        for block in blocks:
            self.num_photographs += len(block.vectors)
            if not self.watch.add(block):
                continue
            of_window, news = self.watch.test(compare)
            compared.append(of_window)
            if any(result.is_alarm for result in of_window.values()):
                self.alarms.append(self.num_photographs)

            if news == "begins":
                self.changed = self.watch.window[0].day
            elif news == "ends":
                self.changed = None
            if news is not None:
                told.add(news)
        return compared, told


def blocks_of(sent: Sent, day: int) -> list[Block]:
    """Divide what was *sent* on *day* into the blocks of a server; the rest is left out."""
    starts = range(0, len(sent.vectors) - BLOCK + 1, BLOCK)
    return [
        Block(sent.vectors[start : start + BLOCK], sent.measures[start : start + BLOCK], day)
        for start in starts
    ]


class Waiting(NamedTuple):
    """A kept photograph: its day and object, and its vector."""

    day: int
    number: int
    is_foreign: bool
    vector: Array


@dataclass
class Month:
    """The state of the operator: labelled photographs, what waits for a label, and the day of a change."""

    world: World
    seed: int
    chosen: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    held_out: list[tuple[Waiting, int]] = field(default_factory=list)
    sample: list[Waiting] = field(default_factory=list)
    kept: list[Waiting] = field(default_factory=list)
    num_labels: int = 0
    num_other: int = 0  # labels of other things
    sent: set[int] = field(default_factory=set)
    attempt: int = 1
    changed: int | None = None

    def is_changed(self, photo: Waiting) -> bool:
        """Tell whether *photo* was sent since the traffic has changed."""
        return self.changed is not None and photo.day >= self.changed

    def give_label(self, number: int) -> int:
        """Return the class of the photograph *number*, or by mistake another one."""
        random = self.world.random
        if random.integers(WRONG) == 0:
            return int(random.integers(len(self.world.photographs.labels)))
        return int(self.world.photographs.classes[number])

    def label(self, count: int) -> int:
        """Label up to *count* photographs, two fifths of each sample; return how many decide."""
        of_sample = round(count / LABELS_PER_DECIDING)
        self.label_kept(count - 2 * of_sample)
        self.label_sample(of_sample, decides=False)
        return self.label_sample(of_sample, decides=True)

    def label_sample(self, count: int, *, decides: bool) -> int:
        """Label up to *count* photographs of a sample, of each day in turn; return how many.

        Days since a change come first.
        """
        waiting = self.waiting_for_role(decides=decides)
        since = [photo for photo in waiting if self.is_changed(photo)]
        before = [photo for photo in waiting if not self.is_changed(photo)]
        asked = [*in_turn(since), *in_turn(before)][:count]
        for photo in asked:
            if photo.is_foreign:
                self.num_other += 1
                continue
            label = self.give_label(photo.number)
            if decides:
                self.held_out.append((photo, label))
            else:
                self.chosen.append(photo.number)
                self.labels.append(label)
        numbers = {id(photo) for photo in asked}
        self.sample = [photo for photo in self.sample if id(photo) not in numbers]
        self.num_labels += len(asked)
        return len(asked)

    def waiting_for_role(self, *, decides: bool) -> list[Waiting]:
        """List the photographs of a sample that wait: an object has one role, a photograph one label."""
        num_objects = self.world.photographs.count
        trained = {number % num_objects for number in self.chosen} if decides else set()
        labelled = {*self.chosen, *(photo.number for photo, _ in self.held_out)}
        waiting: dict[tuple[int, bool], Waiting] = {}
        for photo in self.sample:
            number = photo.number % num_objects
            is_free = photo.number not in labelled and number not in trained
            if number % 2 == decides and (photo.is_foreign or is_free):
                waiting.setdefault((photo.number, photo.is_foreign), photo)
        return [*waiting.values()]

    def train_on_decided(self) -> None:
        """Let what has decided train from now on, but for the newest photographs."""
        self.held_out.sort(key=lambda entry: -entry[0].day)
        decided = self.held_out[KEEP_DECIDING:]
        self.chosen += [photo.number for photo, _ in decided]
        self.labels += [label for _, label in decided]
        self.held_out = self.held_out[:KEEP_DECIDING]

    def label_kept(self, count: int) -> None:
        """Label up to *count* photographs that the server kept, one of each object, the newest first."""
        order = list(range(len(self.kept)))[::-1][:count]
        for index in order:
            photo = self.kept[index]
            if not photo.is_foreign:
                self.chosen.append(photo.number)
                self.labels.append(self.give_label(photo.number))
            else:
                self.num_other += 1
        self.num_labels += len(order)
        labelled = {*self.chosen}
        self.kept = [
            photo
            for index, photo in enumerate(self.kept)
            if index not in order and (photo.is_foreign or photo.number not in labelled)
        ]

    def is_no_better(self, live: Bundle, candidate: Bundle) -> bool:
        """Tell whether *candidate* is no better than *live* on enough photographs since a change."""
        since = [entry for entry in self.held_out if self.is_changed(entry[0])]
        if len(since) < MIN_IMAGES:
            return False
        vectors = np.stack([photo.vector for photo, _ in since])
        labels = np.asarray([label for _, label in since])
        right = [int((one.answers(vectors) == labels).sum()) for one in (live, candidate)]
        return right[1] <= right[0]

    def recent(self) -> tuple[Array, Array]:
        """Return the vectors (n, D) and labels (n,) of the held-out photographs that decide in `promote`."""
        newest_first = sorted(self.held_out, key=lambda entry: -entry[0].day)
        since = self.changed or newest_first[0][0].day - RECENT_DAYS
        recent = [
            entry
            for number, entry in enumerate(newest_first)
            if entry[0].day >= since or number < MIN_RECENT
        ]
        vectors = np.stack([photo.vector for photo, _ in recent])
        return vectors, np.asarray([label for _, label in recent])

    @property
    def num_lost(self) -> int:
        """Labels that neither train nor decide, nor are of other things."""
        used = len(self.chosen) - len(self.world.first) + len(self.held_out)
        return self.num_labels - used - self.num_other

    def correct(self, names: Sequence[str]) -> None:
        """Correct the labels of the photographs that are trained as one of the classes *names*."""
        for place, number in enumerate(self.chosen):
            if self.world.photographs.labels[self.labels[place]] in names:
                self.labels[place] = int(self.world.photographs.classes[number])

    def train(self, *, is_first: bool = False) -> Bundle:
        """Train on what is labelled."""
        chosen = np.asarray(self.chosen)
        labels = np.asarray(self.labels)
        return Bundle(self.world.photographs, chosen, labels, self.seed, is_first=is_first)

    def train_on_all(self) -> Bundle:
        """Train on all objects that were sent, with the right labels."""
        chosen = np.asarray(sorted({*self.world.first.tolist(), *self.sent}))
        return Bundle(
            self.world.photographs, chosen, self.world.photographs.classes[chosen], self.seed
        )


def in_turn(photos: Sequence[Waiting]) -> list[Waiting]:
    """Order *photos* as `label` does: each of the newest `SAMPLE_DAYS` has its turn, then the others."""
    of_day: dict[int, list[Waiting]] = {}
    for photo in photos:
        of_day.setdefault(-photo.day, []).append(photo)
    days = [of_day[day] for day in sorted(of_day)]
    ordered = []
    for part in (days[:SAMPLE_DAYS], days[SAMPLE_DAYS:]):
        turns = itertools.zip_longest(*part)
        ordered += [photo for turn in turns for photo in turn if photo is not None]
    return ordered


def keep(month: Month, day: int, sent: Sent, live: Bundle) -> None:
    """Let the sample, and what is unknown, close or reported, wait for labels: of each object one photograph."""
    logits = live.logits(sent.vectors)
    probabilities = np.zeros((len(logits), len(month.world.photographs.labels)))
    probabilities[:, live.known_classes] = softmax(logits)
    largest = np.sort(probabilities, axis=1)
    is_close = largest[:, -1] - largest[:, -2] < LOW_MARGIN
    is_known = log_sum_exp(logits) >= live.threshold
    classes = month.world.photographs.classes[np.where(sent.is_foreign, 0, sent.numbers)]
    is_wrong = live.answers(sent.vectors) != classes
    is_reported = sent.may_report & is_wrong & ~sent.is_foreign
    month.sent |= set(sent.numbers[~sent.is_foreign].tolist())
    kept = {(photo.number, photo.is_foreign) for photo in month.kept} | {
        (number, False) for number in month.chosen
    }
    count = month.world.photographs.count
    deciding = {photo.number % count for photo, _ in month.held_out}
    for number, place in enumerate(range(0, len(logits), month.world.traffic.frames)):
        photo = Waiting(
            day,
            int(sent.numbers[place]),
            bool(sent.is_foreign[place]),
            sent.vectors[place],
        )
        identity = photo.number, photo.is_foreign
        is_free = photo.is_foreign or photo.number % count not in deciding
        if sent.in_sample[number]:
            month.sample.append(photo)
        elif (
            identity not in kept
            and is_free
            and (is_close[place] or not is_known[place] or is_reported[place])
        ):
            month.kept.append(photo)
            kept.add(identity)


def promote(month: Month, live: Bundle) -> tuple[Bundle, Bundle, list[str]]:
    """Label, train and promote as the operator does; return what is live, the new bundle, the verdicts."""
    month.label(LABELS)
    candidate = month.train()
    verdicts = []
    for _ in range(3):
        vectors, labels = month.recent()
        verdict = decide(
            [bundle.answers(vectors) == labels for bundle in (live, candidate)],
            labels,
            np.isin(labels, live.known_classes),
            month.world.photographs.labels,
            attempt=month.attempt,
        )
        verdicts.append(f"{len(labels)} photographs: {verdict.text}")
        if verdict.passes and not month.is_no_better(live, candidate):
            month.attempt = 1
            month.train_on_decided()
            return candidate, candidate, verdicts
        month.attempt += 1
        if verdict.worse:
            month.correct(verdict.worse)
            candidate = month.train()
            continue
        if not verdict.num_labels or not month.label(min(LABELS, verdict.num_labels)):
            break
        candidate = month.train()
    return live, candidate, verdicts


class Day(NamedTuple):
    """A day with an event: its alarms, all labels so far, what `promote` said, and accuracies in percent.

    `new_accuracy` is None on days without a new bundle, which `promote` may have refused.
    `accuracy_of_all`, of a training with all labels, is measured every second week.
    """

    day: int
    alarms: str
    labels: int
    verdicts: str
    new_accuracy: float | None
    accuracy: float
    first_accuracy: float
    accuracy_of_all: float | None = None


@dataclass
class Change:
    """A change of the traffic: its day, what it costs in points, and the photographs that came before it.

    *num_to_alarm* are the photographs until the first alarm after it, None without one. An alarm
    that was on before is 0.
    """

    day: int
    cost: float
    num_before: int
    num_to_alarm: int | None = None


class Lived(NamedTuple):
    """A month: its days with an event, its changes, the comparisons and alarms of quiet days, what failed."""

    rows: list[Day]
    changes: list[Change]
    quiet: tuple[int, int]
    failures: list[str]


def run_month(world: World, seed: int, days: int = DAYS) -> Lived:
    """Live through the month."""
    month = Month(world, seed)
    month.chosen = world.first.tolist()
    month.labels = world.photographs.classes[world.first].tolist()
    live = first_live = month.train(is_first=True)
    monitor = Monitor()
    rows: list[Day] = []
    changes: list[Change] = []
    num_quiet = 0
    for day in range(1, days + 1):
        if day in {NEW_DAY, CAMERA_DAY}:
            changes.append(begin_change(world, live, monitor, day))

        # The traffic, and what the server says about it.
        sent = world.send(day)
        keep(month, day, sent, live)
        compared, news = monitor.add(live, blocks_of(sent, day))
        month.changed = monitor.changed
        if day < NEW_DAY:
            num_quiet += len(compared)
        causes = sorted(
            {name for one in compared for name, result in one.items() if result.is_alarm}
        )

        # What the operator does.
        verdicts: list[str] = []
        new_accuracy = None
        if {"begins", "goes on"} & news or day % 7 == 0:
            before = live
            live, new, verdicts = promote(month, live)
            new_accuracy = 100 * world.accuracy(new, day)
            if live is not before:
                monitor.replace()

        if day in {1, NEW_DAY, CAMERA_DAY, days} or causes or verdicts:
            accuracy_of_all = None
            if day % 14 == 0:
                accuracy_of_all = 100 * world.accuracy(month.train_on_all(), day)
            rows.append(
                Day(
                    day=day,
                    alarms=", ".join(causes),
                    labels=month.num_labels,
                    verdicts=". ".join(verdicts),
                    new_accuracy=new_accuracy,
                    accuracy=100 * world.accuracy(live, day),
                    first_accuracy=100 * world.accuracy(first_live, day),
                    accuracy_of_all=accuracy_of_all,
                )
            )

    find_alarms(changes, monitor.alarms)
    num_alarms = sum(bool(row.alarms) for row in rows if row.day < NEW_DAY)
    return Lived(rows, changes, (num_quiet, num_alarms), find_failures(rows, changes, month))


def begin_change(world: World, live: Bundle, monitor: Monitor, day: int) -> Change:
    """Describe the change of *day* before its photographs come."""
    cost = 100 * (world.accuracy(live, day - 1) - world.accuracy(live, day))
    num_to_alarm = 0 if monitor.watch.is_alarm else None
    return Change(day, cost, monitor.num_photographs, num_to_alarm)


def find_alarms(changes: Sequence[Change], alarms: Sequence[int]) -> None:
    """Find the first of *alarms*, which are numbers of photographs, after each of *changes*."""
    for change in changes:
        after = [number - change.num_before for number in alarms]
        if change.num_to_alarm is None:
            change.num_to_alarm = next((number for number in after if number > 0), None)


def find_failures(rows: Sequence[Day], changes: Sequence[Change], month: Month) -> list[str]:
    """List what a month should not have had."""
    week = 7 * month.world.traffic.per_day
    failures = [
        f"no alarm within a week of day {change.day}"
        for change in changes
        if change.cost > LARGE and (change.num_to_alarm is None or change.num_to_alarm > week)
    ]
    if any(row.alarms for row in rows if row.day < NEW_DAY):
        failures.append("an alarm on usual days")
    if month.num_lost:
        failures.append(f"{month.num_lost} labels are lost")
    if rows[-1].accuracy <= rows[-1].first_accuracy:
        failures.append("not better than the first bundle")
    return failures


def sets_parser(description: str | None) -> argparse.ArgumentParser:
    """Create a parser with the options that say which photographs a world has."""
    parser = make_parser(description)
    parser.add_argument("--unknown", type=existing, required=True, help="other things")
    parser.add_argument("--weights", type=existing, required=True)
    parser.add_argument("--cache", type=Path, help="folder for what was computed")
    return parser


def main(arguments: list[str]) -> int:
    """Run the benchmark and return the exit status."""
    parser = sets_parser(__doc__)
    parser.add_argument("--data", type=existing, required=True)
    parser.add_argument("--new", help="the new class; by default the last one")
    parser.add_argument("--days", type=int, default=DAYS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--per-day", type=int, default=PER_DAY)
    parser.add_argument("--largest", type=float, default=0.0, help="share of a class")
    parser.add_argument("--reports", type=float, default=0.0, help="share of wrong predictions")
    given = parser.parse_args(arguments)
    with one_line_errors():
        photographs, foreign = read_sets(given.data, given.unknown, given.weights, given.cache)
    new = given.new or photographs.labels[-1]
    if new not in photographs.labels:
        parser.error(f"--new: {new} is none of {', '.join(photographs.labels)}")
    traffic = Traffic(per_day=given.per_day, largest=given.largest, reports=given.reports)
    world = World(photographs, foreign, photographs.labels.index(new), given.seed, traffic)
    lived = run_month(world, given.seed, given.days)

    if given.json:
        results = [
            Result(
                case=f"day {row.day}, {row.labels} labels",
                against="first bundle",
                ours=row.accuracy,
                other=row.first_accuracy,
                unit="%",
                runs=1,
            )
            for row in lived.rows
        ]
        report(results, as_json=True)
    else:
        head = [
            "day",
            "alarm",
            "labels",
            "`promote` says",
            "new",
            "live",
            "first",
            "all labels",
        ]
        cells = [
            [*row[:4], *("" if share is None else f"{share:.1f}" for share in row[4:])]
            for row in lived.rows
        ]
        print(markdown(head, cells))
        for change in lived.changes:
            print(
                f"day {change.day}: costs {change.cost:.1f} points, photographs until the first alarm: "
                f"{change.num_to_alarm}"
            )
        print(f"quiet days: {lived.quiet[0]} comparisons, {lived.quiet[1]} days with an alarm")
    for failure in lived.failures:
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if lived.failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
