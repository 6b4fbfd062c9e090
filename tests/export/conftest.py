"""Small networks and bundles that the tests of the exporter share."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sopdeploy.images.preprocess import Preprocess
from sopdeploy.models.base import Classifier
from sopdeploy.models.gmsop import GatedResNet
from sopdeploy.models.registry import create_model
from sopdeploy.weights.checkpoint import Checkpoint, write_checkpoint
from sopdeploy_export.capture.deployed import generated_images
from sopdeploy_export.export_checkpoint import export_checkpoint
from sopdeploy_export.options import ExportOptions
from sopdeploy_export.pack.results import Exported
from tests.export.once import proving_once
from tests.support import quick_torch

SIDE = 16
PREPROCESS = Preprocess(resize=SIDE, crop=SIDE)
LABELS = tuple("abcdefghij")
MIXTURE = {"components": 4, "chosen": 2, "blocks_per_stage": 1}
GMGAP: dict[str, Any] = {
    **MIXTURE,
    "component_widths": (6,),
    "gate_widths": (),
    "conv5_stride": 1,
}
GMSOP: dict[str, Any] = {
    **MIXTURE,
    "component_widths": (8, 6),
    "gate_widths": (8, 6),
    "conv5_stride": 1,
    "iterations": 2,
}
HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(2)>',
    "</title></svg><iframe>",
    "\u202edesrever",
    "[bold red]rich[/]",
    "&lt;",
    *"ghij",
)


class Minimal(nn.Module):
    """A network of one function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, images: Tensor) -> Tensor:
        return self.function(images)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    with quick_torch.one_thread():
        yield


@pytest.fixture(scope="session")
def preprocess() -> Preprocess:
    return PREPROCESS


@pytest.fixture(scope="session")
def probes(preprocess: Preprocess) -> Tensor:
    return torch.from_numpy(generated_images(preprocess.crop))


@pytest.fixture
def make() -> Callable[..., Classifier]:
    return trained


def trained(name: str = "dsop-resnet8", **config: object) -> Classifier:
    """Build a network whose batch norms do not have their initial values, so that every weight matters."""
    torch.manual_seed(7)
    network = create_model(name, num_classes=10, **config)
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias, std=0.2)
            nn.init.normal_(part.running_mean, std=0.2)
            nn.init.uniform_(part.running_var, 0.5, 1.5)
    if isinstance(
        network, GatedResNet
    ):  # its gate begins with zeros, which choose the same components
        nn.init.normal_(network.get_parameter("gate.weight"), std=0.1)
    return network.eval()


def save(
    network: Classifier,
    name: str,
    path: Path,
    preprocess: Preprocess,
    labels: tuple[str, ...] = LABELS,
) -> Path:
    """Write *network* as a checkpoint and return its path."""
    checkpoint = Checkpoint(
        model=name,
        config=network.config.model_dump(mode="json"),
        weights=network.state_dict(),
        labels=labels,
        preprocess=preprocess,
        training={"epoch": 3},
    )
    write_checkpoint(path, checkpoint)
    return path


def export_once(
    network: Classifier,
    name: str,
    folder: Path,
    *,
    preprocess: Preprocess = PREPROCESS,
    labels: tuple[str, ...] = LABELS,
    **options: Any,
) -> Exported:
    """Export *network*, which is captured once for all tests of this process."""
    checkpoint = save(network, name, folder / "ckpt.pt", preprocess, labels)
    chosen = ExportOptions.model_validate({"detach": bool(network.training_only), **options})
    with proving_once():
        return export_checkpoint(checkpoint, folder / "out", options=chosen)


@pytest.fixture(scope="session")
def branched(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("branched")
    return export_once(trained(), "dsop-resnet8", folder, labels=HOSTILE, max_batch=4)


@pytest.fixture(scope="session")
def gated(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    network, folder = trained("gmgap-16-8-resnet18", **GMGAP), tmp_path_factory.mktemp("gated")
    return export_once(network, "gmgap-16-8-resnet18", folder, labels=HOSTILE, max_batch=1)
