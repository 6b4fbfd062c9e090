"""Accuracy on a hidden test after labels in the order of `label`, and after as many by lot.

    python benchmarks/label_order.py --data DIR ... --unknown DIR --weights FILE [--cache DIR]
        [--draws 3] [--json]

--data are folders of photographs, <class>/*.jpg, --unknown one of other things. In each draw, a
bundle has ten photographs per class; 45 % of each class are a hidden test, the others the traffic, a
tenth other things. Then 20, 50 or 100 photographs are labelled and `train` runs again:

- "label": those that a server keeps, in the order of `label`, every second one of the sample, which is
  held out;
- "kept": only those that are not of the sample, so all labels are trained;
- "by lot": photographs of the traffic by lot, all trained;
- "half by lot": half as many by lot, as if the other half were held out.

A label of other things trains nothing. With "a new class", the bundle lacks the last class, which is
15 % of the traffic and of the test. Exit status 1: over all sets, "label" gains less than "half by lot".
"""

import sys
from typing import Any

import numpy as np
from measure import Result, existing, markdown, one_line_errors, report
from month import FOREIGN, HIDDEN, sets_parser
from numpy.typing import NDArray
from photo_sets import Bundle, Photographs, read_sets
from photo_vectors import draw_photographs

from sopdeploy.decision import log_sum_exp, softmax
from sopdeploy_service.labelling.keep.keeper import LOW_MARGIN
from sopdeploy_service.labelling.label.folders import SAMPLE_EVERY
from sopdeploy_service.labelling.label.order import order_by_value

Array = NDArray[Any]
COUNTS = (20, 50, 100)  # labels
FIRST = 10  # photographs of a class
SAMPLE = 0.2
NEW_SHARE = 0.15


class Draw:
    """A first bundle, its traffic, and a hidden test."""

    def __init__(
        self, photographs: Photographs, foreign: Photographs, new: int | None, seed: int
    ) -> None:
        self.photographs = photographs
        self.seed = seed
        random = np.random.default_rng(seed)
        classes = photographs.classes

        # Divide the photographs; of a new class, the share that it has.
        order = random.permutation(len(classes))
        counts = np.bincount(classes)
        rank = np.zeros(len(order))  # of a photograph in its class, from 0 to 1
        for label, count in enumerate(counts):
            rank[order[classes[order] == label]] = np.arange(count) / count
        is_hidden = rank < HIDDEN
        is_left = np.ones(len(order), np.bool_)
        self.class_weights = np.ones(len(counts))
        if new is not None:
            self.class_weights[:] = (1 - NEW_SHARE) / (len(counts) - 1)
            self.class_weights[new] = NEW_SHARE
        self.class_weights /= self.class_weights.sum()

        others = np.flatnonzero(~is_hidden)
        sizes = np.full(len(counts), FIRST)
        if new is not None:
            sizes[new] = 0
        self.first = others[draw_photographs(classes[others], sizes, random)]
        traffic = np.setdiff1d(others, self.first)

        # Each photograph is sent once, so that the frequent classes are as large as the shares allow.
        available = np.bincount(classes[traffic], minlength=len(counts))
        total = int((available / self.class_weights).min())
        chosen = draw_photographs(
            classes[traffic], (self.class_weights * total).astype(int), random
        )
        sent = traffic[chosen]
        num_foreign = min(len(foreign.classes), round(len(sent) * FOREIGN / (1 - FOREIGN)))
        drawn = random.permutation(len(foreign.classes))[:num_foreign]
        # Other things have the number -1.
        order = random.permutation(len(sent) + num_foreign)
        self.numbers = np.concatenate([sent, np.full(num_foreign, -1)])[order]
        self.vectors = np.concatenate([photographs.vectors[sent], foreign.vectors[drawn]])[
            order
        ]
        self.in_sample = random.random(len(order)) < SAMPLE
        self.by_lot = random.permutation(len(order))

        self.hidden = np.flatnonzero(is_hidden & is_left)
        self.live = self._train(self.first, is_first=True)

    def _train(self, chosen: Array, *, is_first: bool = False) -> Bundle:
        labels = self.photographs.classes[chosen]
        return Bundle(self.photographs, chosen, labels, self.seed, is_first=is_first)

    def accuracy(self, bundle: Bundle) -> float:
        """Compute the accuracy in percent on the hidden test, in which classes have the shares of the traffic."""
        targets = self.photographs.classes[self.hidden]
        right = bundle.answers(self.photographs.vectors[self.hidden]) == targets
        per_class = [right[targets == label].mean() for label in range(len(self.class_weights))]
        return 100 * float(self.class_weights @ per_class)

    def accuracy_after(self, labelled: Array) -> float:
        """Train on the photographs of the traffic at the positions *labelled*, too; return the accuracy."""
        numbers = self.numbers[labelled]
        return self.accuracy(self._train(np.concatenate([self.first, numbers[numbers >= 0]])))

    def order_kept(self) -> Array:
        """Return the positions of what the server keeps outside of the sample, in the order of `label`."""
        logits = self.live.logits(self.vectors)
        probabilities = softmax(logits)
        largest = np.sort(probabilities, axis=1)
        is_known = log_sum_exp(logits) >= self.live.threshold
        is_worth = (largest[:, -1] - largest[:, -2] < LOW_MARGIN) | ~is_known
        kept = np.flatnonzero(is_worth & ~self.in_sample)
        return kept[order_by_value(probabilities[kept], is_known[kept])]


def labels_of(draw: Draw, count: int) -> dict[str, Array]:
    """Return the positions of what is trained after *count* labels, by how they were chosen."""
    kept = draw.order_kept()
    # Of those in the order of `label`, every second one is of the sample, as long as there are some.
    in_sample = min(-(-count // SAMPLE_EVERY), int(draw.in_sample.sum()))
    return {
        "label": kept[: count - in_sample],
        "kept": kept[:count],
        "by lot": draw.by_lot[:count],
        "half by lot": draw.by_lot[: count - in_sample],
    }


WAYS = ("label", "kept", "by lot", "half by lot")


def main(arguments: list[str]) -> int:
    """Run the benchmark and return the exit status."""
    parser = sets_parser(__doc__)
    parser.add_argument("--data", type=existing, nargs="+", required=True)
    parser.add_argument("--draws", type=int, default=3)
    given = parser.parse_args(arguments)
    results: list[Result] = []
    rows: list[list[str]] = []
    gains: dict[str, list[float]] = {way: [] for way in WAYS}
    for data in given.data:
        with one_line_errors():
            photographs, foreign = read_sets(data, given.unknown, given.weights, given.cache)
        for world, new in (
            ("same classes", None),
            ("a new class", len(photographs.labels) - 1),
        ):
            draws = [Draw(photographs, foreign, new, seed) for seed in range(given.draws)]
            first = [draw.accuracy(draw.live) for draw in draws]
            for count in COUNTS:
                row = [f"{data.name}, {world}", str(count), f"{np.mean(first):.1f}"]
                for way in WAYS:
                    of_draws = [
                        draw.accuracy_after(labels_of(draw, count)[way]) - before
                        for draw, before in zip(draws, first, strict=True)
                    ]
                    gains[way] += of_draws
                    row.append(
                        f"{np.mean(of_draws):+.1f} ({min(of_draws):+.1f} to {max(of_draws):+.1f})"
                    )
                    results.append(
                        Result(
                            case=f"{data.name}, {world}, {count} labels, {way}",
                            against="first bundle",
                            ours=float(np.mean(of_draws) + np.mean(first)),
                            other=float(np.mean(first)),
                            unit="%",
                            runs=given.draws,
                        )
                    )
                rows.append(row)
                print(row, file=sys.stderr, flush=True)

    if given.json:
        report(results, as_json=True)
    else:
        print(markdown(["set", "labels", "first, % right", *WAYS], rows))
        print({way: round(float(np.mean(values)), 2) for way, values in gains.items()})
    return 0 if np.mean(gains["label"]) >= np.mean(gains["half by lot"]) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
