"""Train one network on one task with one seed, and measure the accuracy of the exported network.

Runs with the same seed are paired: they use the same images, the same initial value of each weight that a
network shares with the plain one of its family, and the same order of batches, augmentation and noise. The
accuracy after the last epoch counts.
"""

import hashlib
import json
import time
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pydantic
import torch
from torch import Tensor

from gain.networks import (
    DSoPTextureNet,
    DSoPTextureNetConfig,
    ExtraConvSmallResNet,
    ExtraConvSmallResNetConfig,
    PlainTextureNet,
    TextureNetConfig,
)
from gain.photos import (
    DSoPLastStages,
    DSoPLastStagesConfig,
    HeadLastStages,
    HeadLastStagesConfig,
    LastStagesConfig,
    PhotosConfig,
    keep_statistics,
    load_weights,
    photos,
    remove_first_stages,
    start_from_head,
)
from gain.task import CifarConfig, DigitsConfig, Task, cifar, digits
from gain.textures import TextureConfig, textures
from sopdeploy.backbones.base import Backbone
from sopdeploy.backbones.cifar_resnet import SmallResNet, SmallResNetConfig
from sopdeploy.config import StrictModel
from sopdeploy.data.batches import sequential_batches, shuffled_batches
from sopdeploy.layers.residual import PaddedShortcut
from sopdeploy.models.base import Classifier, as_classifier
from sopdeploy.models.dsop_networks import DSoPSmallResNet, DSoPSmallResNetConfig
from sopdeploy.models.timm_networks import PlainTimm, TimmBackbone
from sopdeploy.seeds import derive_seed
from sopdeploy.training.loop.losses import training_loss
from sopdeploy.training.loop_settings import Cosine, OneCycle, Schedule
from sopdeploy_export.proof.networks import detach

CLASSES = 10
# Options of the part that all networks of a family share.
TRUNK = {"filters", "stride", "hidden", "depth", "base_width", "shortcut", "backbone"}
NETWORKS: dict[str, tuple[type[Classifier], type[StrictModel]]] = {
    "textures": (PlainTextureNet, TextureNetConfig),
    "dsop-textures": (DSoPTextureNet, DSoPTextureNetConfig),
    "resnet": (as_classifier(SmallResNet), SmallResNetConfig),
    "dsop-resnet": (DSoPSmallResNet, DSoPSmallResNetConfig),
    "wide-resnet": (ExtraConvSmallResNet, ExtraConvSmallResNetConfig),
    "photos": (PlainTimm, LastStagesConfig),
    "dsop-photos": (DSoPLastStages, DSoPLastStagesConfig),
    "head-photos": (HeadLastStages, HeadLastStagesConfig),
}


class Run(StrictModel):
    """All inputs of a run; `revision` increases when a change of the code changes results.

    `strides` are the strides of the stem and of the last stage of a ResNet.
    """

    revision: Literal[1] = 1
    task: TextureConfig | DigitsConfig | CifarConfig | PhotosConfig
    network: str
    config: dict[str, Any] = pydantic.Field(default_factory=dict)
    strides: tuple[int, int] | None = None
    epochs: Annotated[int, pydantic.Field(ge=0)]
    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: float
    label_smoothing: float = 0.0
    batch: int = 64
    weight_decay: float = 5e-4
    augment: bool = False
    seed: int

    @property
    def key(self) -> str:
        """File name of the result; independent of the location of the images."""
        values = self.model_dump(
            mode="json", exclude={"task": {"arrays", "maps", "weights"}}, exclude_defaults=True
        )
        text = f"{type(self.task).__name__} revision {self.revision} {json.dumps(values, sort_keys=True)}"
        return hashlib.sha256(text.encode()).hexdigest()[:24]


class Outcome(StrictModel):
    """Accuracy of the exported network in percent, CPU seconds of the training, loss of the last epoch."""

    accuracy: float
    seconds: float
    loss: float


def train_and_measure(run: Run) -> Outcome:
    """Train, detach, rebuild the network without training-only modules, and measure its accuracy."""
    torch.set_num_threads(1)
    task = open_task(run)
    network = build(run)
    if isinstance(network, TimmBackbone):
        start_from_head(network, task)
    start = time.process_time()
    loss = train(network, task, run)
    seconds = time.process_time() - start
    exported = exported_network(network, run)
    return Outcome(accuracy=accuracy(exported, task), seconds=seconds, loss=loss)


def open_task(run: Run) -> Task:
    """Load or generate the task's images for the run's seed."""
    match run.task:
        case TextureConfig():
            return textures(run.task, run.seed)
        case DigitsConfig():
            return digits(run.task, run.seed)
        case CifarConfig():
            return cifar(run.task, run.seed)
        case PhotosConfig():
            return photos(run.task, run.seed)


def build(run: Run) -> Classifier:
    """Create the run's network; weights shared with the family's plain network have equal initial values."""
    family = run.network.rpartition("-")[2]
    network = create_network(run.network, run.config, run)
    plain = create_network(family, {key: value for key, value in run.config.items() if key in TRUNK}, run)
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
    classes = run.task.classes if isinstance(run.task, PhotosConfig) else CLASSES
    network = kind(config.model_validate(values), classes)
    if isinstance(network, TimmBackbone) and isinstance(run.task, PhotosConfig):
        load_weights(network, run.task.weights)
    adapt(network, run)
    return network


def adapt(network: Backbone, run: Run) -> None:
    """Change *network* to the input of the run: feature maps of photographs, or smaller maps of CIFAR."""
    if isinstance(network, TimmBackbone):
        remove_first_stages(network)
        network.to(memory_format=torch.channels_last)  # a third faster on a CPU
    set_strides(network, run)


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


def train(network: Classifier, task: Task, run: Run) -> float:
    """Train with SGD, momentum 0.9 and a one-cycle schedule, or with AdamW, a warm-up and a cosine.

    Returns the mean loss of the last epoch.
    """
    options = {"lr": run.learning_rate, "weight_decay": run.weight_decay}
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    if run.optimizer == "sgd":
        optimizer = torch.optim.SGD(network.parameters(), momentum=0.9, **options)
        schedule = OneCycle(kind="one-cycle")
    else:
        optimizer = torch.optim.AdamW(network.parameters(), **options)
        schedule = Cosine(kind="cosine", warmup_epochs=0.5)
    network.train()
    if isinstance(network, TimmBackbone):
        keep_statistics(network)
    total = 0.0
    for epoch in range(run.epochs):
        batches = shuffled_batches(len(task.labels), run.batch, run.seed, epoch)
        total = 0.0
        for step, members in enumerate(batches):
            factor = schedule.factor(epoch + step / len(batches), run.epochs)
            optimizer.param_groups[0]["lr"] = run.learning_rate * factor
            torch.manual_seed(derive_seed(run.seed, "step", epoch, step))
            images = task.train[members]
            if images.dim() == 5:  # augmented before, (B, variants, C, H, W)
                images = images[:, epoch % images.shape[1]]
            if run.augment:
                images = augment(images)
            torch.manual_seed(derive_seed(run.seed, "noise", epoch, step))
            output, labels = network(images), task.labels[members]
            loss = training_loss(output, labels, network.loss_weights(), run.label_smoothing)
            optimizer.zero_grad()
            loss.total.backward()
            optimizer.step()
            total += float(loss.parts["main"]) / len(batches)
    return total


def augment(images: Tensor) -> Tensor:
    """Flip *images* at random and shift them by up to four pixels, padded with zeros."""
    count, _, side, _ = images.shape
    flipped = torch.where(torch.rand(count, 1, 1, 1) < 0.5, images.flip(3), images)
    padded = torch.nn.functional.pad(flipped, (4, 4, 4, 4))
    shifts = torch.randint(0, 9, (count, 2)).tolist()
    return torch.stack([padded[i, :, y : y + side, x : x + side] for i, (y, x) in enumerate(shifts)])


def exported_network(network: Classifier, run: Run) -> Backbone:
    """Build the network without training-only modules and load the remaining weights."""
    detached = detach(network) if network.training_only else network
    exported = network.inference_model()
    adapt(exported, run)
    exported.load_state_dict(detached.state_dict())
    return exported.eval()


@torch.no_grad()
def accuracy(network: Backbone, task: Task) -> float:
    """Compute the percentage of test images that *network* classifies correctly."""
    correct = 0
    for members in sequential_batches(len(task.test_labels), 500):
        correct += int((network(task.test[members]).argmax(dim=1) == task.test_labels[members]).sum())
    return 100.0 * correct / len(task.test_labels)
