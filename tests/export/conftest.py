"""Networks small enough to be proved in a second."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from sopdeploy.models.base import Classifier
from sopdeploy.models.catalog import create_model
from sopdeploy.preprocess import Preprocess
from sopdeploy_export.probe_images import probe_images

SIDE = 16


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def preprocess() -> Preprocess:
    return Preprocess(resize=SIDE, crop=SIDE)


@pytest.fixture(scope="session")
def probes(preprocess: Preprocess) -> Tensor:
    return torch.from_numpy(probe_images(preprocess))


@pytest.fixture
def make() -> Callable[..., Classifier]:
    return trained


def trained(name: str = "dsop-resnet8", **config: object) -> Classifier:
    """A network whose batch norms are not at their start, so that every weight counts."""
    torch.manual_seed(7)
    network = create_model(name, num_classes=10, **config)
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias, std=0.2)
            nn.init.normal_(part.running_mean, std=0.2)
            nn.init.uniform_(part.running_var, 0.5, 1.5)
    return network.eval()
