"""The effect of rounding on the margin: counted by hand, of a network in two precisions, in the summary."""

import math

import pytest
import torch
from torch import Tensor, nn

from sopdeploy.bundle.manifest import BatchRange
from sopdeploy_export import rounding
from sopdeploy_export.float64 import InFloat64
from sopdeploy_export.graph import Deployed, capture_any_batch, generated_images
from sopdeploy_export.precision.casts import place_casts
from sopdeploy_export.report.results import Exported
from sopdeploy_export.rounding import RoundingBound, bound_margin, bound_rounding
from tests.export.conftest import PREPROCESS, SIDE, trained

FLOAT32, FLOAT16 = 2.0**-24, 2.0**-11  # unit roundoff


class Thirds(nn.Module):
    """The logits 2 relu(a / 3), b / 3 and -100 of the first two values a, b of an image."""

    def forward(self, images: Tensor) -> tuple[Tensor]:
        thirds = torch.relu(images.flatten(1)[:, :2].float() / 3)
        return (torch.cat([2 * thirds[:, :1], thirds[:, 1:], torch.full_like(thirds[:, :1], -100)], dim=1),)


class Product(nn.Module):
    """The logits w a and 0 of the first value a of an image, in the type of *weight* w."""

    def __init__(self, weight: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight, dtype=dtype))

    def forward(self, images: Tensor) -> tuple[Tensor]:
        product = images.flatten(1)[:, :1].to(self.weight.dtype) * self.weight
        return (torch.cat([product, torch.zeros_like(product)], dim=1).float(),)


@torch.library.custom_op("sopdeploy_tests::doubled", mutates_args=())
def doubled(values: Tensor) -> Tensor:
    """Twice *values*, without a formula for its derivative."""
    return 2 * values


doubled.register_fake(torch.empty_like)


class Custom(nn.Module):
    """Logits by an operation of the user that has no derivative."""

    def forward(self, images: Tensor) -> tuple[Tensor]:
        return (doubled(images.flatten(1)[:, :2].float() / 3),)


class Steps(nn.Module):
    """Logits by an operation that has no derivative."""

    def forward(self, images: Tensor) -> tuple[Tensor]:
        thirds = images.flatten(1)[:, :2].float() / 3
        return (torch.heaviside(thirds, thirds),)


def program_of(network: nn.Module) -> torch.export.ExportedProgram:
    images = torch.zeros(1, SIDE, SIDE, 3, dtype=torch.uint8)
    return torch.export.export(network, (images,)).run_decompositions({})


BY_HAND = {  # network, values: margin, bound
    "two quotients, one of them doubled": (Thirds(), (10, 7), 13 / 3, math.hypot(20 / 3, 7 / 3) * FLOAT32),
    "a quotient that is exact": (Thirds(), (9, 7), 6 - 7 / 3, 7 / 3 * FLOAT32),
    "all are exact": (Thirds(), (9, 6), 4, 0),
    "a weight in float32 is exact": (Product(0.75, torch.float32), (201,), 150.75, 0),
    "a weight in float16 was rounded": (Product(0.75, torch.float16), (200,), 150, 150 * FLOAT16),
    "and its product is": (
        Product(0.7, torch.float16),
        (255,),
        178.5,
        math.hypot(*[255 * 0.7001953125] * 2) * FLOAT16,
    ),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_the_bound_is_four_times_the_root_of_the_squared_roundings(case):
    network, values, margin, bound = BY_HAND[case]
    pixels = torch.zeros(1, SIDE, SIDE, 3, dtype=torch.uint8)
    pixels.flatten()[: len(values)] = torch.tensor(values, dtype=torch.uint8)
    found = bound_margin(program_of(network).module(), pixels)
    assert found == pytest.approx((margin, 4 * bound), rel=1e-6, abs=0)


def test_the_logits_of_a_network_in_two_precisions_differ_by_less_than_the_bound():
    network, images, batch = trained("resnet8"), generated_images(SIDE), BatchRange(optimum=2, maximum=4)
    exact = Deployed(trained("resnet8"), PREPROCESS).double().eval()
    bounds = {}
    for precision in ("fp32", "fp16"):
        run = network if precision == "fp32" else place_casts(trained("resnet8"), "fp16")
        found = bound_rounding(capture_any_batch(run, PREPROCESS, batch), images, precision)
        assert len(found.bounds) == 4
        bounds[precision] = found.bounds
        for index, bound in zip((0, 4, 7, 11), found.bounds, strict=True):
            pixels = torch.from_numpy(images[[index]])
            with torch.no_grad():
                with InFloat64():
                    expected = exact(pixels)[0][0]
                first, second = expected.topk(2).indices
                logits = Deployed(run, PREPROCESS).eval()(pixels)[0][0].double()
            difference = (logits[first] - logits[second]) - (expected[first] - expected[second])
            assert 0 < abs(difference) < bound
    ratios = [low / high for low, high in zip(bounds["fp16"], bounds["fp32"], strict=True)]
    assert all(FLOAT16 / FLOAT32 / 4 < ratio < 4 * FLOAT16 / FLOAT32 for ratio in ratios)


def test_there_is_no_bound_for_int8_and_for_operations_without_a_derivative():
    images = generated_images(SIDE)
    assert bound_rounding(program_of(Thirds()), images, "fp32") is not None
    assert bound_rounding(program_of(Thirds()), images, "int8") is None
    assert bound_rounding(program_of(Steps()), images, "fp32") is None
    assert bound_rounding(program_of(Custom()), images, "fp32") is None


def test_another_failure_is_not_taken_for_a_missing_derivative(monkeypatch):
    def fail(*_: object) -> None:
        raise RuntimeError("not enough memory")

    monkeypatch.setattr(rounding, "bound_margin", fail)
    with pytest.raises(RuntimeError, match="not enough memory"):
        bound_rounding(program_of(Thirds()), generated_images(SIDE), "fp32")


def test_the_json_of_an_export_names_the_kind_of_the_bound(branched: Exported):
    before = [parameter.requires_grad for parameter in branched.rounding.args[0].parameters()]
    found = RoundingBound.model_validate(branched.summary()["rounding"])
    assert found.kind == "probabilistic, first-order"
    assert len(found.margins) == 4
    assert all(0 < bound < 0.01 for bound in found.bounds)
    assert [parameter.requires_grad for parameter in branched.rounding.args[0].parameters()] == before
