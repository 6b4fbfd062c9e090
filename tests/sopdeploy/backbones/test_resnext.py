import pytest
import torch

from sopdeploy.backbones.cifar_resnet import ResNeXt, ResNeXtConfig


@pytest.mark.parametrize(
    ("cardinality", "published", "parameters"),
    # Xie et al. 2017; 68.155 M is printed as 68.1, cut off rather than rounded
    [(8, 34.4, 34_426_698), (16, 68.1, 68_155_210)],
)
def test_parameters_are_the_published_ones(cardinality: int, published: float, parameters: int) -> None:
    with torch.device("meta"):
        network = ResNeXt(ResNeXtConfig(cardinality=cardinality), 10)
    found = sum(p.numel() for p in network.parameters())
    assert found == parameters
    assert int(found / 1e5) / 10 == published


def test_groups_are_64_128_and_256_channels_wide() -> None:
    with torch.device("meta"):
        network = ResNeXt(ResNeXtConfig(), 10)
    convolutions = [getattr(network, f"layer{stage}")[0].conv2 for stage in (1, 2, 3)]
    assert [c.groups for c in convolutions] == [8, 8, 8]
    assert [c.weight.shape[1] for c in convolutions] == [64, 128, 256]


def test_stages_halve_the_map_and_double_the_channels() -> None:
    with torch.device("meta"):
        network = ResNeXt(ResNeXtConfig(cardinality=2, group_width=4), 10)
        last, tapped = network.features(torch.empty(1, 3, 32, 32), ["layer1.2", "layer2.2"])
    assert [tuple(t.shape[1:]) for t in (*tapped, last)] == [(256, 32, 32), (512, 16, 16), (1024, 8, 8)]
