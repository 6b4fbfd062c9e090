"""What the pipeline exports: a trained network, and what its bundle says about it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from sopdeploy.decision import Decision
from sopdeploy.images.preprocess import Preprocess
from sopdeploy_export.proof.certificate import Detachment

if TYPE_CHECKING:  # the summary is made for the report, which reads subjects
    from sopdeploy_export.report.network_summary import NetworkSummary


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportSubject:
    """A trained network to export.

    The catalog creates one from a checkpoint, `export_network` from any network.

    Attributes:
        name: Name of the model in the bundle.
        network: The network as it was trained, in eval mode.
        detachment: The training-only parts, and the plain network that must remain without them.
        labels: Class names, in the order of the logits.
        preprocess: From an image to the input of the network.
        config: What the manifest records of the network's construction.
        sha256: Hash of the checkpoint or weight file; for a network in memory, of its tensors.
        summary: Summarizes the modules and their costs, for the report.
        decision: How logits become a decision; `None` is softmax.
        training: Recipe, epoch and metrics, for the model card.
        warnings: What the checks found that does not stop the export.
    """

    name: str
    network: nn.Module
    detachment: Detachment
    labels: tuple[str, ...]
    preprocess: Preprocess
    config: Mapping[str, Any]
    sha256: str
    summary: "Callable[[], NetworkSummary]"
    decision: Decision | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
