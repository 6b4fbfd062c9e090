"""Pieces of code that users of PyTorch write, in small networks, and what the exporter makes of each."""

import collections
import functools
import types
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, weight_norm
from torch.optim.swa_utils import AveragedModel

from sopdeploy.layers.gsop_block import GSoPBlock, GSoPBlockConfig
from tests.export.user_network.networks import CLASSES, Small, variant

ONLY, PLAIN, DETACHED = "trained-only", "trained-plain", "trained-detached"
# The options of the export, the proof or the message
Case = tuple[Callable[[], nn.Module], dict[str, Any], str]


def forward(function: Callable[[Any, Tensor], Any]) -> Callable[[], nn.Module]:
    """Return a builder of a network without auxiliary head whose `forward` is *function*."""
    return lambda: variant(function, aux=False)


def pooled(function: Callable[[Any, Tensor], Tensor]) -> Callable[[], nn.Module]:
    """Return a builder of a network whose classifier reads what *function* makes of the feature map."""
    return forward(lambda net, x: net.fc(function(net, net.stem(x))))


def with_parts(function: Callable[[Any, Tensor], Any], **parts: Any) -> Callable[[], nn.Module]:
    """Return a builder of a network with more attributes, each the result of a function."""

    def build() -> nn.Module:
        network = variant(function, aux=False)
        for name, make in parts.items():
            setattr(network, name, make())
        return network

    return build


def changed(change: Callable[[Any], Any]) -> Callable[[], nn.Module]:
    """Return a builder of a network that *change* changes in place."""

    def build() -> nn.Module:
        network = Small(aux=False)
        change(network)
        return network

    return build


def flagged(doubles: Callable[[Any], Any]) -> Callable[[], nn.Module]:
    """Return a builder of a network that doubles its logits if *doubles* says so, which it does not."""

    def build() -> nn.Module:
        network: Any = forward(lambda net, x: logits(net, x) * (2.0 if doubles(net) else 1.0))()
        network.register_buffer("flag", torch.tensor(1, dtype=torch.uint8))
        network.gain = nn.Parameter(torch.ones(1))
        return network

    return build


def halved_data(features: Tensor) -> Tensor:
    features.data.mul_(0.5)
    return features


def logits(net: Any, images: Tensor) -> Tensor:
    return net.fc(net.features(images))


def fails_if_captured(_net: Any, features: Tensor) -> Tensor:
    if type(features) is not Tensor:
        raise ValueError("1" * 150 + " 2" * 100)
    return features.mean((2, 3))


class ModelOutput(collections.OrderedDict[str, Tensor]):
    """The output of transformers: a dict whose keys are attributes, too."""

    def __getattr__(self, name: str) -> Tensor:
        return self[name]


class Head(nn.Linear):
    def forward(self, x: Tensor) -> Any:
        return ModelOutput(logits=super().forward(x))


class Metric(nn.Module):
    """A metric as of torchmetrics, which wraps its methods on the instance."""

    def __init__(self) -> None:
        super().__init__()
        self.total = torch.zeros(())
        self.update = self.counted(self.update)  # type: ignore[method-assign]

    def counted(self, update: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(update)
        def wrapped(*values: Tensor) -> None:
            self.updated = True
            update(*values)

        return wrapped

    def update(self, predicted: Tensor, target: Tensor) -> None:
        self.total = self.total + (predicted == target).sum()


class LightningModule(Small):
    """A module that trains itself: with a metric, hyperparameters, a trainer and steps."""

    def __init__(self) -> None:
        super().__init__(aux=False)
        self.accuracy, self.criterion = Metric(), nn.CrossEntropyLoss()
        self.hparams, self.trainer = {"lr": 0.1}, None

    def training_step(self, batch: tuple[Tensor, Tensor], _index: int) -> Tensor:
        images, targets = batch
        predicted = self(images)
        self.accuracy.update(predicted.argmax(1), targets)
        return self.criterion(predicted, targets)


class Adapter(nn.Module):
    """A low-rank adapter of a linear layer that is not merged, as of peft."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer, self.scaling = base, {"default": 2.0}
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, base.out_features, bias=False)})
        self.active_adapters = ["default"]

    def forward(self, x: Tensor) -> Tensor:
        result = self.base_layer(x)
        for name in self.active_adapters:
            result = result + self.lora_B[name](self.lora_A[name](x)) * self.scaling[name]
        return result


class Lazy(Mapping[str, Any]):
    """A registry that imports what it lists, as of transformers."""

    def __getitem__(self, key: str) -> Any:
        raise ImportError(key)

    def __iter__(self) -> Any:
        return iter(("one", "two"))

    def __len__(self) -> int:
        return 2


class Attention(nn.Module):
    """Attention with views before and behind the transposition."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, 2, 4).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v)
        mixed = mixed.view(batch, 2, length, 2, 2).transpose(1, 2)
        return self.proj(mixed.reshape(batch, length, 8))


class CausalAttention(nn.Module):
    """Attention to earlier tokens, whose mask is a buffer of infinities."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.register_buffer("mask", torch.full((16, 16), -torch.inf).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return (q @ k.transpose(1, 2) + self.mask).softmax(-1) @ v


class MaskedAttention(nn.Module):
    """Attention of two heads to the tokens that *mask*, a function of queries, keys and tokens, allows."""

    def __init__(self, mask: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.qkv, self.mask = nn.Linear(8, 24), mask

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(x.shape[0], -1, 3, 2, 4).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, self.mask(q, k, x))
        return mixed.transpose(1, 2).reshape(x.shape[0], -1, 8)


def bright_keys(_q: Tensor, _k: Tensor, x: Tensor) -> Tensor:
    dark = x.mean(-1)[:, None, None] < 1
    return torch.zeros_like(dark, dtype=x.dtype).masked_fill(dark, -torch.inf)


def near_keys(q: Tensor, k: Tensor, _x: Tensor) -> Tensor:
    return q @ k.mT > 1


def tokens(net: Any, x: Tensor) -> Tensor:
    mixed: Tensor = net.attention(net.stem(x)[:, :, ::3, ::3].flatten(2).transpose(1, 2))
    return net.fc(mixed.mean(1))


class SavesHead(Small):
    """Its state dict has the trained layer only, as of fine-tuning."""

    def __init__(self) -> None:
        super().__init__(aux=False)

    def state_dict(self, **options: Any) -> Any:
        return {
            name: value for name, value in super().state_dict(**options).items() if "fc" in name
        }


class AlwaysDrops(nn.Dropout):
    def train(self, mode: bool = True) -> "AlwaysDrops":
        return super().train(True)


class KeepsTraining(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Dropout())

    def train(self, mode: bool = True) -> "KeepsTraining":
        self.training = mode  # that of its parts stays
        return self


def adds_in_place(net: Any, x: Tensor) -> Tensor:
    features = net.features(x)
    features += features.relu()
    return net.fc(features)


def by_image(net: Any, x: Tensor) -> Tensor:
    return torch.stack([net.fc(features) for features in net.features(x)])


def without_autocast(net: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return logits(net, x.float())


def average(net: Any, x: Tensor) -> Tensor:
    windows = F.avg_pool2d(net.stem(x)[:, :, :7], (5, 2), (3, 3), (2, 1), ceil_mode=True)
    return net.fc(windows.mean((2, 3)))


class Distances(Small):
    """Makes a table for the size of the images in its first run, as ConViT of timm does."""

    def __init__(self) -> None:
        super().__init__(aux=False)
        self.register_buffer("table", torch.zeros(1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        features = self.stem(images)
        if self.table.shape[0] != features.shape[2]:
            positions = torch.arange(float(features.shape[2]))
            self.table = (positions[:, None] - positions).abs()
        return self.fc((features * self.table).mean((2, 3)))


class KeepsTable(Small):
    """Keeps a table of its weights for each device, as Levit does."""

    def __init__(self) -> None:
        super().__init__(aux=False)
        self.kept: dict[str, Tensor] = {}

    def forward(self, images: Tensor) -> Tensor:
        features = self.features(images)
        device = str(images.device)
        if device not in self.kept:
            self.kept[device] = self.fc.weight * 2
        return F.linear(features, self.kept[device], self.fc.bias)


def registers(net: Any, x: Tensor) -> Tensor:
    if not hasattr(net, "table"):
        net.register_buffer("table", torch.linspace(0, 1, x.shape[2]), persistent=False)
    return logits(net, x * net.table)


def profiled(net: Any, x: Tensor) -> Tensor:
    with torch.profiler.record_function("features"):
        features = net.features(x)
    return net.fc(features)


def clamps_by_mask(_net: Any, f: Tensor) -> Tensor:
    f = f.clone()
    f.permute(0, 2, 3, 1)[f.mean(1) > 1] = -1.0
    means = f.mean((2, 3))
    means[means < 0] = 0
    return means


def adds_by_mask(_net: Any, f: Tensor) -> Tensor:
    means = f.mean((2, 3))
    means[means > 1] += 1
    return means


def kernel_per_image(_net: Any, f: Tensor) -> Tensor:
    batch = f.shape[0]
    kernels = f.mean((2, 3)).reshape(-1, 1, 1, 1)
    return (
        F.conv2d(f.reshape(1, -1, 12, 12), kernels, groups=8 * batch)
        .reshape(batch, 8, -1)
        .mean(2)
    )


def stacked(_net: Any, f: Tensor) -> Tensor:
    means, largest = f.mean((2, 3)), f.amax((2, 3))
    halves = torch.hstack([torch.column_stack([means[:, 0], means[:, 1:4]]), largest[:, 4:]])
    return torch.dstack([halves, torch.vstack([means, largest])[: f.shape[0]]]).sum(2)


def kept_by_shape(net: Any, x: Tensor) -> Tensor:
    features = net.features(x)
    if features.shape not in net.tables:
        net.tables[features.shape] = torch.ones(features.shape[1])
    return net.fc(features * net.tables[features.shape])


def keeps_features(net: Any, x: Tensor) -> Tensor:
    net.last = net.features(x)
    return net.fc(net.last)


def lists_features(net: Any, x: Tensor) -> Tensor:
    net.stages = []
    net.stages.append(net.stem(x))
    net.maps["stem"] = net.stages[0]
    return net.fc(net.stages[-1].mean((2, 3)))


class Hooked(Small):
    """Classifies the features that a hook keeps."""

    def __init__(self) -> None:
        super().__init__(aux=False)
        self.stem.register_forward_hook(self.keep)

    def keep(self, _module: Any, _inputs: Any, output: Tensor) -> None:
        self.kept = output

    def forward(self, images: Tensor) -> Tensor:
        self.stem(images)
        return self.fc(self.kept.mean((2, 3)))


def gsop_block(attention: str, upsampling: str) -> Callable[[], nn.Module]:
    """Return a builder of a network in which a GSoP block scales a map of 4 x 4 positions, as a user writes it."""
    config = GSoPBlockConfig(
        attention=attention, cov_width=32, position_side=3, position_upsampling=upsampling
    )
    return with_parts(
        lambda net, x: net.fc(net.narrow(net.block(net.widen(net.stem(x)))).mean((2, 3))),
        widen=lambda: nn.Conv2d(8, 64, 3, stride=3),
        block=lambda: GSoPBlock(config, 64),
        narrow=lambda: nn.Conv2d(64, 8, 1),
    )


class StaysInTrainMode(nn.ReLU):
    def train(self, mode: bool = True) -> "StaysInTrainMode":
        return super().train(True)


EXPORTED: dict[str, Case] = {
    "a metric that runs": (
        with_parts(
            lambda net, x: (
                net.accuracy.update(net.fc(net.features(x)).argmax(1), 0),
                logits(net, x),
            )[1],
            accuracy=Metric,
        ),
        {},
        ONLY,
    ),
    "a flag of a layer that is initialized": (
        flagged(lambda net: net.flag.item() == 0),
        {},
        ONLY,
    ),
    "a condition on a buffer": (flagged(lambda net: not net.flag), {}, ONLY),
    "a parameter as a number": (flagged(lambda net: float(net.gain) > 2), {}, ONLY),
    "a hook that scales features": (
        changed(
            lambda n: n.stem.register_forward_hook(lambda _module, _inputs, output: 2 * output)
        ),
        {},
        ONLY,
    ),
    "a hook that keeps the features": (Hooked, {}, ONLY),
    "old weight norm": (changed(lambda n: weight_norm(n.fc)), {}, ONLY),
    "pruning": (changed(lambda n: prune.l1_unstructured(n.fc, "weight", 0.5)), {}, ONLY),
    "a forward that is bound to the instance": (
        changed(
            lambda n: vars(n).update(
                forward=types.MethodType(lambda net, x: 2 * logits(net, x), n)
            )
        ),
        {},
        ONLY,
    ),
    "a layer that stays in train mode and computes the same": (
        with_parts(lambda net, x: net.act(logits(net, x)), act=StaysInTrainMode),
        {},
        ONLY,
    ),
    "features that are kept": (forward(keeps_features), {}, ONLY),
    "a list that starts anew, and a dict of maps": (
        with_parts(lists_features, maps=dict),
        {},
        ONLY,
    ),
    "view behind a convolution": (
        pooled(lambda _, f: f.view(f.size(0), 8, -1).mean(2)),
        {},
        ONLY,
    ),
    "flatten": (pooled(lambda _, f: torch.flatten(F.adaptive_avg_pool2d(f, 1), 1)), {}, ONLY),
    "a view that needs channels last": (
        lambda: variant(
            lambda net, x: net.fc(
                net.stem(x).permute(0, 2, 3, 1).view(x.shape[0], -1, 8).mean(1)
            ),
            aux=False,
        ).to(memory_format=torch.channels_last),
        {},
        ONLY,
    ),
    "sizes by unpacking": (
        pooled(lambda _, f: f.sum((2, 3)) / (f.shape[2] * f.shape[3])),
        {},
        ONLY,
    ),
    "a dict": (
        forward(lambda net, x: {"logits": logits(net, x), "x": x}),
        {"logits_key": "logits"},
        ONLY,
    ),
    "a tuple": (forward(lambda net, x: (logits(net, x), x)), {"logits_key": 0}, ONLY),
    "a ModelOutput": (
        forward(lambda net, x: ModelOutput(loss=x.mean(), logits=logits(net, x))),
        {"logits_key": "logits"},
        ONLY,
    ),
    "auxiliary outputs in train mode": (Small, {"training_only": ["aux"]}, DETACHED),
    "a Lightning module with a metric": (LightningModule, {}, ONLY),
    "a metric that only training uses": (
        LightningModule,
        {"training_only": ["accuracy"]},
        DETACHED,
    ),
    "a criterion with weights of the classes": (
        with_parts(logits, criterion=lambda: nn.CrossEntropyLoss(torch.ones(CLASSES))),
        {"training_only": ["criterion"]},
        DETACHED,
    ),
    "an adapter that is not merged": (
        changed(lambda n: setattr(n, "fc", Adapter(n.fc))),
        {},
        ONLY,
    ),
    "an averaged model": (lambda: AveragedModel(Small(aux=False)), {}, ONLY),
    "weight norm as a parametrization": (
        changed(lambda n: parametrizations.weight_norm(n.fc)),
        {},
        ONLY,
    ),
    "normalization by constants": (
        forward(
            lambda net, x: logits(
                net, (x - torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1)) / 0.5
            )
        ),
        {},
        ONLY,
    ),
    "a range of bytes": (forward(lambda net, x: logits(net, x.float() / 255.0)), {}, ONLY),
    "attention between views": (with_parts(tokens, attention=Attention), {}, ONLY),
    "a mask of infinities": (with_parts(tokens, attention=CausalAttention), {}, ONLY),
    "a mask of the image": (
        with_parts(tokens, attention=lambda: MaskedAttention(bright_keys)),
        {},
        ONLY,
    ),
    "a mask of each head": (
        with_parts(tokens, attention=lambda: MaskedAttention(near_keys)),
        {},
        ONLY,
    ),
    "a layer of a transformer": (
        with_parts(
            tokens,
            attention=lambda: nn.TransformerEncoderLayer(
                8, 2, 16, batch_first=True, dropout=0.1
            ),
        ),
        {},
        ONLY,
    ),
    "layers in a list": (
        with_parts(
            lambda net, x: net.fc(
                functools.reduce(lambda f, part: part(f), net.layers, net.features(x))
            ),
            layers=lambda: nn.ModuleList([nn.Linear(8, 8), nn.GELU(), nn.LayerNorm(8)]),
        ),
        {},
        ONLY,
    ),
    "a sum in place": (forward(adds_in_place), {}, ONLY),
    "dropout by the mode": (
        forward(lambda net, x: net.fc(F.dropout(net.features(x), 0.5, training=net.training))),
        {},
        ONLY,
    ),
    "a state dict of its own": (SavesHead, {"plain": SavesHead}, PLAIN),
    "a lazy registry": (with_parts(logits, registry=Lazy), {}, ONLY),
    "a part that is profiled": (forward(profiled), {}, ONLY),
    "an assignment by a mask": (pooled(clamps_by_mask), {}, ONLY),
    "stacks of rows, columns and depths": (pooled(stacked), {}, ONLY),
    "instance norm with running statistics": (
        changed(
            lambda n: n.stem.insert(
                1, nn.InstanceNorm2d(8, affine=True, track_running_stats=True)
            )
        ),
        {},
        ONLY,
    ),
    "a table that the first run makes": (Distances, {}, ONLY),
    "a table that also the plain network makes": (Distances, {"plain": Distances}, PLAIN),
    "a buffer that the first run registers": (forward(registers), {}, ONLY),
    "a convolution of positions that forward makes": (
        with_parts(
            lambda net, x: net.fc(
                (
                    net.stem(x)
                    + net.positions(torch.linspace(-1, 1, 12)[None, None])[..., None]
                ).mean((2, 3))
            ),
            positions=lambda: nn.Conv1d(1, 8, 1),
        ),
        {},
        ONLY,
    ),
    "without autocast": (forward(without_autocast), {}, ONLY),
    "average pooling with ceil_mode": (forward(average), {}, ONLY),
    "a parallel part": (
        changed(lambda n: setattr(n, "stem", nn.DataParallel(n.stem))),
        {},
        ONLY,
    ),
    "no gradient": (forward(torch.no_grad()(logits)), {}, ONLY),
    "a GSoP block of channels": (gsop_block("channel", "nearest"), {}, ONLY),
    "a GSoP block of positions": (gsop_block("position", "average"), {}, ONLY),
    "a GSoP block of both": (gsop_block("maximum", "nearest"), {}, ONLY),
    "a GSoP block of both, fused by a layer": (
        gsop_block("concatenation", "average"),
        {},
        ONLY,
    ),
    "a removed part that returns a dict of its own class": (
        with_parts(
            lambda net, x: (net.head(net.features(x)), logits(net, x))[1],
            head=lambda: Head(8, CLASSES),
        ),
        {"training_only": ["head"]},
        "trained-detached",
    ),
}

REFUSED: dict[str, Case] = {
    "statistics that diverged": (
        changed(lambda n: n.stem[1].running_var.fill_(torch.inf)),
        {},
        r"^stem\.1\.running_var holds NaN",
    ),
    "len of a batch": (
        pooled(lambda _, f: f.view(len(f), 8, -1).mean(2)),
        {},
        r"idioms\.py:\d+ \(.*len\(f\).*x\.shape\[0\]",
    ),
    "the size as a number": (
        pooled(lambda _, f: f.view(int(f.shape[0]), 8, -1).mean(2)),
        {},
        r"idioms\.py:\d+ \(.*int\(f\.shape\[0\]\)",
    ),
    "a loop over images": (
        forward(by_image),
        {},
        r"idioms\.py:\d+ \(return torch\.stack.*loop",
    ),
    "a table for each shape": (
        with_parts(kept_by_shape, tables=dict),
        {},
        r"cache\[x\.shape\]",
    ),
    "numbers of numpy": (
        pooled(lambda _, f: torch.as_tensor(np.tanh(f.mean((2, 3)).numpy()))),
        {},
        r"numpy.*idioms\.py:\d+ \(",
    ),
    "a sparse matrix": (
        pooled(lambda _, f: torch.sparse.mm(torch.eye(8).to_sparse(), f.mean((2, 3)).t()).t()),
        {},
        r"aten\._sparse_addmm\.default .*idioms\.py:\d+ ",
    ),
    "an error of code that is captured": (
        pooled(fails_if_captured),
        {},
        r"idioms\.py:\d+ \(raise ValueError.*\): ValueError: 1{148} \.\.\.",
    ),
    "orthogonal weights": (
        changed(lambda n: parametrizations.orthogonal(n.fc)),
        {},
        r"householder",
    ),
    "dropout that never ends": (
        with_parts(lambda net, x: net.drop(logits(net, x)), drop=AlwaysDrops),
        {},
        r"\(drop\).*AlwaysDrops\.train\(\)",
    ),
    "dropout that eval does not reach": (
        with_parts(lambda net, x: net.drop(logits(net, x)), drop=KeepsTraining),
        {},
        r"\(drop\.0\).*\.eval\(\)",
    ),
    "adaptive pooling to uneven windows": (
        pooled(lambda _, f: F.adaptive_max_pool2d(f, 5).mean((2, 3))),
        {},
        r"aten\.adaptive_max_pool2d\.default in forward",
    ),
    "a kernel for each image": (
        pooled(kernel_per_image),
        {},
        r"aten\.conv2d\.default in forward",
    ),
    "a sum into values that a mask selects": (
        pooled(adds_by_mask),
        {},
        r"aten\.index\.Tensor in forward.*torch\.where",
    ),
    "a number that weights give": (
        flagged(lambda net: net.fc.weight.square().sum().item() < 0),
        {},
        r"of weights.* in __init__",
    ),
    "a write through data": (
        forward(lambda net, x: net.fc(halved_data(net.features(x)))),
        {},
        r"through \.data",
    ),
    "a value in Python": (
        forward(lambda net, x: logits(net, x) if x.max().item() < 9 else x.mean((2, 3))),
        {},
        r"of the image",
    ),
}
