"""What is exported: a trained network, the parts to remove from it, and the facts that its bundle records."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from sopdeploy.base.plugins import plugin_versions
from sopdeploy.base.project import Origin
from sopdeploy.bundle.decision import Decision
from sopdeploy.bundle.manifest import PixelComparison
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.models.backbones.base import Backbone
from sopdeploy.models.base import Classifier, is_in
from sopdeploy_export.network import tensors


@dataclass(frozen=True, kw_only=True, slots=True)
class Detachment:
    """The modules to remove from a trained network, and the plain network that must remain.

    Attributes:
        training_only: Dotted names of the removed parts.
        plain: Builds the network to compare with, with any weights; `None` if there is no builder.
        role: `plain` if *plain* builds the network without the removed parts; `rebuilt` if it builds the
            trained network again.
        rename: Maps the name of a tensor of the trained network to its name in the plain network.
        allow_constants: Accept large tensors that no module registers.
    """

    training_only: tuple[str, ...] = ()
    plain: Callable[[], nn.Module] | None = None
    role: Literal["plain", "rebuilt"] = "plain"
    rename: Callable[[str], str] = str
    allow_constants: bool = True

    @classmethod
    def of(cls, network: Classifier) -> "Detachment":
        """Build the detachment that *network*, a network of the catalog, declares.

        Parts without tensors are left out.
        """

        def plain() -> Backbone:
            built = network.inference_model()
            built.outputs = network.outputs  # so that both return the same values
            return built

        names = tensors(network)
        parts = (
            part for part in network.training_only if any(is_in(name, part) for name in names)
        )
        return cls(training_only=tuple(parts), plain=plain)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportSubject:
    """A trained network to export.

    `export_checkpoint` creates one from a checkpoint, `export_network` from any
    network.

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
        compare_pixels: Compares the pixels of *preprocess* with those of the training; returns `None` if
            these are not known.
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
    compare_pixels: Callable[[], PixelComparison | None] = lambda: None
    warnings: tuple[str, ...] = ()

    def plugins(self) -> dict[str, str]:
        """Return the versions of the plug-ins that define parts of the network or provided its images."""
        recorded = self.training.get("plugins")
        if not isinstance(recorded, dict):  # checkpoints can hold anything
            recorded = {}
        versions = {str(name): str(version) for name, version in recorded.items()}
        return {**versions, **plugin_versions(self.network.modules())}
