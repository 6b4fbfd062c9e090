"""Networks whose plain run does something that their captured graph does not, on rare images only."""

import contextlib
import contextvars
import copy
import io
import math
import operator
import pickle  # noqa: TID251 # a network reads its own values
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._dynamo import is_compiling as dynamo_is_compiling
from torch._subclasses.fake_tensor import FakeTensor
from torch.compiler import is_exporting as imported_by_name
from torch.fx import _symbolic_trace
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.overrides import _get_current_function_mode_stack
from torch.utils import _python_dispatch, dlpack

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


def without_functions(read: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    def answer(surplus: Tensor) -> Any:
        with torch._C.DisableTorchFunction():
            return read(surplus)

    return answer


def without_dispatch(surplus: Tensor) -> Any:
    with torch.utils._python_dispatch._disable_current_modes():
        return surplus.max().item() > 0


def is_large(surplus: Tensor) -> bool:
    return surplus.max().item() > 0


def stored(tensor: Tensor) -> bool:
    return any(tensor.untyped_storage())


def pickled(tensor: Tensor) -> bool:
    copied = pickle.loads(pickle.dumps(tensor))  # noqa: S301
    return bool(copied.max() > 0)


def saved(tensor: Tensor) -> bool:
    file = io.BytesIO()
    torch.save(tensor, file)
    file.seek(0)
    return bool(torch.load(file).max() > 0)  # noqa: TID251


def compared(tensor: Tensor) -> bool:
    try:
        torch.testing.assert_close(tensor, torch.zeros_like(tensor))
    except AssertionError:
        return True
    return False


def applied(tensor: Tensor) -> bool:
    values: list[float] = []
    tensor.clone().apply_(lambda value: values.append(value) or value)
    return max(values) > 0


def mapped(tensor: Tensor) -> bool:
    values: list[float] = []
    tensor.clone().map_(tensor, lambda value, _: values.append(value) or value)
    return max(values) > 0


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
    "torch.compiler.is_dynamo_compiling": asks(
        lambda _: not torch.compiler.is_dynamo_compiling(), ""
    ),
    "torch._dynamo.is_compiling": asks(lambda _: not dynamo_is_compiling()),
    "torch._utils.is_compiling": asks(lambda _: not torch._utils.is_compiling()),
    "torch.jit.is_tracing": asks(lambda _: not torch.jit.is_tracing(), ""),
    "torch.jit.is_scripting": asks(lambda _: not torch.jit.is_scripting(), ""),
    "torch.onnx.is_in_onnx_export": asks(lambda _: not torch.onnx.is_in_onnx_export(), ""),
    "is_fx_tracing": asks(lambda _: not _symbolic_trace.is_fx_tracing()),
    "torch.is_grad_enabled": asks(lambda _: not torch.is_grad_enabled(), ""),
    "torch.is_inference_mode_enabled": asks(
        lambda _: not torch.is_inference_mode_enabled(), ""
    ),
    "requires_grad": asks(lambda x: not x.requires_grad, ""),
    "a context of tracing": asks(lambda _: torch._guards.TracingContext.try_get() is None),
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
    "isinstance of SymInt": asks(lambda x: not isinstance(x.shape[0], torch.SymInt), batch=5),
    "isinstance of FakeTensor": asks(lambda x: not isinstance(x, FakeTensor)),
    "the name of the class": asks(lambda x: x.__class__.__name__ == "Tensor"),
    "fake_mode": asks(lambda x: not hasattr(x, "fake_mode")),
    "is_meta": asks(lambda x: not x.is_meta, ""),
    "the device": asks(lambda x: x.device.type == "cpu", ""),
    "the text of the size": asks(lambda x: str(x.shape[0]).isdigit(), batch=5),
    "the address": reads(lambda s: s.data_ptr() != 0),
    "the keys of dispatch": asks(
        lambda x: not torch._C._dispatch_keys(x).has(torch._C.DispatchKey.Python)
    ),
}

AROUND: dict[str, Row] = {  # code asks what runs it
    "the frames of torch.export": asks(lambda _: not in_capture("torch/export")),
    "the frames of torch.fx": asks(lambda _: not in_capture("torch/fx")),
    "a dispatch mode": asks(lambda _: _python_dispatch._get_current_dispatch_mode() is None),
    "the number of dispatch modes": asks(lambda _: torch._C._len_torch_dispatch_stack() == 0),
    "a function mode": asks(lambda _: not _get_current_function_mode_stack()),
    "a tracing mode": asks(lambda _: get_proxy_mode() is None),
}

READS: dict[str, Row] = {  # a value of the images reaches Python, behind `except`
    "a size of nonzero": reads(lambda s: (s > 0).nonzero().shape[0] > 0),
    "a size of a mask": reads(lambda s: s[s > 0].shape[0] > 0),
    "a size of unique": reads(lambda s: torch.unique(torch.cat([s, 0 * s])).numel() > 1),
    "the number of where": reads(lambda s: len(torch.where(s > 0)[0]) > 0),
    "masked_select": reads(lambda s: torch.masked_select(s, s > 0).numel() > 0),
    "item": reads(is_large),
    "item of a detached tensor": reads(lambda s: s.detach().max().item() > 0),
    "bool": reads(lambda s: bool((s > 0).any())),
    "float": reads(lambda s: float(s.max()) > 0),
    "int": reads(lambda s: int(s.max()) > 0),
    "complex": reads(lambda s: complex(s.max()).real > 0),
    "operator.index": reads(lambda s: operator.index(s.max().long()) > 0),
    "a range": reads(lambda s: len(range(s.max().long())) > 0),
    "in": reads(lambda s: 0.0 not in s),
    "rows in an array": reads(lambda s: np.array([*s]).max() > 0),
    "apply_": reads(applied),
    "map_": reads(mapped),
    "a number that gets a value": reads(of_number(lambda number, x: number.copy_(x))),
    "a number whose data gets a value": reads(
        of_number(lambda number, x: number.data.copy_(x))
    ),
    "a number that is a result": reads(
        of_number(lambda number, x: torch.add(x, 0, out=number))
    ),
    "a format": reads(lambda s: f"{s.max():.1f}" != "0.0"),
    "math": reads(lambda s: math.ceil(s.max()) > 0),
    "an index": reads(lambda s: [False, True][(s.max() > 0).long()]),
    "is_nonzero": reads(lambda s: s.max().is_nonzero()),
    "equal": reads(lambda s: not torch.equal(s, torch.zeros_like(s))),
    "allclose": reads(lambda s: not torch.allclose(s, torch.zeros_like(s))),
    "assert_close": reads(compared),
    "tolist": reads(lambda s: max(map(max, s.tolist())) > 0),
    "numpy": reads(lambda s: s.numpy().max() > 0),
    "numpy of detached data": reads(lambda s: s.data.numpy().max() > 0),
    "asarray": reads(lambda s: np.asarray(s).max() > 0),
    "the text": reads(
        lambda s: "[0." not in str(s.max(1, keepdim=True).values.max()[None]), ""
    ),
    "DLPack": reads(lambda s: np.from_dlpack(s).max() > 0),
    "to_dlpack": reads(lambda s: dlpack.from_dlpack(dlpack.to_dlpack(s)).max().item() > 0),
    "the storage": reads(stored),
    "pickle": reads(pickled),
    "torch.save": reads(saved),
    "a copy": reads(lambda s: copy.deepcopy(s).max().item() > 0),
    "a local scalar": reads(lambda s: torch.ops.aten._local_scalar_dense.default(s.max()) > 0),
    "a context variable": reads(in_context),
    "with torch functions disabled": reads(without_functions(is_large)),
    "tolist with torch functions disabled": reads(
        without_functions(lambda s: max(map(max, s.tolist())) > 0)
    ),
    "numpy with torch functions disabled": reads(
        without_functions(lambda s: s.numpy().max() > 0)
    ),
    "a capsule of torch._C": reads(
        lambda s: dlpack.from_dlpack(torch._C._to_dlpack(s)).max().item() > 0
    ),
    "with dispatch modes disabled": reads(without_dispatch),
    "item in another thread": reads(in_thread(is_large)),
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
    "copy_ into data": changes(lambda x, y: x.data.copy_(y)),
    "swap_tensors": changes(torch.utils.swap_tensors),
    "numpy": changes(lambda x, y: np.copyto(x.numpy(), y.numpy())),
    "DLPack": changes(lambda x, y: dlpack.from_dlpack(x.__dlpack__()).copy_(y)),
    "the storage": changes(lambda x, y: x.untyped_storage().copy_(y.untyped_storage())),
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
