"""Share of bundles that `promote` accepts, in percent, by their true difference from the live one.

    python benchmarks/promotions.py [--draws 1000]
        [--data DIR ... --unknown DIR --weights FILE [--cache DIR]]

Answers are drawn, 10 % of them different. The second table has 15 % of a new class, of which the
bundle answers 85 % right and the live one none; its columns are the differences on old classes.

With --data, folders of photographs, <class>/*.jpg, two more tables have the answers of heads that
the code of `train` fits to few photographs. Live heads have ten per class; the others five to forty,
some of these, or all and more, up to 45 % of them with a wrong label. 40 per class are never tested;
all others are the traffic, so the true difference of a pair is known. Photographs are drawn from
it with replacement, --draws / 10 times for each pair. In the last table, the live head lacks a
class, which is 15 % of the traffic. "pairs" counts those within the columns: a difference of -8 is
-11 to -5.5, -3 is -4 to -2, -1 is -1.5 to -0.5, 0 is -0.5 to 0.5, +2 is 1 to 3, +8 is over 5.5.
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from measure import existing, markdown, one_line_errors
from numpy.typing import NDArray
from photo_sets import Bundle, Photographs, read_sets
from verdicts import decide

from sopdeploy.evaluation.permission import TOLERANCE, Counts, rule_of_all, rule_of_old

Array = NDArray[Any]
DIFFERING = 0.1
DIFFERENCES = (-0.08, -0.03, -0.01, 0.0, 0.02, 0.08)
# of the columns, for real heads
RANGES = (
    (-0.11, -0.055),
    (-0.04, -0.02),
    (-0.015, -0.005),
    (-0.005, 0.005),
    (0.01, 0.03),
    (0.055, 0.15),
)
SIZES = (60, 100, 300, 1_000)
NEW_SHARE = 0.15
NEW_RIGHT = 0.85
TRAINED = 40  # photographs of a class that heads may be trained on
LIVE = 10
NUM_LIVE = 8  # heads of a set


def accepts(all_counts: Counts, old_counts: Counts) -> bool:
    """Whether both checks of `promote` pass at the first attempt."""
    in_all = rule_of_all(TOLERANCE, 1).bound(all_counts)
    in_old = rule_of_old(TOLERANCE).bound(old_counts)
    return in_all.passes and (old_counts.images == all_counts.images or in_old.passes)


def share_accepted(images: int, difference: float, draws: int, new_share: float) -> float:
    """Draw answers to so many *images*, and return the share of bundles that are accepted."""
    random = np.random.default_rng(images)
    wins = (DIFFERING + difference) / 2
    changes = (wins, DIFFERING - wins, 1 - DIFFERING)
    num_accepted = 0
    for _ in range(draws):
        num_new = int(random.binomial(images, new_share))
        won, lost, _ = random.multinomial(images - num_new, changes).tolist()
        new_won = int(random.binomial(num_new, NEW_RIGHT))
        old_counts = Counts(images - num_new, won, lost)
        num_accepted += accepts(Counts(images, won + new_won, lost), old_counts)
    return num_accepted / draws


class Pair(NamedTuple):
    """What the live head and another answer to the traffic.

    `weights` (N,) are the shares of its photographs, `classes` (N,) what they show, and `live`
    and `other` (N,) tell which head is right.
    """

    weights: Array
    classes: Array
    is_old: Array
    live: Array
    other: Array

    @property
    def gains(self) -> Array:
        """1 where only the other head is right, -1 where only the live one is (N,)."""
        return self.other.astype(np.int64) - self.live

    @property
    def difference(self) -> float:
        """The true difference in old classes."""
        return float(self.gains[self.is_old].mean())

    @property
    def in_all(self) -> float:
        """The true difference on the traffic."""
        return float(self.weights @ self.gains)


def spoil(labels: Array, share: float, random: np.random.Generator) -> Array:
    """Replace a *share* of *labels* by others."""
    spoilt = labels.copy()
    is_wrong = random.random(len(labels)) < share
    spoilt[is_wrong] = random.permutation(labels)[is_wrong]
    return spoilt


def make_pairs(photographs: Photographs, new: int | None) -> Iterator[Pair]:
    """Fit live heads and others to *photographs*; yield the pairs. The live ones lack the class *new*."""
    random = np.random.default_rng(0)
    classes = photographs.classes
    by_class = [
        random.permutation(np.flatnonzero(classes == label))
        for label in range(len(photographs.labels))
    ]
    tested = np.concatenate([members[TRAINED:] for members in by_class])
    is_old = classes[tested] != new
    weights = np.full(len(tested), 1 / len(tested))
    if new is not None:
        weights = np.where(is_old, (1 - NEW_SHARE) / is_old.sum(), NEW_SHARE / (~is_old).sum())

    def is_right(chosen: Array, labels: Array, seed: int) -> Array:
        bundle = Bundle(photographs, chosen, labels, seed, is_first=True)
        return bundle.answers(photographs.vectors[tested]) == classes[tested]

    for seed in range(NUM_LIVE):
        # The photographs that the live head has, first in an order of the others.
        orders = [random.permutation(members[:TRAINED]) for members in by_class]
        chosen = np.concatenate([order[:LIVE] for order in orders])
        of_live = chosen[classes[chosen] != new]
        live = is_right(of_live, classes[of_live], seed)
        for size in (5, 7, 10, 14, 20, 40):
            for wrong in (0.0, 0.1, 0.2, 0.3, 0.45):
                if new is None and size == LIVE and not wrong:
                    continue  # the live head itself
                chosen = np.concatenate([order[:size] for order in orders])
                other = is_right(chosen, spoil(classes[chosen], wrong, random), seed)
                yield Pair(weights, classes[tested], is_old, live, other)


def share_of_pair(pair: Pair, images: int, draws: int) -> float:
    """Draw so many *images* from the traffic of *pair*, and return the share of draws that are accepted."""
    random = np.random.default_rng(images)
    labels = [str(number) for number in range(int(pair.classes.max()) + 1)]
    num_accepted = 0
    for _ in range(draws):
        drawn = random.choice(len(pair.classes), images, p=pair.weights)
        right = [pair.live[drawn], pair.other[drawn]]
        verdict = decide(right, pair.classes[drawn], pair.is_old[drawn], labels)
        num_accepted += verdict.passes
    return num_accepted / draws


def tabulate_pairs(
    sets: Sequence[Photographs], draws: int, *, has_new: bool
) -> list[list[str]]:
    """Return the rows of a table of real heads on *sets*."""
    by_column: dict[int, list[Pair]] = defaultdict(list)
    for photographs in sets:
        for pair in make_pairs(photographs, len(photographs.labels) - 1 if has_new else None):
            for column, (low, high) in enumerate(RANGES):
                if low <= pair.difference < high:
                    by_column[column].append(pair)

    columns = [by_column[column] for column in range(len(RANGES))]
    rows = [["pairs", *(str(len(pairs)) for pairs in columns)]]
    for name, values in (
        ("difference", [[pair.difference for pair in pairs] for pairs in columns]),
        ("on all traffic", [[pair.in_all for pair in pairs] for pairs in columns]),
        (
            "answered differently",
            [[pair.weights @ abs(pair.gains) for pair in pairs] for pairs in columns],
        ),
    ):
        rows.append([name, *(f"{100 * np.mean(one):+.1f}" if one else "" for one in values)])
    for images in SIZES:
        shares = [[share_of_pair(pair, images, draws) for pair in pairs] for pairs in columns]
        rows.append(
            [str(images), *(f"{100 * np.mean(one):.0f}" if one else "" for one in shares)]
        )
    return rows


def main(arguments: list[str]) -> int:
    """Print the tables and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--draws", type=int, default=1_000)
    parser.add_argument("--data", type=existing, nargs="+", default=[])
    parser.add_argument("--unknown", type=existing, help="other things")
    parser.add_argument("--weights", type=existing)
    parser.add_argument("--cache", type=Path, help="folder for what was computed")
    given = parser.parse_args(arguments)
    if given.data and not (given.unknown and given.weights):
        parser.error("--data needs --unknown and --weights")

    head = ["photographs", *(f"{100 * difference:+.0f}" for difference in DIFFERENCES)]
    for title, new_share in (("no new class", 0.0), ("a new class", NEW_SHARE)):
        rows = []
        for images in SIZES:
            shares = [
                share_accepted(images, difference, given.draws, new_share)
                for difference in DIFFERENCES
            ]
            rows.append([images, *(f"{100 * share:.0f}" for share in shares)])
        print(f"{title}\n\n{markdown(head, rows)}\n")

    with one_line_errors():
        sets = [
            read_sets(data, given.unknown, given.weights, given.cache)[0] for data in given.data
        ]
    for title, has_new in (("no new class", False), ("a new class", True)) if sets else ():
        print(f"real heads, {title}\n")
        print(markdown(head, tabulate_pairs(sets, max(1, given.draws // 10), has_new=has_new)))
        print()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
