"""Train by one recipe on the photographs of one seed, and measure the accuracy of the exported network.

Runs with the same seed are paired: they use the same images. The accuracy after the last epoch counts.
"""

import base64
import hashlib
import json
import math
from typing import Annotated, Any, Literal

import numpy as np
import pydantic
import torch
from torch.nn.functional import cross_entropy

from gain.photos import PhotosConfig, Predictions, train_and_predict
from sopdeploy.config import StrictModel


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


class Outcome(StrictModel):
    """Accuracy of the exported network in percent, CPU seconds of the training, main loss of the last epoch.

    `right` has a bit for each image that draws share (base64): the exported network is right.
    `tested` has a bit for each image, set if this draw tested it. `log_loss` is None if it is not
    finite. `parameters` counts the parameters of the exported network.
    """

    accuracy: float
    seconds: float
    loss: float
    log_loss: float | None = None
    right: str = ""
    tested: str = ""
    parameters: int = 0


def train_and_measure(run: Run) -> Outcome:
    """Train by the run's recipe, and measure the accuracy of the exported network."""
    torch.set_num_threads(1)
    rates = {"optimizer.lr": run.learning_rate, "epochs": run.epochs} if run.epochs else {}
    return judge(train_and_predict(run.task, run.network, {**run.config, **rates}, run.seed))


def judge(predictions: Predictions) -> Outcome:
    """Compare the logits of *predictions* with their labels."""
    right = (predictions.logits.argmax(dim=1) == predictions.labels).numpy()
    log_loss = float(cross_entropy(predictions.logits, predictions.labels))

    of_pool, is_tested = np.zeros((2, predictions.draw.pool), np.bool_)
    of_pool[predictions.draw.tested] = right
    is_tested[predictions.draw.tested] = True

    return Outcome(
        accuracy=100.0 * float(right.mean()),
        seconds=round(predictions.seconds, 4),
        loss=round(predictions.loss, 4),
        log_loss=round(log_loss, 5) if math.isfinite(log_loss) else None,
        right=encode_bits(of_pool),
        tested=encode_bits(is_tested),
        parameters=predictions.parameters,
    )


def encode_bits(bits: np.ndarray) -> str:
    """Encode *bits* as base64."""
    return base64.b64encode(np.packbits(bits).tobytes()).decode()


def decode_bits(text: str) -> np.ndarray:
    """Decode what `encode_bits` wrote, and up to seven zeros at the end."""
    return np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8)).astype(np.bool_)
