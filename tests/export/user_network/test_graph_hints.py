"""What the graph of a network tells of its author's intentions: its own normalization, and cosines."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize
from torchvision.transforms import Normalize

from sopdeploy.bundle.manifest import BatchRange
from sopdeploy.images.preprocess import Preprocess
from sopdeploy_export.admit.graph_hints import normalizes_itself, returns_cosines
from sopdeploy_export.capture.program import capture_any_batch

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RULES = Preprocess(resize=9, crop=8)


class Small(nn.Module):
    """A network whose *first* step sees the images before its layers do."""

    def __init__(self, first: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first = first
        self.body = nn.Conv2d(3, 4, 3)
        self.last = nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.body(self.first(images)).mean((2, 3)))


class Cosines(Small):
    """The same, as metric learning has it: the classes are directions."""

    def forward(self, images: Tensor) -> Tensor:
        features = self.body(self.first(images)).mean((2, 3))
        return normalize(features) @ normalize(self.last.weight).T


def constant(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values).view(1, 3, 1, 1)


FIRST_STEPS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "tensors": (lambda images: (images - constant(MEAN)) / constant(STD), True),
    "torchvision": (Normalize(MEAN, STD), True),
    "numbers": (lambda images: 2 * images - 1, True),
    "blue first": (lambda images: images[:, [2, 1, 0]] - constant(MEAN), True),
    "another size before": (
        lambda images: interpolate(images, size=(6, 6), mode="bilinear") / 0.5,
        True,
    ),
    "nothing": (lambda images: images, False),
    "only another order": (lambda images: images[:, [2, 1, 0]], False),
    "each image by its own values": (
        lambda images: images - images.mean((1, 2, 3), keepdim=True),
        False,
    ),
    # As Inception does, which was trained on normalized images
    "each channel in its own way": (
        lambda images: torch.cat([images[:, :1] * 0.458 - 0.03, images[:, 1:]], 1),
        False,
    ),
}


@pytest.mark.parametrize("name", FIRST_STEPS)
def test_a_network_that_normalizes_its_images_is_noticed(name: str) -> None:
    first, expected = FIRST_STEPS[name]
    program = capture_any_batch(Small(first).eval(), RULES, BatchRange())
    assert normalizes_itself(program) is expected


@pytest.mark.parametrize(
    ("kind", "largest", "expected"),
    [
        *((Cosines, 0.9, True), (Cosines, 1.0, True), (Cosines, 1.01, False)),
        (Small, 0.9, False),
    ],
)
def test_cosines_need_a_norm_and_small_logits(
    kind: type[Small], largest: float, expected: bool
) -> None:
    program = capture_any_batch(kind(nn.Identity()).eval(), RULES, BatchRange())
    logits = torch.tensor([[largest, -0.5, 0.1]])
    assert returns_cosines(program, logits) is expected
    assert not returns_cosines(program, logits[:, :1])
