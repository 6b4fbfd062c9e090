"""Networks whose plain run does something that their captured graph does not, on rare images only."""

import contextlib
import contextvars
import io
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.compiler import is_exporting as imported_by_name
from torch.utils import _python_dispatch

from tests.attacks.planted.network import Planted, Row, logits_of, of_images, rare

REFUSED = (
    r"plain run|reads values|writes to|cannot be captured|no ONNX form|earlier run computed"
)


def asks(
    is_plain: Callable[[Tensor], Any], refused: str = REFUSED, batch: int | None = None
) -> Row:
    """Plant a network that adds to the logits of rare images where *is_plain* holds for the images."""

    def forward(self: Any, images: Tensor) -> Tensor:
        logits = logits_of(self, images)
        if is_plain(images):
            return logits + rare(images)
        return logits

    return Row(of_images(forward), refused, batch=batch)


def reads(
    is_rare: Callable[[Tensor], Any], refused: str = REFUSED, prepare: Any = lambda _: None
) -> Row:
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

    return Row(of_images(forward, prepare), refused)


def changes(change: Callable[[Tensor, Tensor], object], refused: str = REFUSED) -> Row:
    """Plant a network that lets *change* write the clamped features into the features."""

    def forward(self: Any, images: Tensor) -> Tensor:
        features = self.features(images) + 5 * rare(images)
        with contextlib.suppress(Exception):
            change(features, features.detach().clamp(max=8.0))
        logits: Tensor = self.fc(features)
        return logits

    return Row(of_images(forward), refused)


def early_exit(self: Any, images: Tensor) -> Tensor:
    logits = logits_of(self, images)
    surplus = rare(images)
    if not torch.compiler.is_compiling() and (surplus > 0).nonzero().shape[0]:
        logits = logits + surplus
    return logits


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


def without_dispatch(surplus: Tensor) -> Any:
    with torch.utils._python_dispatch._disable_current_modes():
        return surplus.max().item() > 0


def is_large(surplus: Tensor) -> bool:
    return surplus.max().item() > 0


def stored(tensor: Tensor) -> bool:
    return any(tensor.untyped_storage())


def saved(tensor: Tensor) -> bool:
    file = io.BytesIO()
    torch.save(tensor, file)
    file.seek(0)
    return bool(torch.load(file).max() > 0)  # noqa: TID251


def of_number(change: Callable[[Tensor, Tensor], object]) -> Callable[[Tensor], bool]:
    """Return a function that reads a constant after *change* has written a value into it."""

    def answer(surplus: Tensor) -> bool:
        number = torch.tensor(0.0)
        change(number, surplus.max())
        return bool(number > 0)

    return answer


CONTEXT: contextvars.ContextVar[Any] = contextvars.ContextVar("surplus")


def in_context(surplus: Tensor) -> Any:
    CONTEXT.set(surplus)
    return contextvars.copy_context().run(lambda: CONTEXT.get().max().item() > 0)


class Asked(torch.autograd.Function):
    """Adds to the logits of rare images, unless it is captured."""

    @staticmethod
    def forward(_context: Any, logits: Tensor, surplus: Tensor) -> Tensor:
        return logits if torch.compiler.is_exporting() else logits + surplus

    @staticmethod
    def backward(_context: Any, gradient: Tensor) -> Any:
        return gradient, None


class AsksInALayer(nn.Module):
    """Clamps features, unless it is captured."""

    def forward(self, features: Tensor) -> Tensor:
        return features if torch.compiler.is_exporting() else features.clamp(max=8.0)


FLAGS: dict[str, Row] = {  # code asks whether it is captured
    "torch.compiler.is_exporting": asks(lambda _: not torch.compiler.is_exporting(), ""),
    "is_exporting, imported by its name": asks(lambda _: not imported_by_name()),
    "torch.compiler.is_compiling": asks(lambda _: not torch.compiler.is_compiling(), ""),
    "torch.onnx.is_in_onnx_export": asks(lambda _: not torch.onnx.is_in_onnx_export(), ""),
    "torch.is_grad_enabled": asks(lambda _: not torch.is_grad_enabled(), ""),
    "a fake mode": asks(lambda _: torch._guards.detect_fake_mode() is None),
    "is_exporting in a layer": Row(
        of_images(
            lambda n, x: n.fc(n.layer(n.features(x) + 5 * rare(x))),
            lambda n: n.add_module("layer", AsksInALayer()),
        )
    ),
    "is_exporting in a function with a gradient": Row(
        of_images(lambda n, x: Asked.apply(logits_of(n, x), rare(x)))
    ),
    "is_compiling before nonzero": Row(of_images(early_exit), REFUSED),
}

KINDS: dict[str, Row] = {  # code asks what the tensor is
    "type": asks(lambda x: type(x) is Tensor),
    "the type of the size": asks(lambda x: type(x.shape[0]) is int, batch=5),
    "isinstance of FakeTensor": asks(lambda x: not isinstance(x, FakeTensor)),
    "is_meta": asks(lambda x: not x.is_meta, ""),
    "the address": reads(lambda s: s.data_ptr() != 0),
}

AROUND: dict[str, Row] = {  # code asks what runs it
    "the frames of torch.export": asks(lambda _: not in_capture("torch/export")),
    "a dispatch mode": asks(lambda _: _python_dispatch._get_current_dispatch_mode() is None),
}

READS: dict[str, Row] = {  # a value of the images reaches Python, behind `except`
    "a size of nonzero": reads(lambda s: (s > 0).nonzero().shape[0] > 0),
    "item": reads(is_large),
    "bool": reads(lambda s: bool((s > 0).any())),
    "a number that gets a value": reads(of_number(lambda number, x: number.copy_(x))),
    "numpy": reads(lambda s: s.numpy().max() > 0),
    "the text": reads(
        lambda s: "[0." not in str(s.max(1, keepdim=True).values.max()[None]), ""
    ),
    "DLPack": reads(lambda s: np.from_dlpack(s).max() > 0),
    "the storage": reads(stored),
    "torch.save": reads(saved),
    "a context variable": reads(in_context),
    "with dispatch modes disabled": reads(without_dispatch),
    "numpy in another thread": reads(in_thread(lambda s: s.numpy().max() > 0)),
}


def set_data(features: Tensor, clamped: Tensor) -> None:
    features.data = clamped


def in_another_thread(features: Tensor, clamped: Tensor) -> None:
    thread = threading.Thread(target=lambda: features.copy_(clamped))
    thread.start()
    thread.join()


WRITES: dict[str, Row] = {  # the features get other values where no operator is seen
    "data": changes(set_data),
    "set_": changes(lambda x, y: x.set_(y), ""),
    "numpy": changes(lambda x, y: np.copyto(x.numpy(), y.numpy())),
    "another thread": changes(in_another_thread),
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


UNSEEN: dict[str, Row] = {  # other outputs only for images that resemble none of an export
    "is_exporting": Row(
        of_images(lambda n, x: logits_of(n, x) + (0 if imported_by_name() else cyan(x)))
    ),
    "item behind except": Row(of_images(reads_cyan)),
}
PLAIN: dict[str, Row] = {"nothing asked": Row(Unplanted)}
