"""The input of an export: a trained network with its classes, its preprocessing and its origin."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from sopdeploy.bundle.folder import label_problem
from sopdeploy.decision import Decision
from sopdeploy.errors import ConfigError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.plugins import makers
from sopdeploy.project import Origin
from sopdeploy_export.proof.networks import Detachment


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
