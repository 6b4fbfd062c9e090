"""Runs of the experiment: their outcomes in a file, and the paired difference of two arms."""

import base64
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t

from sopdeploy.base.config import StrictModel
from sopdeploy.base.files import atomic_write

SAME_NETWORK = 0.98  # share of equal answers, right or wrong
Stage = Literal["frozen", "first order", "rates", "tuned", "probe rates", "probes"]


class Case(StrictModel):
    """What a run is: an arm on a set, with a seed; `rate` and `epochs` are 0 and `per_class` counts in "frozen".

    `per_class` 0 stands for all training images. `revision` increases when a change of the code
    changes results.
    """

    stage: Stage
    images: str
    side: int
    arm: str
    seed: int = 0
    rate: float = 0.0
    epochs: int = 0
    per_class: int = 0
    revision: int = 1


class Line(Case):
    """The outcome of a run.

    `accuracy` in percent and `right`, a bit for each test image (base64), describe the final
    network. Fields with `frozen_` describe the closed form that it started from. `losses` are the
    validation losses of the epochs from 0, `seconds` CPU seconds of the training without its
    evaluation, `branch` the accuracy of the auxiliary branch on the validation images.
    """

    accuracy: float
    right: str
    frozen_accuracy: float | None = None
    frozen_right: str = ""
    losses: tuple[float, ...] = ()
    seconds: float = 0.0
    branch: float | None = None
    count: int
    date: str

    @property
    def case(self) -> Case:
        """The case of this run."""
        return Case(**{name: getattr(self, name) for name in Case.model_fields})

    def answers(self, *, frozen: bool = False) -> NDArray[np.float64]:
        """Return 1 for each test image that is right, and 0 for a wrong one."""
        return decode_bits(self.frozen_right if frozen else self.right)[: self.count]


class Lines:
    """The file of finished runs."""

    def __init__(self, path: Path) -> None:
        self.path = path
        texts = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        lines = [Line.model_validate_json(text) for text in texts]
        self.by_case: dict[str, Line] = {_key(line.case): line for line in lines}

    def find(self, case: Case) -> Line | None:
        """Find the outcome of *case*; None if it has not run."""
        return self.by_case.get(_key(case))

    def add(self, line: Line) -> None:
        """Add *line*, and write the file."""
        self.by_case[_key(line.case)] = line
        texts = [one.model_dump_json(exclude_defaults=True) for one in self.by_case.values()]
        with atomic_write(self.path) as partial:
            partial.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")

    def select(self, stage: Stage, images: str, arm: str, side: int) -> list[Line]:
        """Select the runs of *arm* on *images* of *side* pixels in *stage*."""
        return [
            line
            for line in self.by_case.values()
            if (line.stage, line.images, line.arm, line.side) == (stage, images, arm, side)
        ]


def _key(case: Case) -> str:
    return case.model_dump_json()


def encode_bits(bits: NDArray[np.bool_]) -> str:
    """Encode *bits* as base64."""
    return base64.b64encode(np.packbits(bits).tobytes()).decode()


def decode_bits(text: str) -> NDArray[np.float64]:
    """Decode what `encode_bits` wrote, and up to seven zeros at the end."""
    packed = np.frombuffer(base64.b64decode(text), np.uint8)
    return np.unpackbits(packed).astype(np.float64)


Answers = Mapping[int, NDArray[np.float64]]  # by seed: 1 for each test image that is right


def paired_gain(ours: Answers, other: Answers) -> tuple[float, float, int]:
    """Compute the mean difference ours - other in points, half its 95 % interval, and the number of seeds.

    Seeds of both count; they share their test images. The variance is the sum for seeds and for
    images, each with its own effect (Cameron, Gelbach, Miller, "Robust Inference with Multiway
    Clustering", 2011); the degrees of freedom are Satterthwaite's, with seeds - 1 for the part of
    the seeds. For a single seed, the interval is over its test images.
    """
    seeds = sorted(ours.keys() & other.keys())
    differences = 100 * np.stack([ours[seed] - other[seed] for seed in seeds])
    mean = float(differences.mean())
    n = len(differences)
    if n == 1:
        error = float(differences.std(ddof=1)) / differences.size**0.5
        return mean, float(t.ppf(0.975, differences.size - 1)) * error, n

    residuals = differences - mean
    noise = (residuals**2).sum()
    count = differences.size
    of_seeds = max(noise, n / (n - 1) * (residuals.sum(axis=1) ** 2).sum()) / count**2
    of_images = n / (n - 1) * max(0.0, (residuals.sum(axis=0) ** 2).sum() - noise) / count**2
    if of_seeds == 0:  # all differences are equal
        return mean, 0.0, n
    freedom = (n - 1) * (1 + of_images / of_seeds) ** 2
    return mean, float(t.ppf(0.975, freedom)) * math.sqrt(of_seeds + of_images), n


def equal_share(ours: Answers, other: Answers) -> float:
    """Compute the share of the test images of the common seeds that both answer right, or both wrong."""
    seeds = sorted(ours.keys() & other.keys())
    return float(np.mean([ours[seed] == other[seed] for seed in seeds]))


def describe_gain(ours: Answers, other: Answers) -> str:
    """Describe the paired difference and the share of equal answers; "" without common seeds.

    Networks with more than `SAME_NETWORK` of them are the same network: such a comparison says
    nothing about what they differ in.
    """
    if not ours.keys() & other.keys():
        return ""
    share = equal_share(ours, other)
    if share > SAME_NETWORK:
        return f"the same network ({100 * share:.1f} % equal)"
    mean, half, _ = paired_gain(ours, other)
    return f"{mean:+.1f} +- {half:.1f} ({100 * share:.0f} % equal)"


def mean_accuracy(answers: Sequence[NDArray[np.float64]]) -> float:
    """Return the mean accuracy in percent."""
    return 100 * float(np.mean([one.mean() for one in answers]))
