from typing import Any

import pytest
import timm
import torch
from timm.models._efficientnet_blocks import InvertedResidual
from torch import nn

from sopdeploy.errors import ConfigError
from sopdeploy.layers.residual import BasicBlock, Bottleneck
from sopdeploy.models.describe import describe
from sopdeploy.models.registry import create_model
from sopdeploy_commands.rules import read_preprocess

NAMES = ["resnet18", "convnext_atto", "efficientnet_b0", "mobilenetv3_small_100", "regnety_002"]
FEW = {"aux_blocks": (1, 1, 1, 1), "aux_widths": (4, 4, 4, 4)}


@pytest.mark.parametrize("name", NAMES)
def test_the_inference_model_is_timms_network_with_timms_keys(name: str) -> None:
    torch.manual_seed(0)
    theirs = timm.create_model(name, num_classes=5).eval()
    trained = create_model(f"dsop-timm:{name}", num_classes=5, **FEW).eval()
    kept = {k: v for k, v in trained.state_dict().items() if not k.startswith("branches.")}

    assert list(kept) == list(theirs.state_dict())

    plain = trained.inference_model().eval()
    plain.load_state_dict(kept)
    theirs.load_state_dict(kept)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = theirs(images)
        assert torch.equal(trained(images), expected)
        assert torch.equal(plain(images), expected)


@pytest.mark.parametrize(
    ("name", "taps", "kind", "options"),
    [
        (
            "resnet18",
            {"layer1": 64, "layer2": 128, "layer3": 256, "layer4": 512},
            BasicBlock,
            {},
        ),
        ("regnety_002", {"s1": 24, "s2": 56, "s3": 152, "s4": 368}, Bottleneck, {}),
        (
            "efficientnet_b0",
            {"blocks.1": 24, "blocks.2": 40, "blocks.4": 112, "blocks.6": 320},
            InvertedResidual,
            {"last_branch": "stage"},
        ),
    ],
)
def test_branches_follow_timms_stages_in_the_nearest_kind_of_block(
    name: str, taps: dict[str, int], kind: type[nn.Module], options: dict[str, Any]
) -> None:
    with torch.device("meta"):
        network = create_model(f"dsop-timm:{name}", **options)

    assert network.tap_channels == taps
    assert list(network.branches) == [tap.replace(".", "_") for tap in taps]
    for branch, channels in zip(network.branches.values(), taps.values(), strict=True):
        assert [type(block) for block in branch.blocks] == [kind, kind]
        assert branch.pooling.width == min(channels, 256)
        assert isinstance(branch.reduction, nn.Identity) == (channels <= 256)


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        (
            "test_efficientnet",
            256,
        ),  # a convolution from 64 channels between the stages and the pooling
        ("mobilenetv3_small_100", None),  # a convolution after the pooling
        ("test_resnet", None),
        ("test_vit", None),
    ],
)
def test_the_last_branch_reads_what_the_pooling_reads(name: str, channels: int | None) -> None:
    torch.manual_seed(0)
    network = create_model(f"dsop-timm:{name}", num_classes=3, iterations=2)
    last = list(network.plans.values())[-1]
    assert network.maps_of_timm.last == channels
    assert (last.tap == "last_map") == (channels is not None)
    if channels is None:
        return

    assert last.blocks == 0
    network(torch.randn(2, 3, 64, 64)).branches["last_map"].sum().backward()
    assert network.conv_head.weight.grad.abs().sum() > 0


def test_a_checkpoint_of_04_has_its_last_branch_before_the_convolution() -> None:
    config = create_model("dsop-timm:test_efficientnet", num_classes=3).config.model_dump()
    of_04 = {key: value for key, value in config.items() if key != "last_branch"}
    read = [
        create_model("dsop-timm:test_efficientnet", num_classes=3, **values)
        for values in (of_04, config)
    ]
    assert ["last_map" in network.branches for network in read] == [False, True]


@pytest.mark.parametrize(
    ("name", "taps"),
    [
        ("test_vit", {f"blocks.{number}": (64, 10) for number in range(6)}),
        (
            "test_mambaout",
            {
                f"stages.{n}": size
                for n, size in enumerate([(16, 40), (32, 20), (48, 10), (64, 5)])
            },
        ),
    ],
)
@torch.no_grad()
def test_tokens_and_maps_with_channels_last_are_taps_like_others(name: str, taps) -> None:
    network = create_model(f"dsop-timm:{name}", num_classes=3).eval()
    images = torch.randn(2, 3, 160, 160)
    last, maps = network.feature_maps(images, taps)

    assert network.tap_channels == {tap: channels for tap, (channels, _) in taps.items()}
    assert [(len(one), *one.shape[1:3], one.shape[3]) for one in maps] == [
        (2, channels, side, side) for channels, side in taps.values()
    ]
    assert torch.equal(network.classify(last), network(images))
    assert len(network.train()(images).branches) == len(taps)


def test_a_network_of_fixed_size_says_which() -> None:
    network = create_model("timm:test_vit", num_classes=3)
    with pytest.raises(ConfigError, match=r"timm:test_vit: .*160"):
        network(torch.zeros(1, 3, 32, 32))


def test_a_tag_selects_the_same_network_with_other_weights() -> None:
    tagged, plain = (
        create_model(f"timm:{name}", num_classes=3) for name in ("resnet18.a1_in1k", "resnet18")
    )

    assert list(tagged.state_dict()) == list(plain.state_dict())
    assert read_preprocess("timm:resnet18.tv_in1k") != read_preprocess("timm:resnet18.a1_in1k")
    with pytest.raises(ConfigError, match=r"timm:resnet18\.a1_in1k"):
        create_model("resnet18.a1_in1k")


@pytest.mark.parametrize(
    "name", ["resnet181", "", "hf-hub:timm/resnet18.a1_in1k", "resnet18.a1"]
)
def test_names_that_timm_does_not_build_are_rejected(name: str) -> None:
    with pytest.raises(ConfigError, match=f"timm:{name}: timm "):
        create_model(f"timm:{name}")


@pytest.mark.parametrize(
    ("config", "parameters", "gmacs"),
    [
        ({"attn_layer": "se"}, 28_088_024, 4.092),
        ({"attn_layer": "cbam"}, 28_073_576, 4.096),
        ({"output_stride": 8}, 25_557_032, 19.079),  # DRN-A-50
    ],
)
def test_options_of_timms_resnets_give_the_networks_that_the_papers_compare_with(
    config: dict[str, Any], parameters: int, gmacs: float
) -> None:
    counted = describe("timm:resnet50", **config).shipped
    assert (counted.parameters, round(counted.macs / 1e9, 3)) == (parameters, gmacs)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("test_vit", {"attn_layer": "se"}),
        ("test_resnet", {"attn_layer": "unknown"}),
        ("vgg11", {"output_stride": 8}),
        ("test_vit", {"output_stride": 16}),
        ("vgg11", {"image_size": 64}),
    ],
)
def test_an_option_that_a_timm_network_lacks_is_one_line(
    name: str, config: dict[str, Any]
) -> None:
    (option,) = config

    with pytest.raises(ConfigError, match=option) as refused:
        create_model(f"timm:{name}", num_classes=3, **config)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["densenet121", "vgg11"])
def test_networks_with_a_module_called_features_can_be_captured(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of_few_blocks(*names: Any, **options: Any) -> nn.Module:
        return densenet(*names, **options | {"block_config": (1, 1, 1, 1)})

    densenet = timm.models.densenet._create_densenet
    monkeypatch.setattr(timm.models.densenet, "_create_densenet", of_few_blocks)
    with torch.device("meta"):
        network = create_model(f"dsop-timm:{name}", num_classes=3)
        assert len(network(torch.empty(2, 3, 64, 64)).branches) == 4
        plain = network.inference_model().eval()
        assert list(plain.state_dict()) == list(
            timm.create_model(name, num_classes=3).state_dict()
        )
        torch.export.export(plain, (torch.empty(2, 3, 64, 64),), strict=False)


def test_a_network_whose_code_reads_values_has_no_branches() -> None:
    with torch.device("meta"), pytest.raises(ConfigError, match="timm:gemma4_vit_167m"):
        create_model("dsop-timm:gemma4_vit_167m")
