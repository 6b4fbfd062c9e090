"""The input of an export: a trained network with its classes, its preprocessing, its origin and its costs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from sopdeploy.bundle.folder import label_problem
from sopdeploy.checkpoint import Checkpoint
from sopdeploy.config import StrictModel
from sopdeploy.decision import Decision
from sopdeploy.errors import ConfigError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.models.registry import create_model
from sopdeploy.models.stats import Counts, tally
from sopdeploy.plugins import makers
from sopdeploy.project import Origin
from sopdeploy_export.proof.networks import Detachment


class NetworkSummary(StrictModel):
    """The costs of the network as it was trained, and of what is exported."""

    trained: Counts
    shipped: Counts


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportSubject:
    """A trained network to export.

    `pipeline.export_checkpoint` creates one from a checkpoint, `export_network` from any network.

    Attributes:
        name: Name of the network, such as `dsop-resnet18`.
        project: Name of the project, which names the bundle.
        network: The network as it was trained, in eval mode.
        detachment: The training-only parts, and the plain network that must remain without them.
        labels: Class names, in the order of the logits.
        preprocess: Converts an image to the input of the network.
        config: The options that the network was built with, for the manifest.
        sha256: Hash of the checkpoint or weight file; for a network in memory, of its tensors.
        summary: Summarizes the modules and their costs, for the report.
        decision: How logits become classes; `None` for softmax without thresholds.
        training: Recipe, epoch and metrics, for the model card.
        origin: The run and its images; `None` if `train` did not train the network.
        warnings: Findings of the checks that do not stop the export.
    """

    name: str
    project: str
    network: nn.Module
    detachment: Detachment
    labels: tuple[str, ...]
    preprocess: Preprocess
    config: Mapping[str, Any]
    sha256: str
    summary: Callable[[], NetworkSummary]
    decision: Decision | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    origin: Origin | None = None
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raise `ConfigError` for a class name that no file of a bundle can hold."""
        if problem := label_problem(self.labels):
            raise ConfigError(f"{problem}; rename the class and train again")

    def plugins(self) -> dict[str, str]:
        """Return the versions of the plug-ins that define parts of the network or provided its images."""
        recorded = self.training.get("plugins")
        recorded = recorded if isinstance(recorded, dict) else {}
        return {**{str(name): str(recorded[name]) for name in recorded}, **makers(self.network.modules())}


def summarize_checkpoint(checkpoint: Checkpoint) -> NetworkSummary:
    """Summarize the network of *checkpoint* at its input size, without allocating memory."""
    with torch.device("meta"):
        network = create_model(checkpoint.model, num_classes=len(checkpoint.labels), **checkpoint.config)
        plain = network.inference_model() if network.training_only else network
    return summarize(network, plain, checkpoint.preprocess.crop)


def summarize(network: nn.Module, shipped: nn.Module, side: int) -> NetworkSummary:
    """Count the costs of *network*, and of *shipped*, the network without its training-only parts.

    Both networks run on images of *side* x *side* pixels, on `meta` or the CPU, and may change between train
    and eval mode. If *network* fails in train mode, for example without targets, it runs in eval mode.
    """
    exported = tally(shipped.eval(), side).total()
    with torch.random.fork_rng(devices=()):  # dropout draws random numbers
        try:
            trained = tally(network.train(), side).total()
        except Exception:  # the network's own code, which can raise anything
            trained = tally(network.eval(), side).total()
    return NetworkSummary(trained=trained, shipped=exported)
