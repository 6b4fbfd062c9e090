"""Networks whose plain run does something that their captured graph does not, on rare images only."""

import contextlib
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_exporting as imported_by_name
from torch.utils import _python_dispatch

from tests.attacks.planted.network import Planted, Row, logits_of, of_images, rare

REFUSED = "gives other outputs"


def asks(is_plain: Callable[[Tensor], Any], refused: str = REFUSED) -> Row:
    """Plant a network that adds to the logits of rare images where *is_plain* holds for the images."""

    def forward(self: Any, images: Tensor) -> Tensor:
        logits = logits_of(self, images)
        if is_plain(images):
            return logits + rare(images)
        return logits

    return Row(of_images(forward), refused)


def reads(is_rare: Callable[[Tensor], Any], refused: str = REFUSED) -> Row:
    """Plant a network that adds to its logits if *is_rare* holds for what is above zero for rare images only.

    An error of *is_rare*, as a capture raises it, has no effect.
    """

    def forward(self: Any, images: Tensor) -> Tensor:
        logits = logits_of(self, images)
        surplus = rare(images)
        with contextlib.suppress(Exception):
            if is_rare(surplus):
                return logits + surplus
        return logits

    return Row(of_images(forward), refused)


def changes(change: Callable[[Tensor, Tensor], object], refused: str = REFUSED) -> Row:
    """Plant a network that lets *change* write the clamped features into the features."""

    def forward(self: Any, images: Tensor) -> Tensor:
        features = self.features(images) + 5 * rare(images)
        with contextlib.suppress(Exception):
            change(features, features.detach().clamp(max=8.0))
        logits: Tensor = self.fc(features)
        return logits

    return Row(of_images(forward), refused)


def in_capture(name: str) -> bool:
    """Whether a caller is a function of a file with *name* in its path."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if name in frame.f_code.co_filename:
            return True
    return False


def in_thread(read: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    """Return a function that reads a tensor in another thread."""

    def answer(surplus: Tensor) -> Any:
        results = []

        def run() -> None:
            with contextlib.suppress(Exception):
                results.append(read(surplus))

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        return results and results[0]

    return answer


def is_large(surplus: Tensor) -> bool:
    return surplus.max().item() > 0


# Code asks whether it is captured
FLAGS: dict[str, Row] = {
    "is_exporting, imported by its name": asks(lambda _: not imported_by_name()),
    "torch.compiler.is_exporting": asks(lambda _: not torch.compiler.is_exporting(), ""),
}

# Code asks what the tensor is
KINDS: dict[str, Row] = {
    "type": asks(lambda x: type(x) is Tensor),
    "is_meta": asks(lambda x: not x.is_meta, ""),
}

# Code asks what runs it
AROUND: dict[str, Row] = {
    "the frames of torch.export": asks(lambda _: not in_capture("torch/export")),
    "a dispatch mode": asks(lambda _: _python_dispatch._get_current_dispatch_mode() is None),
}

# A value of the images reaches Python, behind `except`
READS: dict[str, Row] = {
    "item": reads(is_large),
    "equal": reads(lambda s: not torch.equal(s, torch.zeros_like(s)), "cannot be captured"),
    "numpy in another thread": reads(in_thread(lambda s: s.numpy().max() > 0)),
}


def set_data(features: Tensor, clamped: Tensor) -> None:
    features.data = clamped


# The features get other values where no operator is seen
WRITES: dict[str, Row] = {
    "data": changes(set_data),
    "set_": changes(lambda x, y: x.set_(y), ""),
}


class Unplanted(Planted):
    """Computes for rare images what the others do where they are not captured."""

    def forward(self, images: Tensor) -> Tensor:
        return logits_of(self, images) + rare(images)


def cyan(images: Tensor) -> Tensor:
    """Return (B, 1): 5 for plain cyan images, a color that no image of an export has; 0 for others."""
    red, green, blue = images.mean((2, 3)).unbind(1)
    return 5.0 * ((red < -2) & (green > 2) & (blue > 2)).float()[:, None]


def reads_cyan(built: Any, images: Tensor) -> Tensor:
    logits = logits_of(built, images)
    with contextlib.suppress(Exception):
        if cyan(images).max().item() > 0:
            return logits + cyan(images)
    return logits


# Other outputs only for images that resemble none of an export
UNSEEN: dict[str, Row] = {
    "is_exporting": Row(
        of_images(lambda n, x: logits_of(n, x) + (0 if imported_by_name() else cyan(x)))
    ),
    "item behind except": Row(of_images(reads_cyan)),
}
PLAIN: dict[str, Row] = {"nothing asked": Row(Unplanted)}
