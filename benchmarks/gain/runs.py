"""Runs of a study: their inputs, their outcomes in a file, and the paired difference of two classifiers."""

import base64
import hashlib
import json
import math
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pydantic
import torch
from numpy.typing import NDArray
from scipy.stats import t
from torch.nn.functional import cross_entropy

from gain.photos import PhotosConfig, Predictions, train_and_predict
from sopdeploy.config import StrictModel
from sopdeploy.errors import ConfigError
from sopdeploy.files import atomic_write


class Run(StrictModel):
    """All inputs of a run; `revision` increases when a change of the code changes results.

    `network` is a recipe of sopdeploy and `config` has what replaces its values. Without `epochs`,
    it fits a classifier to frozen features.
    """

    revision: Literal[1, 2] = 1
    task: PhotosConfig
    network: str
    config: dict[str, Any] = pydantic.Field(default_factory=dict)
    epochs: Annotated[int, pydantic.Field(ge=0)]
    learning_rate: float
    seed: int

    @property
    def key(self) -> str:
        """Hash of all inputs; independent of the location of the images."""
        values = self.model_dump(
            mode="json", exclude={"task": {"folder"}}, exclude_defaults=True
        )
        text = f"{type(self.task).__name__} revision {self.revision} {json.dumps(values, sort_keys=True)}"
        return hashlib.sha256(text.encode()).hexdigest()[:24]


class Line(StrictModel):
    """The outcome of the classifier *arm* on a draw of *images*; `key` names all inputs of the run.

    `accuracy` of the exported network in percent, `seconds` of CPU for the training, main `loss` of
    the last epoch. `right` has a bit for each image that draws share (base64): the exported network
    is right. `tested` has a bit for each image, set if this draw tested it. `log_loss` is None if it
    is not finite. `parameters` counts the parameters of the exported network.
    """

    accuracy: float
    seconds: float
    loss: float
    log_loss: float | None = None
    right: str = ""
    tested: str = ""
    parameters: int = 0
    images: str
    arm: str
    seed: int
    rate: float
    date: str
    key: str

    @property
    def answers(self) -> NDArray[np.float64]:
        """1 for each shared image that is right, 0 for a wrong one, NaN for one that was not tested."""
        return np.where(decode_bits(self.tested), decode_bits(self.right), np.nan)


class Lines:
    """The file of finished runs; unless *may_run*, others are missing."""

    def __init__(self, path: Path | None, *, may_run: bool = True) -> None:
        self.path = path
        self.may_run = may_run
        if path is not None and not may_run and not path.exists():
            raise ConfigError(f"{path}: does not exist; omit --report")

        texts = path.read_text(encoding="utf-8").splitlines() if path and path.exists() else []
        lines = [Line.model_validate_json(text) for text in texts]
        self.by_run = {(line.images, line.key): line for line in lines}

    def find(self, images: str, arm: str, run: Run) -> Line | None:
        """Look up the line of *run*, or execute it and write its line at once; None if it is missing."""
        found = self.by_run.get((images, run.key))
        if found is not None or not self.may_run:
            return found

        torch.set_num_threads(1)
        rates = {"optimizer.lr": run.learning_rate, "epochs": run.epochs} if run.epochs else {}
        predictions = train_and_predict(
            run.task, run.network, {**run.config, **rates}, run.seed
        )
        line = judge(predictions, images, arm, run)
        self.by_run[images, run.key] = line
        if self.path is not None:
            texts = [one.model_dump_json(exclude_defaults=True) for one in self.by_run.values()]
            with atomic_write(self.path) as partial:
                partial.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")

        print(
            f"{images}, draw {run.seed}, {arm}: {line.accuracy:.2f} % in {line.seconds:.0f} s",
            file=sys.stderr,
            flush=True,
        )
        return line


def judge(predictions: Predictions, images: str, arm: str, run: Run) -> Line:
    """Compare the logits of *predictions* with their labels."""
    right = (predictions.logits.argmax(dim=1) == predictions.labels).numpy()
    log_loss = float(cross_entropy(predictions.logits, predictions.labels))

    of_pool, is_tested = np.zeros((2, predictions.draw.pool), np.bool_)
    of_pool[predictions.draw.tested] = right
    is_tested[predictions.draw.tested] = True

    return Line(
        accuracy=100.0 * float(right.mean()),
        seconds=round(predictions.seconds, 4),
        loss=round(predictions.loss, 4),
        log_loss=round(log_loss, 5) if math.isfinite(log_loss) else None,
        right=encode_bits(of_pool),
        tested=encode_bits(is_tested),
        parameters=predictions.parameters,
        images=images,
        arm=arm,
        seed=run.seed,
        rate=run.learning_rate,
        date=datetime.now(UTC).date().isoformat(),
        key=run.key,
    )


def encode_bits(bits: NDArray[np.bool_]) -> str:
    """Encode *bits* as base64."""
    return base64.b64encode(np.packbits(bits).tobytes()).decode()


def decode_bits(text: str) -> NDArray[np.bool_]:
    """Decode what `encode_bits` wrote, and up to seven zeros at the end."""
    return np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8)).astype(np.bool_)


def paired_gain(ours: Sequence[Line], other: Sequence[Line]) -> tuple[float, float]:
    """Compute the mean difference ours - other of the same draws in points, and half its 95 % interval.

    The draws share their test images. The variance is the sum for draws and for images, each
    with its own effect (Cameron, Gelbach, Miller, "Robust Inference with Multiway Clustering",
    2011); the degrees of freedom are Satterthwaite's, with draws - 1 for the part of the draws.
    For a single draw, the interval is over its test images.
    """
    differences = 100 * (
        np.stack([one.answers for one in ours]) - np.stack([one.answers for one in other])
    )
    is_tested = np.isfinite(differences)
    mean = float(np.nanmean(differences))
    n = len(differences)

    if n == 1:
        of_images = differences[is_tested]
        error = float(of_images.std(ddof=1)) / len(of_images) ** 0.5
        return mean, float(t.ppf(0.975, len(of_images) - 1)) * error

    residuals = np.nan_to_num(differences - mean)
    noise = (residuals**2).sum()
    count = is_tested.sum()
    of_draws = max(noise, n / (n - 1) * (residuals.sum(axis=1) ** 2).sum()) / count**2
    of_images = n / (n - 1) * max(0.0, (residuals.sum(axis=0) ** 2).sum() - noise) / count**2
    if of_draws == 0:  # all differences are equal
        return mean, 0.0
    freedom = (n - 1) * (1 + of_images / of_draws) ** 2
    return mean, float(t.ppf(0.975, freedom)) * math.sqrt(of_draws + of_images)
