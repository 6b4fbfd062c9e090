"""Train one network on one task with one seed, and measure the accuracy of the exported network.

Runs with the same seed are paired: they use the same images, the same initial value of each
weight that a network shares with the plain one of its family, and the same order of batches,
augmentation and noise. The accuracy after the last epoch counts.
"""

import base64
import hashlib
import json
import math
import time
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
import pydantic
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from gain.photos import PhotosConfig, train_and_predict
from gain.task import CifarConfig, Task, cifar
from sopdeploy.backbones.base import Backbone
from sopdeploy.backbones.cifar_resnet import SmallResNet, SmallResNetConfig
from sopdeploy.config import StrictModel
from sopdeploy.data.batches import sequential_batches, shuffled_batches
from sopdeploy.layers.residual import PaddedShortcut
from sopdeploy.models.base import Classifier, as_classifier
from sopdeploy.models.dsop_networks import DSoPSmallResNet, DSoPSmallResNetConfig
from sopdeploy.seeds import derive_seed
from sopdeploy.training.loop.losses import training_loss
from sopdeploy.training.schedules import OneCycle

CLASSES = 10
DIVERGED = 1e9  # stands for a loss that is not finite: JSON has no such numbers
MOMENTS, SAMPLE = 4, 2000
# Options of the part that all networks of a family share.
TRUNK = {"depth", "base_width", "shortcut"}
NETWORKS: dict[str, tuple[type[Classifier], type[StrictModel]]] = {
    "resnet": (as_classifier(SmallResNet), SmallResNetConfig),
    "dsop-resnet": (DSoPSmallResNet, DSoPSmallResNetConfig),
}


class Run(StrictModel):
    """All inputs of a run; `revision` increases when a change of the code changes results.

    `strides` are the strides of the stem and of the last stage of a ResNet. On photographs, `network`
    is a recipe of sopdeploy and `config` has what replaces its values. Without `epochs`, it fits a
    classifier to frozen features.
    """

    revision: Literal[1, 2] = 1
    task: CifarConfig | PhotosConfig
    network: str
    config: dict[str, Any] = pydantic.Field(default_factory=dict)
    strides: tuple[int, int] | None = None
    epochs: Annotated[int, pydantic.Field(ge=0)]
    learning_rate: float
    batch: int = 64
    weight_decay: float = 5e-4
    augment: bool = False
    seed: int

    @property
    def key(self) -> str:
        """Hash of all inputs; independent of the location of the images."""
        values = self.model_dump(
            mode="json", exclude={"task": {"arrays", "folder"}}, exclude_defaults=True
        )
        text = f"{type(self.task).__name__} revision {self.revision} {json.dumps(values, sort_keys=True)}"
        return hashlib.sha256(text.encode()).hexdigest()[:24]


class Moment(StrictModel):
    """State after *epoch*: its mean main loss, and the accuracy of the network and of each branch in percent.

    At most `SAMPLE` test images, evenly spaced, decide; after the last epoch, all. The loss is
    at most `DIVERGED`.
    """

    epoch: int
    loss: float
    accuracy: float
    branches: dict[str, float] = pydantic.Field(default_factory=dict)


class Outcome(StrictModel):
    """Accuracy of the exported network in percent, CPU seconds of the training, main loss of the last epoch.

    `right` has a bit for each image that draws share (base64): the exported network is right.
    `tested` has those of the tested images, or nothing if all are. `log_loss` is None if it is
    not finite. `parameters` counts those of the exported network on photographs.
    """

    accuracy: float
    seconds: float
    loss: float
    log_loss: float | None = None
    history: list[Moment] = pydantic.Field(default_factory=list)
    right: str = ""
    tested: str = ""
    parameters: int = 0


def train_and_measure(run: Run) -> Outcome:
    """Train, detach, rebuild the network without training-only modules, and measure its accuracy."""
    torch.set_num_threads(1)
    if isinstance(run.task, PhotosConfig):
        return fine_tune(run, run.task)

    task = cifar(run.task, run.seed)
    network = build(run)
    history, seconds = train(network, task, run)
    logits = logits_of(exported_network(network, run), task.test)
    return Outcome(
        seconds=round(seconds, 4),
        loss=history[-1].loss if history else 0.0,
        history=history,
        **judge(logits, task.test_labels, None, task.pool),
    )


def fine_tune(run: Run, task: PhotosConfig) -> Outcome:
    """Fine-tune by the run's recipe on photographs, and measure the exported network."""
    rates = {"optimizer.lr": run.learning_rate, "epochs": run.epochs} if run.epochs else {}
    predictions = train_and_predict(task, run.network, {**run.config, **rates}, run.seed)
    draw = predictions.draw
    return Outcome(
        seconds=round(predictions.seconds, 4),
        loss=round(predictions.loss, 4),
        parameters=predictions.parameters,
        **judge(
            predictions.logits, predictions.labels, torch.from_numpy(draw.tested), draw.pool
        ),
    )


def judge(logits: Tensor, labels: Tensor, tested: Tensor | None, pool: int) -> dict[str, Any]:
    """Compute the fields of `Outcome` about the *logits* (N, C) of test images; see `Task` for the others."""
    right = (logits.argmax(dim=1) == labels).numpy()
    log_loss = float(cross_entropy(logits, labels))

    of_pool, is_tested = np.zeros((2, pool), np.bool_)
    if pool:
        members = np.arange(pool) if tested is None else tested.numpy()
        of_pool[members] = right
        is_tested[members] = True

    needs_no_tested = tested is None and pool % 8 == 0  # 8: no padding
    return {
        "accuracy": 100.0 * float(right.mean()),
        "log_loss": round(log_loss, 5) if math.isfinite(log_loss) else None,
        "right": encode_bits(of_pool),
        "tested": "" if needs_no_tested else encode_bits(is_tested),
    }


def encode_bits(bits: np.ndarray) -> str:
    """Encode *bits* as base64."""
    return base64.b64encode(np.packbits(bits).tobytes()).decode()


def decode_bits(text: str) -> np.ndarray:
    """Decode what `encode_bits` wrote, and up to seven zeros at the end."""
    return np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8)).astype(np.bool_)


def build(run: Run) -> Classifier:
    """Create the run's network; weights shared with the family's plain network have equal initial values."""
    family = run.network.rpartition("-")[2]
    network = create_network(run.network, run.config, run)
    plain = create_network(
        family, {key: value for key, value in run.config.items() if key in TRUNK}, run
    )
    own = network.state_dict()
    shared = {
        name: value for name, value in plain.state_dict().items()
        if name in own and own[name].shape == value.shape
    }  # fmt: skip
    network.load_state_dict(own | shared)
    return network


def create_network(name: str, values: Mapping[str, Any], run: Run) -> Classifier:
    """Create the network *name* with the options *values*, initialized with the run's seed."""
    kind, config = NETWORKS[name]
    torch.manual_seed(derive_seed(run.seed, "start"))
    network = kind(config.model_validate(values), CLASSES)
    set_strides(network, run)
    return network


def set_strides(network: Backbone, run: Run) -> None:
    """Set the run's strides in stem and last stage; 32 x 32 feature maps are too slow on two cores."""
    if run.strides is None:
        return
    stem, last = run.strides
    network.get_submodule("conv1").stride = (stem, stem)
    for module in network.get_submodule("layer3.0").modules():
        if isinstance(module, PaddedShortcut):
            module.stride = last
        elif getattr(module, "stride", None) == (2, 2):
            module.stride = (last, last)


def train(network: Classifier, task: Task, run: Run) -> tuple[list[Moment], float]:
    """Train with SGD, momentum 0.9 and a one-cycle schedule.

    Returns `MOMENTS` evenly spaced moments, and the CPU seconds without those for their
    accuracies.
    """
    optimizer = torch.optim.SGD(
        network.parameters(),
        lr=run.learning_rate,
        momentum=0.9,
        weight_decay=run.weight_decay,
    )
    schedule = OneCycle(kind="one-cycle")
    history: list[Moment] = []
    seconds = 0.0
    for epoch in range(run.epochs):
        start = time.process_time()
        network.train()
        batches = shuffled_batches(len(task.labels), run.batch, run.seed, epoch)
        total = 0.0
        for step, members in enumerate(batches):
            factor = schedule.factor(epoch + step / len(batches), run.epochs)
            optimizer.param_groups[0]["lr"] = run.learning_rate * factor
            torch.manual_seed(derive_seed(run.seed, "step", epoch, step))
            images = task.train[members]
            if run.augment:
                images = augment(images)
            torch.manual_seed(derive_seed(run.seed, "noise", epoch, step))
            output, labels = network(images), task.labels[members]
            loss = training_loss(output, labels, network.loss_weights())
            optimizer.zero_grad()
            loss.total.backward()
            optimizer.step()
            total += float(loss.parts["main"]) / len(batches)
        seconds += time.process_time() - start
        if (epoch + 1) * MOMENTS // run.epochs > epoch * MOMENTS // run.epochs:
            every = 1 if epoch + 1 == run.epochs else -(-len(task.test_labels) // SAMPLE)
            branches = accuracies_of_heads(
                network, task.test[::every], task.test_labels[::every]
            )
            main = branches.pop("main")
            loss_of_epoch = round(total, 4) if total < DIVERGED else DIVERGED  # also for NaN
            history.append(
                Moment(epoch=epoch + 1, loss=loss_of_epoch, accuracy=main, branches=branches)
            )
    return history, seconds


def augment(images: Tensor) -> Tensor:
    """Flip *images* at random and shift them by up to four pixels, padded with zeros."""
    count, _, side, _ = images.shape
    flipped = torch.where(torch.rand(count, 1, 1, 1) < 0.5, images.flip(3), images)
    padded = torch.nn.functional.pad(flipped, (4, 4, 4, 4))
    shifts = torch.randint(0, 9, (count, 2)).tolist()
    return torch.stack(
        [padded[i, :, y : y + side, x : x + side] for i, (y, x) in enumerate(shifts)]
    )


def exported_network(network: Classifier, run: Run) -> Backbone:
    """Build the network without training-only modules and load the remaining weights."""
    exported = network.inference_model()
    set_strides(exported, run)
    weights = network.state_dict()
    exported.load_state_dict({name: weights[name] for name in exported.state_dict()})
    return exported.eval()


@torch.no_grad()
def logits_of(network: Backbone, images: Tensor) -> Tensor:
    """Compute the logits of *network* for *images*."""
    return torch.cat(
        [network(images[members]) for members in sequential_batches(len(images), 500)]
    )


@torch.no_grad()
def accuracies_of_heads(
    network: Classifier, images: Tensor, labels: Tensor
) -> dict[str, float]:
    """Compute the accuracy of the network, `main`, and of each branch in eval mode, in percent."""
    network.eval()
    right: dict[str, int] = {}
    for members in sequential_batches(len(images), 500):
        for name, logits in network.heads(images[members]).items():
            right[name] = right.get(name, 0) + int(
                (logits.argmax(dim=1) == labels[members]).sum()
            )
    return {name: round(100.0 * count / len(labels), 3) for name, count in right.items()}
