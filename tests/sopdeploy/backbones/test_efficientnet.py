import pytest
import timm
import torch

from sopdeploy import create_model, describe
from sopdeploy.backbones.efficientnet import STAGES, EfficientNet, EfficientNetConfig
from sopdeploy.layers.residual import MBConv, StochasticDepth
from sopdeploy.models.stats import tally


def test_efficientnet_has_timms_keys_and_gives_its_logits() -> None:
    torch.manual_seed(0)
    theirs = timm.create_model("efficientnet_b0", num_classes=7).eval()
    ours = EfficientNet(EfficientNetConfig(), 7).eval()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        assert torch.equal(ours(images), theirs(images))


def test_counts_are_the_published_ones() -> None:
    with torch.device("meta"):
        network = EfficientNet(EfficientNetConfig(), 1000)
    counted = tally(network.eval(), 224).total()
    assert (counted.parameters, counted.macs) == (5_288_548, 385_814_752)  # Table 2: 5.3 M, 0.39 G


def test_drop_probability_grows_with_depth() -> None:
    network = EfficientNet(EfficientNetConfig(stochastic_depth=0.16), 3)
    drops = [block.stochastic_depth.drop for stage in STAGES for block in network.get_submodule(stage)]
    assert drops == pytest.approx([0.01 * depth for depth in range(16)])


def test_stochastic_depth_keeps_the_mean_and_is_off_in_eval_mode() -> None:
    torch.manual_seed(0)
    layer, ones = StochasticDepth(0.25), torch.ones(4000, 1, 1, 1)
    out = layer(ones)
    assert out.unique().tolist() == pytest.approx([0, 4 / 3])
    assert out.mean().item() == pytest.approx(1, abs=0.05)
    assert layer.eval()(ones) is ones


def test_branch_blocks_have_the_kernel_of_their_stage() -> None:
    network = EfficientNet(EfficientNetConfig(), 3)
    for stage in STAGES.values():
        block = network.branch_block(stage.channels, stage.channels, 1)
        assert isinstance(block, MBConv)
        assert block.conv_dw.kernel_size == (stage.kernel, stage.kernel)
        assert block.has_shortcut


def test_second_order_head_goes_by_64_swished_channels_to_2080_numbers() -> None:
    with torch.device("meta"):
        network = create_model("isqrt-efficientnet-b0")
    assert network.reduction[0].weight.shape == (64, 1280, 1, 1)
    assert isinstance(network.reduction[2], torch.nn.SiLU)
    assert network.dropout.p == 0.2
    assert network.num_features() == network.classifier.in_features == 2080
    counted = describe("isqrt-efficientnet-b0").shipped.parameters
    assert counted == 5_288_548 - 1281 * 1000 + (1280 * 64 + 128) + 2081 * 1000
