import pytest
import timm
import torch

from sopdeploy import create_model
from sopdeploy.backbones.efficientnet import MBCONV_STAGES, EfficientNet, EfficientNetConfig
from tests.sweep.steps import Small, one_training_step


@pytest.mark.parametrize(
    ("name", "timms", "sides"),
    [
        ("efficientnet-b0", "efficientnet_b0", (64, 96)),
        ("efficientnet-lite0", "tf_efficientnet_lite0", (64, 67)),
        ("efficientnet-lite2", "tf_efficientnet_lite2", (65, 68)),
    ],
)
def test_networks_have_timms_keys_and_give_its_logits(name: str, timms: str, sides: tuple[int, int]) -> None:
    torch.manual_seed(0)
    theirs = timm.create_model(timms, num_classes=7).eval()
    ours = create_model(name, num_classes=7).eval()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, *sides)
    with torch.no_grad():
        assert torch.equal(ours(images), theirs(images))


def test_drop_probability_grows_with_depth() -> None:
    network = EfficientNet(EfficientNetConfig(stochastic_depth=0.16), 3)
    drops = [getattr(block.drop_path, "drop_prob", 0) for stage in network.blocks for block in stage]
    assert drops == pytest.approx([0.01 * depth for depth in range(16)])


def test_branch_blocks_are_like_those_of_their_stage() -> None:
    network = EfficientNet(EfficientNetConfig(), 3)
    for name, stage in list(MBCONV_STAGES.items())[1:]:
        block = network.branch_block(stage.channels, stage.channels, 1)
        assert block.conv_dw.kernel_size == network.get_submodule(name)[-1].conv_dw.kernel_size
        assert block.has_skip


def test_second_order_head_goes_by_64_swished_channels_to_2080_numbers() -> None:
    with torch.device("meta"):
        network = create_model("isqrt-efficientnet-b0")
    assert network.reduction[0].weight.shape == (64, 1280, 1, 1)
    assert isinstance(network.reduction[2], torch.nn.SiLU)
    assert network.dropout.p == 0.2
    assert network.num_features() == network.classifier.in_features == 2080


@pytest.mark.parametrize("name", ["efficientnet-b0", "efficientnet-lite0"])
def test_images_have_different_logits_after_one_training_step(name: str) -> None:
    network = Small(name, 64).build()
    assert one_training_step(network, 64)
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        logits = network.eval()(images)
    assert float((logits.amax(dim=0) - logits.amin(dim=0)).max() / logits.abs().max()) > 1e-4
