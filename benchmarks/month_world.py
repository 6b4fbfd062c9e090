"""What a shop photographs in a month: a class comes, the camera changes, and a class goes."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from photo_sets import Bundle, Photographs
from photo_vectors import draw_photographs

Array = NDArray[Any]
NEW_DAY = 8  # when the new class comes
CAMERA_DAY = 15
GONE_DAY = 20  # when a class goes
PER_DAY = 220
FRAMES = 2
JITTER = 0.1  # share of the difference of two photographs, by which a frame differs
FOREIGN = 0.1
NEW_SHARE = 0.25
SAMPLE = 0.2
HIDDEN = 0.3


class Traffic(NamedTuple):
    """Photographs *per_day*, *frames* of each object, the share of the *largest* class, 0 if all are equal.

    Customers report the share *reports* of wrong predictions.
    """

    per_day: int = PER_DAY
    frames: int = FRAMES
    largest: float = 0.0
    reports: float = 0.0


@dataclass
class Sent:
    """What a day sent: objects (n,), whether they are other things, vectors (n, D), measures, the sample, customers.

    The objects are numbers of photographs. *in_sample* is per object, the others per photograph.
    """

    numbers: Array
    is_foreign: Array
    vectors: Array
    measures: Array
    in_sample: Array
    may_report: Array  # a customer would report a wrong prediction


class World:
    """Photographs that are sent, and a hidden test."""

    def __init__(
        self,
        photographs: Photographs,
        foreign: Photographs,
        new: int,
        seed: int,
        traffic: Traffic,
    ) -> None:
        self.photographs = photographs
        self.foreign = foreign
        self.new = new
        self.traffic = traffic
        self.random = np.random.default_rng(seed)

        # Of each class, some are the hidden test, some the first photographs, the others are sent.
        classes = photographs.classes[: photographs.count]
        order = self.random.permutation(len(classes))
        is_hidden = np.zeros(len(order), np.bool_)
        for label in range(len(photographs.labels)):
            of_class = order[classes[order] == label]
            is_hidden[of_class[: round(HIDDEN * len(of_class))]] = True
        self.hidden = np.flatnonzero(is_hidden)
        others = np.flatnonzero(~is_hidden)
        sizes = np.full(len(photographs.labels), 10)
        sizes[new] = 0
        drawn = draw_photographs(classes[others], sizes, self.random)
        self.first = others[drawn]
        self.pool = np.setdiff1d(others, self.first)

    def shares(self, day: int) -> Array:
        """Return the share of each class among the photographs of *day* that show one."""
        shares = np.ones(len(self.photographs.labels))
        if self.traffic.largest:
            largest = 3 if self.new == 2 else 2  # the first or the second class goes later
            shares[:] = (1 - self.traffic.largest) / (len(shares) - 2)
            shares[largest] = self.traffic.largest
        shares[self.new] = 0.0
        if day >= GONE_DAY:
            shares[0 if self.new else 1] = 0.0
        shares /= shares.sum()
        if day >= NEW_DAY:
            shares *= 1 - NEW_SHARE
            shares[self.new] = NEW_SHARE
        return shares

    def send(self, day: int) -> Sent:
        """Draw the photographs of *day*, in their order; the frames of an object differ a little."""
        classes = self.photographs.classes
        per_class = np.bincount(classes[self.pool], minlength=len(self.photographs.labels))
        weights = (self.shares(day) / per_class)[classes[self.pool]]
        num_objects = self.traffic.per_day // self.traffic.frames
        objects = self.random.choice(self.pool, num_objects, p=weights / weights.sum())
        is_other = self.random.random(num_objects) < FOREIGN
        objects[is_other] = self.random.integers(self.foreign.count, size=is_other.sum())
        if day >= CAMERA_DAY:
            objects += np.where(is_other, self.foreign.count, self.photographs.count)
        numbers = np.repeat(objects, self.traffic.frames)
        is_foreign = np.repeat(is_other, self.traffic.frames)

        def choose(own: Array, others: Array) -> Array:
            chosen = np.empty((len(numbers), *own.shape[1:]), own.dtype)
            chosen[is_foreign] = others[numbers[is_foreign]]
            chosen[~is_foreign] = own[numbers[~is_foreign]]
            return chosen

        measures = choose(self.photographs.measures, self.foreign.measures)
        vectors = choose(self.photographs.vectors, self.foreign.vectors)
        # Frames differ as photographs do: noise in each number would be unlike any photograph.
        first, second = self.random.choice(self.pool, (2, len(vectors)))
        every = self.photographs.vectors
        vectors = vectors + JITTER * (every[first] - every[second])
        in_sample = self.random.random(num_objects) < SAMPLE
        may_report = self.random.random(len(numbers)) < self.traffic.reports
        return Sent(
            numbers, is_foreign, vectors.astype(np.float32), measures, in_sample, may_report
        )

    def accuracy(self, bundle: Bundle, day: int) -> float:
        """Compute the accuracy of *bundle* on the hidden test, weighted as the traffic of *day*."""
        hidden = self.hidden + (self.photographs.count if day >= CAMERA_DAY else 0)
        targets = self.photographs.classes[hidden]
        right = bundle.answers(self.photographs.vectors[hidden]) == targets
        per_class = [
            right[targets == label].mean() for label in range(len(self.photographs.labels))
        ]
        return float(np.dot(self.shares(day), per_class))
