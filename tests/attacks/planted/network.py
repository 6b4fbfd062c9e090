"""The network that the planted ones change, and the row that says what an export makes of one."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 4
WIDTH = 8
SIDE = 12
LIMIT = 2.5  # some logits of unseen images are above it, none of the exporter's images

Answer = Callable[[Any, Tensor, Tensor], Any]
Change = Callable[[Any], object]


class Row(NamedTuple):
    """A planted network, and what its export must end in."""

    build: Callable[[], nn.Module]
    refused: str = ""
    """A phrase of the refusal; empty: the export passes, and its file is the network."""
    parts: tuple[str, ...] = ()
    """The parts to remove."""
    plain: Callable[[], nn.Module] | None = None
    """The builder of the plain network."""
    rebuild: Callable[[], nn.Module] | None = None
    """Builds the network again."""
    batch: int | None = None
    """The largest batch; by default 5, or 1 if it is refused, because that takes less time."""
    during: Callable[[], AbstractContextManager[object]] = nullcontext
    """What is active while it is exported."""


class Planted(nn.Module):
    """A convolution and a classifier over mean features, and a branch that only training uses."""

    def __init__(self, branch: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.fc = nn.Linear(WIDTH, CLASSES)
        self.aux: Any = nn.Linear(WIDTH, CLASSES) if branch else None
        self.prepare()

    def prepare(self) -> None:
        """Add what a subclass needs."""

    def features(self, images: Tensor) -> Tensor:
        return self.conv(images).relu().mean((2, 3))

    def forward(self, images: Tensor) -> Any:
        features = self.features(images)
        return self.answer(features, self.fc(features))

    def answer(self, _features: Tensor, logits: Tensor) -> Any:
        return logits


def network(answer: Answer, *changes: Change) -> type[Planted]:
    """Define a network with another *answer* to features and logits, after *changes*."""
    return type("Network", (Planted,), {"answer": answer, "prepare": in_turn(changes)})


def of_images(forward: Callable[[Any, Tensor], Any], *changes: Change) -> type[Planted]:
    """Define a network with another *forward*, after *changes*."""
    return type("Network", (Planted,), {"forward": forward, "prepare": in_turn(changes)})


def in_turn(changes: tuple[Change, ...]) -> Callable[[Any], None]:
    def prepare(self: Any) -> None:
        for change in changes:
            change(self)

    return prepare


def changed(change: Change) -> Callable[[], nn.Module]:
    """Return a builder of a network that *change* changes after it was built."""

    def build() -> nn.Module:
        built = Planted()
        change(built)
        return built

    return build


def puts(**values: Callable[[], Any]) -> Change:
    """Return a function that sets attributes of a network."""

    def prepare(built: Any) -> None:
        for name, make in values.items():
            setattr(built, name, make())

    return prepare


def buffer(name: str, value: Tensor, **options: Any) -> Change:
    return lambda built: built.register_buffer(name, value.clone(), **options)


def logits_of(built: Any, images: Tensor) -> Tensor:
    """Compute the logits as a network does that nothing is planted in."""
    logits: Tensor = built.fc(built.features(images))
    return logits


def limited(logits: Tensor) -> Tensor:
    return logits.clamp(max=LIMIT)


def rare(images: Tensor) -> Tensor:
    """Return (B, 1): zero, but for images whose neighboring pixels differ as in a checkerboard."""
    contrast = (images - F.avg_pool2d(images, 3, 1, 1)).abs().mean((1, 2, 3))
    return 20 * (contrast - 1.6).relu()[:, None]


def trained(built: nn.Module) -> nn.Module:
    """Give *built* weights such that saturated colors give larger logits than ordinary images."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in sorted(built.named_parameters()):
            if not tensor.is_meta and not bool(tensor.isfinite().all()):
                continue  # a mask, or what is planted
            scale = 0.4 if "weight" in name else 0.1
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)
    return built.eval()
