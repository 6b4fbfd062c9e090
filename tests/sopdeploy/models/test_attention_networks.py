import pytest
import torch
import torch.nn.functional as F

from sopdeploy import create_model
from sopdeploy.layers.attention.first_order import CBAM, squeeze_excite

FEATURES = torch.randn(2, 32, 7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_squeeze_excite_is_two_linear_layers_on_the_means() -> None:
    block = squeeze_excite(32, 16).double()
    means = F.adaptive_avg_pool2d(FEATURES, 1).flatten(1)
    hidden = F.relu(F.linear(means, block.fc1.weight.flatten(1), block.fc1.bias))
    weights = torch.sigmoid(F.linear(hidden, block.fc2.weight.flatten(1), block.fc2.bias))
    torch.testing.assert_close(block(FEATURES), FEATURES * weights[:, :, None, None])


def test_cbam_scales_channels_then_positions() -> None:
    block = CBAM(32, 16).double().eval()
    averaged, largest = F.adaptive_avg_pool2d(FEATURES, 1), F.adaptive_max_pool2d(FEATURES, 1)
    by_channel = FEATURES * torch.sigmoid(block.mlp(averaged) + block.mlp(largest))
    two = torch.stack([by_channel.max(dim=1).values, by_channel.mean(dim=1)], dim=1)
    by_position = torch.sigmoid(block.bn(block.conv(two)))
    torch.testing.assert_close(block(FEATURES), by_channel * by_position)


@pytest.mark.parametrize("kind", ["se", "cbam", "ge"])
def test_every_block_has_an_attention_and_torchvisions_keys(kind: str) -> None:
    with torch.device("meta"):
        plain, ours = create_model("resnet50"), create_model(f"{kind}-resnet50")
    attended = [name for name, _ in ours.named_modules() if name.endswith(".attention")]
    assert attended == [f"{place}.attention" for place in ours.tap_channels]
    extra = ours.state_dict().keys() - plain.state_dict().keys()
    assert plain.state_dict().keys() <= ours.state_dict().keys()
    assert all(".attention." in key for key in extra)


@pytest.mark.parametrize("conv5_stride", [1, 2])
def test_global_gathering_is_as_large_as_the_maps(conv5_stride: int) -> None:
    with torch.device("meta"):
        network = create_model("ge-resnet50", conv5_stride=conv5_stride)
        sides = [network.get_submodule(f"layer{s}.0.attention.gather.0").kernel_size[0] for s in (1, 2, 3, 4)]
    assert sides == [56, 28, 14, 7 if conv5_stride == 2 else 14]
