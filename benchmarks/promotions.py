"""Share of bundles that `promote` accepts, in percent, by their true difference from the live one.

    python benchmarks/promotions.py [--draws 1000]

Answers are drawn, 10 % of them different. The second table has 15 % of a new class, of which the
bundle answers 85 % right and the live one none; its columns are the differences on old classes.
"""

import argparse

import numpy as np
from measure import markdown

from sopdeploy.evaluation.permission import TOLERANCE, Counts, rule_of_all, rule_of_old

DIFFERING = 0.1
DIFFERENCES = (-0.08, -0.03, -0.01, 0.0, 0.02, 0.08)
SIZES = (60, 100, 300, 1_000)
NEW_SHARE = 0.15
NEW_RIGHT = 0.85


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


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=1_000)
    draws = parser.parse_args().draws
    head = ["photographs", *(f"{100 * difference:+.0f}" for difference in DIFFERENCES)]
    for title, new_share in (("no new class", 0.0), ("a new class", NEW_SHARE)):
        rows = []
        for images in SIZES:
            shares = [
                share_accepted(images, difference, draws, new_share)
                for difference in DIFFERENCES
            ]
            rows.append([images, *(f"{100 * share:.0f}" for share in shares)])
        print(f"{title}\n\n{markdown(head, rows)}\n")


if __name__ == "__main__":
    main()
