"""Counts of GSoP and of its baselines: the published figures, and the exact integers behind them."""

import pytest
import torch

from sopdeploy import create_model, describe
from sopdeploy.layers.attention.gsop_block import GSoPBlock, GSoPBlockConfig
from sopdeploy.models.gsop import RELEASED
from sopdeploy.models.stats import count


@pytest.mark.parametrize(
    ("name", "config", "parameters", "macs"),
    [
        ("gsop-net1-resnet50", RELEASED, 28_285_224, 6_364_987_392),
        ("gsop-net2-resnet50", RELEASED, 58_278_568, 6_446_101_504),
        ("gsop-net1-resnet50", {}, 28_285_224, 6_442_057_728),
        ("gsop-net2-resnet50", {}, 58_278_568, 6_523_171_840),
        ("gsop-net1-preact-resnet164", {}, 2_894_516, 555_361_280),
        ("gsop-net1-preact-resnet164", {"strided_dr_stages": ["layer1"]}, 2_894_516, 536_486_912),
        ("gsop-net2-resnet50", {"block_stages": ()}, 56_929_832, 6_342_226_944),  # iSQRT-COV
        ("gsop-net1-preact-resnet164", {"block_stages": (), "last_stride": 2}, 1_726_388, 247_669_760),
        ("gsop-net1-resnet50", {"block_stages": ()}, 25_557_032, 6_208_618_496),  # ResNet-50, s1
    ],
)
def test_parameters_and_macs_are_the_expected_integers(name, config, parameters: int, macs: int) -> None:
    counted = describe(name, **config).shipped
    assert (counted.parameters, counted.macs) == (parameters, macs)


@pytest.mark.parametrize(
    ("name", "config", "parameters"),
    [
        ("gsop-net1-resnet101", {}, 47_277_352),
        ("gsop-net2-resnet101", {}, 77_270_696),
        ("gsop-net1-resnet50", {"attention": "position"}, 26_182_952),
        ("gsop-net1-resnet50", {"attention": "average"}, 28_911_144),
        ("gsop-net1-resnet50", {"attention": "sum"}, 28_911_144),
        ("gsop-net1-resnet50", {"attention": "maximum"}, 28_911_144),
        ("gsop-net1-resnet50", {"attention": "concatenation"}, 32_105_000),
        ("se-resnet50", {}, 28_088_024),
        ("cbam-resnet50", {}, 28_089_624),
        ("se-preact-resnet164", {}, 1_928_492),
    ],
)
def test_parameters_are_the_expected_integers(name, config, parameters: int) -> None:
    counted = describe(name, **config)
    assert counted.training == counted.shipped
    assert counted.shipped.parameters == parameters


@pytest.mark.parametrize(
    ("name", "config", "times_parameters", "times_macs"),
    [
        ("gsop-net1-resnet50", RELEASED, 1.1, 1.6),
        ("gsop-net2-resnet50", RELEASED, 2.3, 1.7),
        ("gsop-net2-resnet50", {"block_stages": ()}, 2.2, 1.6),
        ("se-resnet50", {"bottleneck_stride": "v1"}, 1.1, 1.0),
        ("cbam-resnet50", {"bottleneck_stride": "v1"}, 1.1, 1.0),
        ("ge-resnet50", {"bottleneck_stride": "v1"}, 1.3, 1.0),
    ],
)
def test_ratios_of_gsops_table_5_are_met(name, config, times_parameters, times_macs) -> None:
    """Times ResNet-50's 25.5 M and 3.86 G."""
    counted = describe(name, **config).shipped
    assert round(counted.parameters / 25.5e6, 1) == times_parameters
    assert round(counted.macs / 3.86e9, 1) == times_macs


@pytest.mark.parametrize(
    ("name", "config", "millions"),
    [
        ("gsop-net1-preact-resnet164", {}, 2.9),
        ("gsop-net2-preact-resnet164", {}, 3.6),
        ("se-preact-resnet164", {}, 1.9),
        ("gsop-net1-preact-resnet164", {"block_stages": (), "last_stride": 2}, 1.7),
    ],
)
def test_parameters_of_gsops_table_6_are_met(name: str, config: dict, millions: float) -> None:
    assert round(describe(name, **config).shipped.parameters / 1e6, 1) == millions


def test_mpn_cov_of_table_6_is_a_gsop_net2_without_blocks() -> None:
    """The table prints 2.5 M; its construction has 2.559 M."""
    mpn_cov = describe("gsop-net2-preact-resnet164", block_stages=()).shipped
    assert (mpn_cov.parameters, mpn_cov.macs) == (2_559_412, 500_652_288)


@pytest.mark.parametrize(
    ("name", "representation"),
    [
        ("gsop-net1-resnet50", 2048),
        ("gsop-net2-resnet50", 32896),
        ("gsop-net1-preact-resnet164", 256),
        ("gsop-net2-preact-resnet164", 8256),
    ],
)
def test_representation_is_as_long_as_the_paper_says(name: str, representation: int) -> None:
    with torch.device("meta"):
        assert create_model(name).num_features() == representation


@pytest.mark.parametrize(
    ("attention", "parameters", "extra", "mflops"),
    [
        # multiply-adds of half the covariance product and of the scaling come on top of the convolutions'
        ("channel", 723_072, 128 * 129 // 2 * 196 + 1024 * 196, 28.0988),
        ("position", 164_672, 64 * 65 // 2 * 128 + 1024 * 196, 26.1898),
    ],
)
def test_blocks_for_conv4_x_count_as_in_table_2(attention: str, parameters, extra, mflops) -> None:
    with torch.device("meta"):
        block = GSoPBlock(GSoPBlockConfig(attention=attention), 1024, dr_stride=1)
        widen = torch.nn.Conv2d(3, 1024, 1, bias=False)
        counted = count(torch.nn.Sequential(widen, block), 14)
    assert counted.parameters - 3 * 1024 == parameters
    macs = counted.macs - 3 * 1024 * 196
    assert round((macs + extra) / 1e6, 4) == mflops  # printed as 28.1 and 26.2
