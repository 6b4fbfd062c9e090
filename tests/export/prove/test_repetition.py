"""A network whose outputs change after many calls is refused, whatever holds its state."""

import ctypes
import io
import queue
import threading
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sopdeploy.errors import CertificateError
from sopdeploy.images.preprocess import Preprocess
from sopdeploy_export.capture.program import Captures
from sopdeploy_export.prove import certificate
from sopdeploy_export.prove.repetition import CALLS, prove_repetition

CHANGES_AFTER = 200
NUMBER: ContextVar[Any] = ContextVar("number")
LOCAL = threading.local()


def in_local() -> int:
    LOCAL.number += 1
    return int(LOCAL.number)


def in_context(step: Any) -> Any:
    NUMBER.set(NUMBER.get() + step)
    return NUMBER.get()


def in_queue(held: "queue.Queue[int]") -> int:
    held.put(1)
    return held.qsize()


def in_pointer(number: ctypes.c_long) -> int:
    number.value += 1
    return number.value


def in_file(file: io.BytesIO) -> int:
    file.write(b"x")
    return file.tell()


COUNTERS: dict[str, Callable[[], Callable[[], Any]]] = {
    "ctypes": lambda: (lambda number: lambda: in_pointer(number))(ctypes.c_long(0)),
    "BytesIO": lambda: (lambda file: lambda: in_file(file))(io.BytesIO()),
    "Queue": lambda: (lambda held: lambda: in_queue(held))(queue.Queue()),
    "threading.local": lambda: in_local,
    "ContextVar": lambda: lambda: in_context(1),
    "a tensor in a ContextVar": lambda: lambda: in_context(torch.ones(1)),
    "a tensor": lambda: (lambda count: lambda: count.add_(1))(torch.zeros(1)),
}


class Counting(nn.Module):
    """Doubles its logits from the call number 200 on."""

    def __init__(self, count: Callable[[], Any]) -> None:
        super().__init__()
        self.conv, self.fc, self.count = nn.Conv2d(3, 8, 3), nn.Linear(8, 3), count

    def forward(self, images: Tensor) -> Tensor:
        features = self.conv(images).relu_()
        features[:, 0].mul_(2)
        logits = self.fc(features.mean((2, 3)))
        return logits if self.count() < CHANGES_AFTER else 2 * logits


@pytest.mark.parametrize("holder", COUNTERS)
def test_outputs_that_change_with_the_number_of_calls_are_refused(
    holder: str, preprocess: Preprocess, probes: Tensor
) -> None:
    NUMBER.set(0)
    LOCAL.number = 0
    with pytest.raises(CertificateError, match=rf"other outputs after {CALLS} calls"):
        prove_repetition(Counting(COUNTERS[holder]()).eval(), preprocess, probes)


class CountingInItsFeatures(Counting):
    """Counts its calls on one image in a tensor that the first of them computes from the image."""

    def forward(self, images: Tensor) -> Tensor:
        if len(images) == 1:
            if NUMBER.get() is None:
                NUMBER.set(images.mean() * 0)
            NUMBER.get().add_(1)
        logits = self.fc(self.conv(images).mean((2, 3)))
        total = torch.zeros(()) if NUMBER.get() is None else NUMBER.get()
        return logits * torch.where(total < CHANGES_AFTER, 1, 2)


def test_a_counter_in_what_the_first_call_computed_from_the_image_is_refused(
    preprocess: Preprocess, probes: Tensor
) -> None:
    NUMBER.set(None)
    with pytest.raises(CertificateError, match=rf"other outputs after {CALLS} calls"):
        prove_repetition(CountingInItsFeatures(lambda: None).eval(), preprocess, probes)


def test_a_network_without_state_is_accepted(preprocess: Preprocess, probes: Tensor) -> None:
    NUMBER.set(0)
    prove_repetition(Counting(lambda: 0 * in_context(1)).eval(), preprocess, probes)
    assert NUMBER.get() == CALLS + 2


def test_state_that_changes_outputs_later_is_refused_if_the_network_holds_it(
    preprocess: Preprocess, probes: Tensor
) -> None:
    calls: list[int] = []
    with pytest.raises(CertificateError, match=r"^count.* changes while the network runs"):
        prove_repetition(Counting(lambda: calls.append(1) or 0).eval(), preprocess, probes)


def test_an_error_in_a_later_call_is_one_line(preprocess: Preprocess, probes: Tensor) -> None:
    def fail() -> int:
        in_local()
        if LOCAL.number > CHANGES_AFTER:
            raise RuntimeError("worn out")
        return 0

    LOCAL.number = 0
    with pytest.raises(
        CertificateError, match=rf"fails when it runs {CALLS} times: .*worn out"
    ):
        prove_repetition(Counting(fail).eval(), preprocess, probes)


def test_a_certificate_repeats_the_calls(
    make: Callable[..., nn.Module],
    preprocess: Preprocess,
    probes: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    repeated, steps = [], list[str]()
    monkeypatch.setattr(
        certificate, "prove_repetition", lambda network, *_: repeated.append(network)
    )
    network = make("resnet8")
    certificate.certify(network, network, Captures(preprocess), probes, on_step=steps.append)
    assert repeated == [network]
    details = {text.partition(": ")[2] for text in steps}
    of_graphs = ("any batch size", "a batch of one", "without writes to operands")
    assert {f"Graphs, trained network, {of}" for of in of_graphs} | {
        "Outputs, trained network"
    } <= details
