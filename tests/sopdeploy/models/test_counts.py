"""Parameters and multiply-adds of GSoP and GM-SOP networks beside the printed figures."""

from typing import Any

import pytest
import torch

from sopdeploy import describe
from sopdeploy.layers.attention.gsop_block import GSoPBlock, GSoPBlockConfig
from sopdeploy.models.gmsop import RELEASED_GATE
from sopdeploy.models.gsop import RELEASED
from sopdeploy.models.stats import tally

NO_NORM = {"channel_norm": False}  # the released code has no batch norm after the row-wise convolution


@pytest.mark.parametrize(
    ("name", "config", "parameters", "macs"),
    [
        ("gsop-net1-resnet50", RELEASED, 28_285_224, 6_364_987_392),
        ("gsop-net2-resnet50", RELEASED, 58_278_568, 6_446_101_504),
        ("gsop-net1-resnet50", NO_NORM, 28_285_224, 6_442_057_728),
        ("gsop-net1-preact-resnet164", NO_NORM, 2_894_516, 555_361_280),
        ("gsop-net1-preact-resnet164", {"strided_dr_stages": ["layer1"], **NO_NORM}, 2_894_516, 536_486_912),
        ("gsop-net1-resnet50", {}, 28_285_224 + 4 * 2 * 512, 6_442_057_728),  # Table 2's batch norm
        ("gsop-net2-resnet50", {}, 58_278_568 + 3 * 2 * 512, 6_523_171_840),
        ("gsop-net1-preact-resnet164", {}, 2_894_516 + 18 * 2 * 256, 555_361_280),
        (
            "gsop-net1-resnet50",
            {"attention": "position", "position_norm": True},
            26_182_952 + 4 * 2 * 256,
            None,
        ),
        ("gsop-net1-preact-resnet164", {"block_stages": (), "last_stride": 2}, 1_726_388, 247_669_760),
        ("gsop-net2-preact-resnet164", {"block_stages": ()}, 2_559_412, 500_652_288),  # MPN-COV of Table 6
        ("gsop-net1-resnet50", {"attention": "position"}, 26_182_952, None),
        ("gsop-net1-resnet50", {"attention": "average", **NO_NORM}, 28_911_144, None),
        ("gsop-net1-resnet50", {"attention": "concatenation", **NO_NORM}, 32_105_000, None),
        ("se-resnet50", {}, 28_088_024, None),
        ("cbam-resnet50", {}, 28_089_624, None),
        ("se-preact-resnet164", {}, 1_928_492, None),
    ],
)
def test_attention_parameters_and_macs_are_exact(name, config, parameters: int, macs: int | None) -> None:
    found = describe(name, **config)
    assert found.training == found.shipped
    assert found.shipped.parameters == parameters
    assert macs in {None, found.shipped.macs}


@pytest.mark.parametrize(
    ("attention", "norm", "parameters", "printed", "extra", "mflops"),
    [
        # multiply-adds of half the covariance product and of the scaling come on top of the convolutions'
        ("channel", True, 724_096, True, 128 * 129 // 2 * 196 + 1024 * 196, 28.0988),
        ("channel", False, 723_072, True, 128 * 129 // 2 * 196 + 1024 * 196, 28.0988),
        ("position", False, 164_672, True, 64 * 65 // 2 * 128 + 1024 * 196, 26.1898),
        ("position", True, 165_184, False, 64 * 65 // 2 * 128 + 1024 * 196, 26.1898),
    ],
)
def test_gsop_block_counts_match_table_2(attention, norm, parameters, printed, extra, mflops) -> None:
    """The printed parameters decide only the position-wise half: with a batch norm it has 0.17 M."""
    with torch.device("meta"):
        config = GSoPBlockConfig(attention=attention, **{f"{attention}_norm": norm})
        block = GSoPBlock(config, 1024, dr_stride=1)
        widen = torch.nn.Conv2d(3, 1024, 1, bias=False)
        counted = tally(torch.nn.Sequential(widen, block), 14).total()
    assert counted.parameters - 3 * 1024 == parameters
    assert (f"{parameters / 1e6:.2f}" == {"channel": "0.72", "position": "0.16"}[attention]) is printed
    macs = counted.macs - 3 * 1024 * 196
    assert round((macs + extra) / 1e6, 4) == mflops  # printed as 28.1 and 26.2


S1: dict[str, Any] = {"conv5_stride": 1}  # the released code of second-order networks

COUNTS = [
    # name, switches, published M, parameters, MACs at 64 pixels, dimension
    ("resnet18-64px", {}, None, 829_192, 140_309_504, 128),
    ("resnet18-512d", {}, 1.3, 1_278_728, 144_887_808, 512),
    ("resnet18-8256d", {}, None, 10_013_960, 216_070_656, 8256),
    ("srsop-resnet18", S1, 9.0, 8_957_192, 249_100_800, 8256),
    ("srsop-resnet18", {}, 9.0, 8_957_192, 148_437_504, 8256),
    ("parametric-srsop-resnet18", {}, None, 9_022_728, 152_631_808, 8256),
    ("avegap-16-resnet18", {}, None, 2_262_792, 207_802_368, 512),
    ("avesop-16-resnet18", {}, None, 10_022_280, 215_546_368, 8256),
    ("gmgap-16-8-resnet18", {}, 2.3, 2_344_712, 178_442_240, 512),
    ("gmgap-16-8-resnet18", RELEASED_GATE, 2.3, 2_333_192, 178_442_240, 512),
    ("gmsop-16-8-resnet18", S1 | RELEASED_GATE, 10.3, 10_352_776, 400_095_744, 8256),
    ("gmsop-16-8-resnet18", RELEASED_GATE, 10.3, 10_352_776, 186_186_240, 8256),
    ("gmsop-16-8-resnet18", {}, 10.3, 10_352_008, 186_186_240, 8256),
    ("sgmoe-16-8-resnet18", {}, 2.3, 2_274_056, 141_217_792, 512),
    ("sgmoe-16-8-resnet18", {"component_bias": False, "fusion_norm": True}, 2.3, 2_266_888, 141_217_792, 512),
    ("netvlad-64-resnet18", {}, 8.9, 8_909_640, 148_897_792, 8192),
    ("gmsop-16-8-resnet50", S1, 11.9, 11_922_568, 928_578_048, 8256),
    ("wrn36-1", {}, 1.6, 1_614_472, 291_304_448, 128),
    ("wrn36-1", {"project_first_stage": True}, 1.6, 1_614_760, 292_353_024, 128),
    ("wrn36-2", {}, 6.2, 6_184_840, 1_142_876_160, 256),
    ("gmgap-16-8-wrn36-2", {}, 8.7, 8_686_472, 1_218_629_632, 512),
    ("gmsop-16-8-wrn36-2", {"gate_norm": True}, None, 17_809_160, 1_264_122_368, 8256),
]


def printed(parameters: int) -> set[float]:
    """Return the count in millions with one decimal, rounded and truncated."""
    return {round(parameters / 1e6, 1), parameters // 100_000 / 10}


@pytest.mark.parametrize(
    ("name", "switches", "published", "parameters", "macs", "dimension"),
    COUNTS,
    ids=[f"{row[0]}{'-' if row[1] else ''}{','.join(row[1])}" for row in COUNTS],
)
def test_gmsop_counts_are_exact(
    name: str, switches: dict[str, Any], published: float | None, parameters: int, macs: int, dimension: int
) -> None:
    found = describe(name, **switches)
    assert (found.training.parameters, found.training.macs) == (parameters, macs)
    assert (found.shipped.macs, found.representation) == (macs, dimension)
    assert published is None or published in printed(parameters)


@pytest.mark.parametrize(
    ("name", "noise"),
    [("gmsop-16-8-resnet18", 16 * 8256), ("gmgap-16-8-resnet18", 16 * 512), ("srsop-resnet18", 0)],
)
def test_the_inference_model_lacks_only_the_noise_weights(name: str, noise: int) -> None:
    found = describe(name)
    assert found.training.parameters - found.shipped.parameters == noise


@pytest.mark.parametrize(("components", "chosen"), [(4, 2), (16, 16), (128, 32)])
def test_macs_count_k_of_n_components(components: int, chosen: int) -> None:
    found = describe("gmgap-16-8-resnet18", components=components, chosen=chosen, **RELEASED_GATE)
    one = 128 * 512 * 8 * 8
    assert found.shipped.macs == 178_442_240 + (chosen - 8) * one
    assert found.training.parameters == 2_333_192 + (components - 16) * (128 * 512 + 2 * 128)
