"""Small networks outside of the catalog, as users write them: some to export, some to reject."""

import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.ops import DeformConv2d

from sopdeploy.images.preprocess import Preprocess
from sopdeploy.layers.isqrt_cov import ISqrtCov
from sopdeploy_export.pack.results import Exported
from sopdeploy_export.user_network.export_network import export_network

CLASSES = 4
SIDE = 12
PREPROCESS = Preprocess(resize=SIDE, crop=SIDE)


def export_small(network: nn.Module, destination: Path, **options: Any) -> Exported:
    """Export *network* with four classes; *options* are those of `export_network`."""
    defaults = {"labels": list("abcd"), "preprocess": PREPROCESS, "name": "small"}
    return export_network(network, destination=destination, **defaults | options)


class Small(nn.Module):
    """Two convolutions, a classifier and an auxiliary head that only training uses."""

    def __init__(self, *, aux: bool = True) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.aux = nn.Linear(8, CLASSES) if aux else None
        self.fc = nn.Linear(8, CLASSES)

    def features(self, images: Tensor) -> Tensor:
        return self.stem(images).mean((2, 3))

    def forward(self, images: Tensor) -> Any:
        features = self.features(images)
        if self.training and self.aux is not None:
            return self.fc(features), self.aux(features)
        return self.fc(features)


class Sigmoid(Small):
    """Ends in a sigmoid."""

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.features(images)).sigmoid()


class Hides(Small):
    """Holds a tensor that is neither a parameter nor a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.linspace(0, 1, 8 * CLASSES).reshape(8, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        features = self.features(images)
        return self.fc(features) + features @ self.table


TABLE = torch.linspace(0, 1, 8 * CLASSES).reshape(8, CLASSES)


class Shares(Small):
    """Reads a tensor that all networks of the class share."""

    def forward(self, images: Tensor) -> Tensor:
        features = self.features(images)
        return self.fc(features) + features @ TABLE


class Generator(nn.Linear):
    """Returns a generator."""

    def forward(self, features: Tensor) -> Any:
        return (each for each in [super().forward(features)])


class Generates(Small):
    """Calls two heads that its output does not need."""

    def __init__(self) -> None:
        super().__init__()
        self.aux, self.head = Generator(8, CLASSES), nn.Linear(8, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        features = self.features(images)
        self.aux(features)
        self.head(features)
        return self.fc(features)


def variant(forward: Callable[[Any, Tensor], Any], *, aux: bool = True) -> Small:
    """Build a `Small` of a class with another *forward*."""
    return type("Variant", (Small,), {"forward": forward})(aux=aux)


class Exits(Small):
    """Returns the logits, and those of a list of heads whose length it reads."""

    def __init__(self) -> None:
        super().__init__(aux=False)
        self.heads = nn.ModuleList(nn.Linear(8, CLASSES) for _ in range(2))

    def forward(self, images: Tensor) -> Any:
        features = self.features(images)
        return self.fc(features), [self.heads[i](features) for i in range(len(self.heads))]


class SharesClassifier(Small):
    """Has a branch that ends in the classifier of the trunk."""

    def __init__(self) -> None:
        super().__init__(aux=False)
        self.branch = nn.Sequential(nn.Linear(8, 8), self.fc)

    def forward(self, images: Tensor) -> Any:
        features = self.features(images)
        if self.training:
            return self.fc(features), self.branch(features)
        return self.fc(features)


class Sketch(Small):
    """Multiplies by random signs, which the state dict does not hold."""

    def __init__(self) -> None:
        super().__init__(aux=False)
        self.register_buffer("signs", torch.randn(8), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.features(images) * self.signs)


def talking() -> Small:
    """Build a `Small`, and print on stdout from Python and from another program."""
    sys.stdout.write("from Python\n")
    subprocess.run([sys.executable, "-c", "print('from a program')"], check=True)
    return Small()


class Keeps(nn.Module):
    """Keeps the options that it is built with."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options


class SecondOrder(nn.Module):
    """A user's network with iSQRT-COV pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.pooling = ISqrtCov(6)
        self.fc = nn.Linear(self.pooling.out_features, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.pooling(self.stem(images)))


class DeformableConvolution(nn.Module):
    """Its operator has no form in opset 18, but one in opset 20."""

    def __init__(self, *, has_mask: bool = False) -> None:
        super().__init__()
        self.offset, self.conv = (
            nn.Conv2d(3, 18, 3, padding=1),
            DeformConv2d(3, 8, 3, padding=1),
        )
        self.mask = nn.Conv2d(3, 9, 3, padding=1) if has_mask else None
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        mask = None if self.mask is None else self.mask(images).sigmoid()
        return self.fc(self.conv(images, self.offset(images), mask).mean((2, 3)))


class Clamp(torch.autograd.Function):
    """A function with a gradient of its own."""

    @staticmethod
    def forward(_context: Any, features: Tensor) -> Tensor:
        return features.clamp(min=0)

    @staticmethod
    def backward(_context: Any, gradient: Tensor) -> Tensor:
        return gradient


def trained(network: nn.Module) -> nn.Module:
    """Give *network* weights and statistics that all matter."""
    torch.manual_seed(3)
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.is_floating_point() and not isinstance(tensor, nn.UninitializedParameter):
            nn.init.uniform_(tensor, 0.1, 0.9)
    return network.eval()


def with_nan(network: Small) -> Small:
    """Damage one weight."""
    network.stem[0].weight.data[0, 0, 0, 0] = float("nan")
    return network


def lazy() -> nn.Module:
    """Build a network whose classifier was never run."""
    network = Small(aux=False)
    network.fc = nn.LazyLinear(CLASSES)
    return network.eval()


def uses_numpy(self: Any, images: Tensor) -> Tensor:
    """Leave torch."""
    return self.fc(torch.from_numpy(np.tanh(self.features(images).numpy())))


def probabilities(self: Any, images: Tensor) -> Tensor:
    """End in a softmax."""
    return self.fc(self.features(images)).softmax(1)


def as_dict(self: Any, images: Tensor) -> dict[str, Tensor]:
    """Return a dict."""
    features = self.features(images)
    return OrderedDict(out=self.fc(features), features=features)


def exits(self: Any, images: Tensor) -> list[Tensor]:
    """Return the logits of several exits, the last one last."""
    features = self.features(images)
    early = features if self.aux is None else self.aux(features)
    return [early, self.fc(features)]


def in_float64(self: Any, images: Tensor) -> Tensor:
    """Multiply the features by a matrix in float64."""
    features = self.features(images).double()
    return self.fc((features @ torch.eye(8).type(features.dtype)).float())


def is_unusual(self: Any, images: Tensor) -> Tensor:
    """Write to its input, fill a cache, and use a function with a gradient of its own."""
    if not hasattr(self, "scale"):
        self.scale = torch.ones(8)
    return self.fc(Clamp.apply(self.features(images.sub_(0.5))) * self.scale)


@torch.inference_mode()
def in_inference_mode() -> nn.Module:
    """Build a network whose weights have no version."""
    return Small(aux=False).eval()


def divides_by_zero(self: Any, images: Tensor) -> Tensor:
    """Divide by the deviation of the image, which is 0 for an image of one color."""
    return self.fc(self.features(images) / images.std((2, 3)).mean(1, keepdim=True))


def unbuildable() -> nn.Module:
    raise AssertionError("a cheap check comes first")
