"""The published counts of the GM-SOP paper (Tables 2 and 3) and README, and what the networks have.

`published` is the printed figure in millions, rounded or (10.3 for 10,352,776) cut; `None` where none is
printed. Figures that no construction reaches stand in `MISPRINTS`, beside what is built; no network
is bent to them.
"""

from typing import Any

import pytest

from sopdeploy.models.describe import describe

RELEASED: dict[str, Any] = {"conv5_stride": 1}  # second order as released keeps the map of conv5_x
PAPER: dict[str, Any] = {}

COUNTS = [
    # name, switches, published M, parameters, MACs at 64 pixels, dimension
    ("resnet18-64px", PAPER, None, 829_192, 140_309_504, 128),
    ("resnet18-512d", PAPER, 1.3, 1_278_728, 144_887_808, 512),
    ("resnet18-8256d", PAPER, None, 10_013_960, 216_070_656, 8256),
    ("srsop-resnet18", RELEASED, 9.0, 8_957_192, 249_100_800, 8256),
    ("srsop-resnet18", PAPER, 9.0, 8_957_192, 148_437_504, 8256),
    ("parametric-srsop-resnet18", PAPER, None, 9_022_728, 152_631_808, 8256),
    ("avegap-16-resnet18", PAPER, None, 2_262_792, 207_802_368, 512),
    ("avesop-16-resnet18", PAPER, None, 10_022_280, 215_546_368, 8256),
    ("gmgap-16-8-resnet18", PAPER, 2.3, 2_333_192, 178_442_240, 512),
    ("gmsop-16-8-resnet18", RELEASED, 10.3, 10_352_776, 400_095_744, 8256),
    ("gmsop-16-8-resnet18", PAPER, 10.3, 10_352_776, 186_186_240, 8256),
    ("sgmoe-16-8-resnet18", PAPER, 2.3, 2_266_888, 141_217_792, 512),
    ("netvlad-64-resnet18", PAPER, 8.9, 8_909_640, 148_897_792, 8192),
    ("resnet50-64px", PAPER, 2.4, 2_399_752, 442_299_392, 128),
    ("resnet50-512d", PAPER, 2.8, 2_849_288, 446_877_696, 512),
    ("resnet50-8256d", PAPER, 11.6, 11_584_520, 518_060_544, 8256),
    ("gmsop-16-8-resnet50", RELEASED, 11.9, 11_923_336, 928_578_048, 8256),
    ("wrn36-1", PAPER, 1.6, 1_614_472, 291_304_448, 128),
    ("wrn36-1", {"project_first_stage": True}, 1.6, 1_614_760, 292_353_024, 128),
    ("wrn36-2", PAPER, 6.2, 6_184_840, 1_142_876_160, 256),
    ("wrn36-5", PAPER, 37.6, 37_635_880, 7_054_083_072, 640),
    ("gmgap-16-8-wrn36-2", PAPER, 8.7, 8_687_496, 1_218_629_632, 512),
    ("gmsop-16-8-wrn36-2", PAPER, None, 17_809_160, 1_264_122_368, 8256),
]

MISPRINTS = [
    # name, printed M, what is built
    ("resnet18-64px", 0.9, 829_192),  # README prints 0.9M
    ("gmsop-16-8-wrn36-2", 15.7, 17_809_160),  # README and Table 3; the released code builds 17.8M
]


def printed(parameters: int) -> set[float]:
    """Both ways of printing a count in millions with one decimal."""
    return {round(parameters / 1e6, 1), parameters // 100_000 / 10}


@pytest.mark.parametrize(
    ("name", "switches", "published", "parameters", "macs", "dimension"),
    COUNTS,
    ids=[f"{row[0]}{'-' if row[1] else ''}{','.join(row[1])}" for row in COUNTS],
)
def test_counts_are_exact(
    name: str, switches: dict[str, Any], published: float | None, parameters: int, macs: int, dimension: int
) -> None:
    found = describe(name, **switches)
    assert (found.training.parameters, found.training.macs) == (parameters, macs)
    assert (found.shipped.macs, found.representation) == (macs, dimension)
    assert published is None or published in printed(parameters)


@pytest.mark.parametrize(("name", "figure", "built"), MISPRINTS)
def test_misprints_are_named_and_not_matched(name: str, figure: float, built: int) -> None:
    assert describe(name).training.parameters == built
    assert figure not in printed(built)


@pytest.mark.parametrize(
    ("name", "noise"),
    [("gmsop-16-8-resnet18", 16 * 8256), ("gmgap-16-8-resnet18", 16 * 128), ("srsop-resnet18", 0)],
)
def test_what_ships_is_smaller_by_the_noise_weights_alone(name: str, noise: int) -> None:
    found = describe(name)
    assert found.training.parameters - found.shipped.parameters == noise


@pytest.mark.parametrize(("components", "chosen"), [(4, 2), (16, 16), (128, 32)])
def test_k_of_n_components_are_counted(components: int, chosen: int) -> None:
    found = describe("gmgap-16-8-resnet18", components=components, chosen=chosen)
    one = 128 * 512 * 8 * 8
    assert found.shipped.macs == 178_442_240 + (chosen - 8) * one
    assert found.training.parameters == 2_333_192 + (components - 16) * (128 * 512 + 2 * 128)


def test_larger_images_of_places365_are_counted_too() -> None:
    found = describe("gmsop-16-8-resnet18", image_size=96, num_classes=365)
    assert found.training.parameters == 10_352_776 - 635 * 8257
    assert found.shipped.macs == (186_186_240 - 8_256_000) * 9 // 4 + 365 * 8256
