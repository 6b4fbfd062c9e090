"""The integers of the counting convention; the papers' own rounded figures stand beside them."""

import pytest
import torch
from torch import nn

from sopdeploy import describe
from sopdeploy.errors import ConfigError
from sopdeploy.models.describe import count

S1 = {"conv5_stride": 1}
TABLE = {"aux_stride": "table"}


@pytest.mark.parametrize(
    ("name", "config", "parameters", "macs"),
    [
        ("resnet18", S1, 11_689_512, 3_047_198_720),
        ("resnet50", S1, 25_557_032, 6_208_618_496),
        ("dsop-resnet18", {}, 100_494_536, 6_385_970_944),
        ("dsop-resnet18", TABLE, 100_577_224, 5_698_760_448),
        ("dsop-resnet50", TABLE, 181_917_384, 10_537_324_544),
        ("dsop-resnet50", {}, 148_686_920, 12_076_816_640),
    ],
)
def test_training_counts_are_the_expected_integers(name, config, parameters: int, macs: int) -> None:
    counted = describe(name, **config).training
    assert (counted.parameters, counted.macs) == (parameters, macs)


@pytest.mark.parametrize("depth", [18, 34, 50])
def test_what_ships_of_a_dsop_network_counts_as_the_plain_one(depth: int) -> None:
    plain = describe(f"resnet{depth}", conv5_stride=1)
    assert plain.training == plain.shipped
    assert describe(f"dsop-resnet{depth}").shipped == plain.shipped
    assert describe(f"dsop-resnet{depth}", aux_stride="table").shipped == plain.shipped


@pytest.mark.parametrize(
    ("name", "config", "millions", "giga"),
    [
        ("resnet34", S1, 21.8, 5.5905),  # Table I, test; with batch norm 5.61
        ("resnet50", {"bottleneck_stride": "v1"}, 25.6, 3.8580),  # Table II, 3.86
        ("dsop-resnet34", {"aux_stride": "table"}, 110.7, None),  # Table I, training
        ("dsop-resnet34", {}, 110.6, None),  # the text's definition; nothing is published for it
    ],
)
def test_published_figures_are_met(name, config, millions: float, giga: float | None) -> None:
    counted = describe(name, **config).training
    assert round(counted.parameters / 1e6, 1) == millions
    if giga is not None:
        assert round(counted.macs / 1e9, 4) == giga


@pytest.mark.parametrize(
    ("widths", "millions"),
    [((64,) * 4, 32.7), ((128,) * 4, 51.3), ((256,) * 4, 100.6)],
)
def test_heads_of_table_viii_have_the_published_parameters(widths, millions: float) -> None:
    counted = describe("dsop-resnet18", aux_widths=widths, **TABLE).training
    assert round(counted.parameters / 1e6, 1) == millions


@pytest.mark.parametrize(
    ("convolutions", "millions"),
    [
        ((16, 0, 0, 0), 94.8),
        ((0, 0, 0, 16), 127.4),
        ((8, 8, 0, 0), 95.4),
        ((8, 0, 0, 8), 108.7),
        ((0, 0, 8, 8), 112.0),
        ((4, 4, 4, 4), 100.6),
    ],
)
def test_insertion_points_of_table_x_have_the_published_parameters(convolutions, millions: float) -> None:
    blocks = tuple(number // 2 for number in convolutions)
    counted = describe("dsop-resnet18", aux_blocks=blocks, keep_unused_branches=True, **TABLE).training
    assert round(counted.parameters / 1e6, 1) == millions


def test_branches_that_really_train_in_table_x_are_smaller() -> None:
    blocks = (8, 0, 0, 0)
    assert describe("dsop-resnet18", aux_blocks=blocks, **TABLE).training.parameters == 14_362_384


def test_counting_allocates_nothing() -> None:
    assert describe("dsop-resnet18", num_classes=10**9).training.parameters > 10**12


def test_description_says_what_it_counted() -> None:
    told = describe("dsop-resnet20", num_classes=7, image_size=16, aux_pooling="gap")
    assert (told.name, told.num_classes, told.image_size) == ("dsop-resnet20", 7, 16)
    assert told.config["aux_pooling"] == "gap"
    assert told.config["depth"] == 20
    assert told.training_only == ("branches",)
    assert told.representation == 64
    assert told.loss_weights["layer3_2"] == 0.3
    assert told.model_dump(mode="json")["training"]["macs"] > told.shipped.macs


def test_twice_the_side_is_four_times_the_convolutions() -> None:
    small, large = (describe("resnet20", image_size=side).shipped.macs - 640 for side in (32, 64))
    assert large == 4 * small


@pytest.mark.parametrize(
    ("layer", "channels", "macs"),
    [
        (nn.Conv2d(4, 6, 3, padding=1), 4, 6 * 4 * 9 * 25),
        (nn.Conv2d(4, 6, 3, padding=1, groups=2), 4, 6 * 2 * 9 * 25),
        (nn.Conv2d(4, 6, 1, stride=2), 4, 6 * 4 * 9),
    ],
    ids=["3x3", "grouped", "strided"],
)
def test_multiply_adds_of_a_convolution(layer: nn.Conv2d, channels: int, macs: int) -> None:
    network = nn.Sequential(nn.Conv2d(3, channels, 1), layer).to("meta")
    assert count(network, 5).macs - 3 * channels * 25 == macs


def test_an_image_too_small_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="image_size: 0 pixels are too few for resnet18"):
        describe("resnet18", image_size=0)


def test_real_weights_stay_where_they_were() -> None:
    describe("resnet8")
    assert torch.empty(1).device.type == "cpu"
