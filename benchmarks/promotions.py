"""Measures how often bundles of a known true difference are promoted.

    python benchmarks/promotions.py [--json]

A pair of bundles is simulated by its answers: on a given share of the photographs exactly one of them is
right, and the second one is right more or less often by the true difference. The photographs are of
`CLASSES` classes. The decision is that of `sopdeploy promote` with its default tolerance.
"""

import numpy as np
from measure import Result, make_parser, report

from sopdeploy.evaluation.statistics import decide
from sopdeploy_commands.promotion.compare import compare_classes

PAIRS = 1000
PHOTOS = 300
CLASSES = 10
TOLERANCE = 0.01
SHARES = (0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3)  # photographs on which exactly one bundle is right
DIFFERENCES = (-0.05, -0.02, -0.01, 0.0, 0.03, 0.05)


def is_promoted(rng: np.random.Generator, share: float, difference: float) -> bool:
    """Draw the answers of two bundles to `PHOTOS` photographs, and decide."""
    drawn, targets = rng.random(PHOTOS), rng.integers(CLASSES, size=PHOTOS)
    wins, losses = drawn < (share + difference) / 2, drawn > 1 - (share - difference) / 2
    verdict = decide(int(wins.sum()), int(losses.sum()), PHOTOS, TOLERANCE)
    labels = [str(index) for index in range(CLASSES)]
    worse = any(change.is_worse for change in compare_classes(labels, targets, losses, wins))
    return verdict in {"better", "not worse"} and not worse


def measure() -> list[Result]:
    """Return the percentage of promoted pairs for each true difference and share."""
    results = []
    for difference in DIFFERENCES:
        for share in (share for share in SHARES if share >= abs(difference)):
            rng = np.random.default_rng([round(1000 * share), round(1000 + 1000 * difference)])
            count = sum(is_promoted(rng, share, difference) for _ in range(PAIRS))
            case = f"{100 * difference:+g} points, one is right on {100 * share:g} %, {PHOTOS} photographs"
            results.append(Result(case=case, ours=100 * count / PAIRS, unit="% promoted", runs=PAIRS))
    return results


def main() -> None:
    """Run from the command line."""
    arguments = make_parser(__doc__).parse_args()
    report(measure(), as_json=arguments.json)


if __name__ == "__main__":
    main()
