"""A plain run of a network against its captured graph, operator by operator."""

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_exporting as imported_by_its_name

from sopdeploy import Preprocess
from sopdeploy.bundle.manifest import BatchRange
from sopdeploy.errors import SopdeployError
from sopdeploy_export.capture.deployed import generated_images
from sopdeploy_export.prove.networks import Compared
from sopdeploy_export.prove.plain_run import Recorder, prove_plain_run
from sopdeploy_export.prove.removed import prove_removed

SIDE = 8
PREPROCESS = Preprocess(resize=SIDE, crop=SIDE)
Logits = Callable[["Small", Tensor], Tensor]


class Small(nn.Module):
    """Pools images (B, 3, H, W), and leaves the rest to *logits*."""

    def __init__(self, logits: Logits) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)
        self.aux = nn.Linear(3, 2)
        self.logits = logits

    def forward(self, images: Tensor) -> Tensor:
        return self.logits(self, images.mean((2, 3)))


def rare(x: Tensor) -> Tensor:
    """Zero but for images that no probe resembles."""
    return (x.abs().amax(1, keepdim=True) - 100).relu()


def asks(question: Callable[[Tensor], bool]) -> Logits:
    """Answer *question* in the graph as it does while the network is captured."""

    def logits(network: Small, x: Tensor) -> Tensor:
        return network.fc(x) if question(x) else network.fc(x) + rare(x)

    return logits


def views(view: Callable[[Tensor, int], Tensor]) -> Logits:
    """Read a map (B, 3, 3) by *view* with the number 1 while the network is captured, and 0 otherwise."""

    def logits(network: Small, x: Tensor) -> Tensor:
        y = view(torch.stack([x, 2 * x, 3 * x], 1), int(imported_by_its_name()))
        return network.fc(y.mul(1.0).sum(1))

    return logits


def clamps_by_data(network: Small, x: Tensor) -> Tensor:
    y = x + rare(x)
    y.data = torch.clamp(y.detach(), max=8)
    return network.fc(y)


def tries(attempt: Logits, otherwise: Logits = lambda n, x: n.fc(x)) -> Logits:
    """Do something *otherwise* while the network is captured, where *attempt* fails."""

    def logits(network: Small, x: Tensor) -> Tensor:
        with contextlib.suppress(Exception):
            return attempt(network, x)
        return otherwise(network, x)

    return logits


def is_rare(x: Tensor) -> Tensor:
    """Return whether the first image is one that no probe resembles, as a number of shape ()."""
    return (rare(x)[0, 0] > 0).long()


def keeps_the_last(network: Small, x: Tensor) -> Tensor:
    last = vars(network).get("last", x[:1])
    vars(network)["last"] = x[:1].clone()
    return network.fc(x + last)


def is_called_by_export(_: Tensor) -> bool:
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if Path(frame.f_code.co_filename).parts[-2:-1] == ("export",):
            return True
        frame = frame.f_back
    return False


def rows(x: Tensor) -> Tensor:
    """Return (2 B, 3): *x* (B, 3) twice, contiguous unless it is of a single image."""
    columns = x[:, :, None].expand(-1, -1, 2).contiguous()  # (B, 3, 2)
    return columns.transpose(1, 2).flatten(0, 1)


WRONG: dict[str, tuple[Logits, str]] = {
    "imports is_exporting": (asks(lambda x: imported_by_its_name()), "graph"),
    "looks at the stack": (asks(is_called_by_export), "graph"),
    "asks for the type": (asks(lambda x: type(x) is not Tensor), "graph"),
    "asks for the type of a size": (asks(lambda x: type(x.shape[0]) is not int), "graph"),
    "reads another part of a map": (views(lambda y, i: y.narrow(1, i, 2)), "graph"),
    "reads a larger part of a map": (views(lambda y, i: y.narrow(1, 0, 2 + i)), "graph"),
    "reads a map transposed": (views(lambda y, i: y.transpose(1, 1 + i)), "graph"),
    "reads a map as integers": (views(lambda y, i: y.view((y.dtype, torch.int32)[i])), "graph"),
    "writes by .data": (clamps_by_data, "graph"),
    "a size behind try": (
        tries(lambda n, x: n.fc(x) + (1 if rare(x).nonzero().shape[0] else 0)),
        r"aten\.nonzero.*\(test_plain_run\.py:\d+\)",
    ),
    "a value behind try": (
        tries(lambda n, x: n.fc(x) + (1 if rare(x).sum().item() else 0)),
        "reads values",
    ),
    "an argument that becomes a number": (
        tries(
            lambda n, x: n.fc(torch.cat([x, -x], 1).narrow(1, is_rare(x), 3)),
            lambda n, x: n.fc(torch.cat([x, -x], 1).narrow(1, 0, 3)),
        ),
        "_local_scalar_dense",
    ),
    "a list that becomes a constant": (
        tries(
            lambda n, x: n.fc(x + torch.tensor([is_rare(x)])),
            lambda n, x: n.fc(x + torch.tensor([0])),
        ),
        "tensor in the network",
    ),
    "a new tensor of the image's dtype": (
        tries(
            lambda n, x: n.fc(x + x.new_tensor([is_rare(x)])),
            lambda n, x: n.fc(x + x.new_tensor([0])),
        ),
        "new_tensor in the network",
    ),
    "a branch by a value": (
        tries(lambda n, x: torch.cond(is_rare(x) > 0, lambda y: n.fc(-y), n.fc, (x,))),
        "cond in the network",
    ),
    "a tensor that cannot be followed": (
        tries(lambda n, x: n.fc(x + is_rare(x).expand(3).to_sparse())),
        "cannot be captured.*as_strided",
    ),
    "keeps the last image": (keeps_the_last, "earlier run"),
    "draws random numbers": (lambda n, x: n.fc(x + torch.rand(3)), "random"),
    "reads a removed part": (lambda n, x: n.fc(x) + 0 * n.aux(x), "aux"),
    "treats one image alone": (
        lambda n, x: n.fc(x) if x.shape[0] == 1 else n.fc(2 * x),
        "1 image",
    ),
}
RIGHT: dict[str, Logits] = {
    "asks torch.compiler": lambda n, x: n.fc(x) + (not torch.compiler.is_exporting()),
    "a table in forward": lambda n, x: n.fc(x + torch.arange(3)),
    "writes to its own map": lambda n, x: n.fc(x.clone().add_(1).relu_()),
    "a constant mask": lambda n, x: n.fc(x[:, torch.tensor([True, True, True])]),
    "compares values in C++": lambda n, x: n.fc(F.one_hot(x.argmax(1), 3).float()),
    "chunks of the batch": lambda n, x: n.fc(sum(torch.cat([x, 2 * x]).chunk(2))),
    "a layout that only one image has": lambda n, x: n.fc(
        rows(x).contiguous().view(x.shape[0], 6)[:, :3]
    ),
    "a constant of the image's dtype": lambda n, x: n.fc(x + x.new_tensor([1, 2, 3])),
    "a table of the image's dtype": lambda n, x: n.fc(x + torch.arange(3).to(x).expand_as(x)),
    "dropout in eval mode": lambda n, x: n.fc(F.dropout(x, 0.5, training=n.training)),
}


def prove(logits: Logits) -> None:
    network = Small(logits).eval()
    trained = Compared.of("trained", network, PREPROCESS, BatchRange())
    images = torch.from_numpy(generated_images(SIDE))
    recorder = Recorder(trained, images, BatchRange().maximum, ("aux",))
    prove_removed(recorder)
    prove_plain_run(recorder)


@pytest.mark.parametrize("name", WRONG)
def test_a_plain_run_that_does_something_else_is_refused_with_its_place(name: str) -> None:
    logits, phrase = WRONG[name]
    with pytest.raises(SopdeployError, match=phrase):
        prove(logits)


@pytest.mark.parametrize("name", RIGHT)
def test_a_plain_run_that_does_what_the_graph_does_passes(name: str) -> None:
    prove(RIGHT[name])
