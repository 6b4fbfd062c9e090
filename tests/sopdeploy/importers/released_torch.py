"""Reference implementations of the released PyTorch networks, and the comparison of an import with them.

fast-MPN-COV's ResNets and VGG, GSoP's ResNets, the CIFAR ResNets: small where the definition leaves
room, with weights and running statistics of their own.
"""

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sopdeploy.checkpoint import build_classifier, read_checkpoint
from sopdeploy.importers.import_weights import ImportReport, import_weights
from sopdeploy.importers.options import ImportOptions
from sopdeploy.models.base import Classifier

NOISE = 3.0  # times the original's own distance from float64
BASE = 16  # channels of the first stage; published networks have 64
SHORT = (2, 1, 1, 1)  # blocks per stage; their weights have every kind of name
VGG_WIDTHS = (64, 128, 256, 512, 512)


def covariance(x: Tensor) -> Tensor:
    x = x.flatten(2)
    positions = x.shape[2]
    centering = torch.eye(positions, dtype=x.dtype) / positions - 1.0 / positions**2
    return x @ centering @ x.transpose(1, 2)


def root(sigma: Tensor, steps: int) -> Tensor:
    eye = torch.eye(sigma.shape[1], dtype=sigma.dtype)
    trace = torch.einsum("bii->b", sigma)[:, None, None]
    y, z = sigma / trace, eye.expand_as(sigma)
    for _ in range(steps):
        t = (3 * eye - z @ y) / 2
        y, z = y @ t, t @ z
    return y * trace.sqrt()


def triangle(matrix: Tensor, order: str) -> Tensor:
    d = matrix.shape[1]
    i, j = torch.triu_indices(d, d) if order == "rows" else torch.tril_indices(d, d).flip(0)
    return matrix[:, i, j]


def conv_bn(inside: int, outside: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))


class Basic(nn.Module):
    """In a CIFAR ResNet, the shortcut pads zeros with *option* "A" and has another name with "B"."""

    def __init__(self, inside: int, width: int, stride: int, option: str = "") -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inside, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        changes = option != "A" and (stride > 1 or inside != width)
        self.short_name = "shortcut" if option == "B" else "downsample"
        self.add_module(self.short_name, conv_bn(inside, width, stride) if changes else None)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        short = getattr(self, self.short_name)
        if short is None and x.shape != out.shape:
            quarter = out.shape[1] // 4
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, quarter, quarter))
        return F.relu(out + (x if short is None else short(x)))


class Bottleneck(nn.Module):
    """With a GSoP block on the residual where *attention* is not "0".

    "1" is channel-wise, "2" position-wise, "+" their sum, "M" their maximum, "&" their concatenation.
    """

    def __init__(
        self, inside: int, width: int, stride: int, attention: str = "0", dr_stride: int = 1
    ) -> None:
        super().__init__()
        out, d = 4 * width, 32
        self.attention = attention
        self.conv1, self.bn1 = nn.Conv2d(inside, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out)
        self.downsample = conv_bn(inside, out, stride) if stride > 1 or inside != out else None
        if attention in {"1", "+", "M", "&"}:
            self.conv_for_DR = nn.Conv2d(out, d, 1, stride=dr_stride)
            self.bn_for_DR, self.row_bn = nn.BatchNorm2d(d), nn.BatchNorm2d(d)
            self.row_conv_group = nn.Conv2d(d, 4 * d, (d, 1), groups=d)
            self.fc_adapt_channels = nn.Conv2d(4 * d, out, 1)
        if attention in {"2", "+", "M", "&"}:
            self.conv_for_DR_spatial = nn.Conv2d(out, d, 1)
            self.bn_for_DR_spatial, self.row_bn_for_spatial = nn.BatchNorm2d(d), nn.BatchNorm2d(64)
            self.row_conv_group_for_spatial = nn.Conv2d(64, 256, (64, 1), groups=64)
            self.fc_adapt_channels_for_spatial = nn.Conv2d(256, 64, 1)
        if attention == "&":
            groups, factor = out // 64, int(math.log2(32 / (out // 64)))
            kernel, padding = (2 * factor + 5, 1), (factor + 2, 0)
            self.dilate_conv_for_concat1 = nn.Conv2d(out, out, kernel, 1, padding, groups=groups)
            self.dilate_conv_for_concat2 = nn.Conv2d(out, out, kernel, 1, padding, groups=groups)
            self.bn_for_concat = nn.BatchNorm2d(out)

    def by_channel(self, x: Tensor) -> Tensor:
        small = F.relu(self.bn_for_DR(self.conv_for_DR(F.relu(x))))
        rows = self.row_conv_group(self.row_bn(covariance(small)[..., None]))
        return x * torch.sigmoid(self.fc_adapt_channels(rows))

    def by_position(self, x: Tensor) -> Tensor:
        reduced = self.bn_for_DR_spatial(self.conv_for_DR_spatial(F.relu(x)))
        small = F.adaptive_avg_pool2d(reduced, 8).flatten(2)
        d = small.shape[1]
        centering = torch.eye(d, dtype=x.dtype) / 64 - 1.0 / 64**2
        rows = self.row_bn_for_spatial((small.transpose(1, 2) @ centering @ small)[..., None])
        hidden = F.relu(self.row_conv_group_for_spatial(rows))
        weights = torch.sigmoid(self.fc_adapt_channels_for_spatial(hidden)).reshape(-1, 1, 8, 8)
        return F.relu(x * F.adaptive_avg_pool2d(weights, x.shape[2:]))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        out = self.bn3(self.conv3(out))
        one = self.by_channel(out) if hasattr(self, "conv_for_DR") else out
        two = self.by_position(out) if hasattr(self, "conv_for_DR_spatial") else out
        if self.attention == "&":
            out = self.bn_for_concat(self.dilate_conv_for_concat1(one) + self.dilate_conv_for_concat2(two))
        elif self.attention == "M":
            out = torch.max(one, two)
        else:
            out = {"0": out, "1": one, "2": two}.get(self.attention, one + two)
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """*d* channels after DR and *steps* of Newton-Schulz, or averages where d is 0."""

    def __init__(
        self,
        blocks: tuple[int, ...],
        *,
        kind: type[Basic | Bottleneck] = Basic,
        classes: int = 5,
        stride: int = 1,
        d: int = 0,
        steps: int = 5,
        order: str = "rows",
        attention: str = "0",
        base: int = BASE,
    ) -> None:
        super().__init__()
        self.d, self.steps, self.order = d, steps, order
        self.conv1, self.bn1 = nn.Conv2d(3, base, 7, 2, 3, bias=False), nn.BatchNorm2d(base)
        inside, growth = base, 4 if kind is Bottleneck else 1
        for number, (width, count, first) in enumerate(
            zip([base * factor for factor in (1, 2, 4, 8)], blocks, (1, 2, 2, stride), strict=True), 1
        ):
            stage = []
            for position in range(count):
                last = position == count - 1 and not (d and number == 4)
                block = {"attention": attention, "dr_stride": 2 if number == 1 else 1}
                how = block if attention != "0" and last else {}
                stage.append(kind(inside, width, 1 if position else first, **how))
                inside = width * growth
            self.add_module(f"layer{number}", nn.Sequential(*stage))
        if d:
            self.layer_reduce, self.layer_reduce_bn = nn.Conv2d(inside, d, 1, bias=False), nn.BatchNorm2d(d)
        self.fc = nn.Linear(d * (d + 1) // 2 if d else inside, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        if not self.d:
            return self.fc(x.mean((2, 3)))
        x = F.relu(self.layer_reduce_bn(self.layer_reduce(x)))
        return self.fc(triangle(root(covariance(x), self.steps), self.order))


class Vgg(nn.Module):
    """VGG-16 with batch norm but for the last max-pooling; *d* channels, or B-CNN where d is 0."""

    def __init__(
        self,
        *,
        d: int,
        linear: bool,
        classes: int = 5,
        widths: tuple[int, ...] = VGG_WIDTHS,
        hidden: int = 4096,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inside = 3
        for number, (width, count) in enumerate(zip(widths, (2, 2, 3, 3, 3), strict=True)):
            layers += [nn.MaxPool2d(2, 2)] if number else []
            for _ in range(count):
                layers += [nn.Conv2d(inside, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
                inside = width
        self.features = nn.Sequential(*layers)
        self.d = d
        length = inside * inside
        if d:
            self.representation = nn.Module()
            self.representation.conv_dr_block = nn.Sequential(*conv_bn(inside, d, 1), nn.ReLU())
            length = d * (d + 1) // 2
        if linear:
            self.classifier: nn.Module = nn.Linear(length, classes)
        else:
            first, second = nn.Linear(length, hidden), nn.Linear(hidden, hidden)
            layers = [first, nn.ReLU(), nn.Dropout(), second, nn.ReLU(), nn.Dropout()]
            self.classifier = nn.Sequential(*layers, nn.Linear(hidden, classes))

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        if self.d:
            x = self.representation.conv_dr_block(x)
            return self.classifier(triangle(root(covariance(x), 5), "rows"))
        x = x.flatten(2)
        products = (x @ x.transpose(1, 2) / x.shape[2]).flatten(1)
        return self.classifier(F.normalize(products.sign() * (products.abs() + 1e-8).sqrt()))


class CifarResNet(nn.Module):
    def __init__(self, blocks: int, option: str = "A", base: int = 16, classes: int = 10) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, base, 3, 1, 1, bias=False), nn.BatchNorm2d(base)
        inside = base
        for number, stride in enumerate((1, 2, 2), 1):
            width = base * 2 ** (number - 1)
            sizes = [(width if p else inside, width, 1 if p else stride) for p in range(blocks)]
            stage = [Basic(*size, option) for size in sizes]
            self.add_module(f"layer{number}", nn.Sequential(*stage))
            inside = width
        self.linear = nn.Linear(inside, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean((2, 3)))


def settled(network: nn.Module) -> nn.Module:
    """Give every batch norm statistics and factors of its own, convolutions a size that lasts; eval mode."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.uniform_(-0.5, 0.5)
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2)
    return network.eval()


def numbered(state: dict[str, Tensor], *, fine_tuned: bool = False) -> dict[str, Tensor]:
    """Name a ResNet's tensors as fast-MPN-COV's training script does, behind `DataParallel`."""
    stages = {f"layer{number}": f"features.module.{number + 3}" for number in range(1, 5)}
    parts = {"conv1": "features.module.0", "bn1": "features.module.1", "fc": "classifier", **stages}
    block = "representation.conv_dr_block"
    reduction = ("features.module.8", "features.module.9") if fine_tuned else (f"{block}.0", f"{block}.1")
    parts |= dict(zip(("layer_reduce", "layer_reduce_bn"), reduction, strict=True))
    return {f"{parts[name.split('.')[0]]}.{name.split('.', 1)[1]}": value for name, value in state.items()}


def prefixed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"module.{name}": value for name, value in state.items()}


def imported(source: Path, name: str, **options: Any) -> tuple[Classifier, ImportReport]:
    """Import *source* as *name*; `settings` has dotted keys."""
    settings = options.pop("settings", {})
    out = source.with_name("imported.pt")
    report = import_weights(source, name, out, ImportOptions(**options), settings)
    return build_classifier(read_checkpoint(out), out), report


def random_images(side: int) -> Tensor:
    """Make two images of different contrast, so that their covariances differ, too."""
    torch.manual_seed(1)
    return torch.randn(2, 3, side, side) * torch.tensor([0.5, 2.0])[:, None, None, None]


@torch.no_grad()
def assert_same_logits(ours: nn.Module, original: nn.Module, images: Tensor) -> None:
    """Compare the logits in float64, and in float32 within the noise of *original*, which ends in float32."""
    exact = original.double()(images.double())
    noise = (original.float()(images.float()).double() - exact).abs().max()
    ours32 = ours.float()(images.float()).double()
    ours64 = ours.double()(images.double())
    assert (exact[0] - exact[1]).abs().max() > 1e-3, "logits that do not differ prove nothing"
    torch.testing.assert_close(ours64, exact, rtol=1e-7, atol=1e-7)
    assert (ours32 - exact).abs().max() <= NOISE * noise
