"""The networks of the papers: published counts and dimensions, names of weights, what ships."""

import pytest
import torch
from torch import nn

from sopdeploy.errors import ConfigError
from sopdeploy.layers.gsop_block import GSoPBlock
from sopdeploy.models.describe import describe
from sopdeploy.models.registry import create_model, make_config
from tests.sopdeploy.training.small_recipes import few_blocks


@pytest.mark.parametrize(
    ("pooling", "dimensions"),
    [
        ("gap", 512),
        ("isqrt", 32896),
        ({"kind": "isqrt", "width": 128}, 8256),
        ({"kind": "isqrt", "width": 64}, 2080),
        ("mpncov", 32896),
        ("bcnn", 262144),
        ("improved-bcnn", 262144),
        ("g2denet", 263169),
    ],
)
def test_dimensions_on_vgg_are_the_published_ones(pooling: object, dimensions: int) -> None:
    described = describe("vgg16-bn", classifier="linear", pooling=pooling)
    assert described.representation == dimensions


def test_alexnet_has_the_maps_of_its_paper_and_normalizes_across_channels() -> None:
    network = create_model("alexnet", num_classes=2, pooling="gap", classifier="linear").eval()
    with torch.no_grad():
        last, taps = network.feature_maps(torch.randn(1, 3, 224, 224), network.tap_channels)

    assert [tap.shape[2] for tap in taps] == [55, 27, 13, 13, 13]
    assert last.shape == (1, 256, 13, 13)

    norms = [layer for layer in network.layers if isinstance(layer, torch.nn.LocalResponseNorm)]
    rules = [(layer.size, layer.alpha / layer.size, layer.beta, layer.k) for layer in norms]
    assert rules == [(5, 1e-4, 0.75, 2.0)] * 2  # section 3.3


SMALL = "gsop-net1-preact-resnet164"


def on_meta(name: str, **config: object) -> nn.Module:
    with torch.device("meta"):
        return create_model(name, **config)


def places(network: nn.Module) -> list[str]:
    return [
        name.removesuffix(".attention")
        for name, m in network.named_modules()
        if isinstance(m, GSoPBlock)
    ]


@pytest.mark.parametrize(
    ("name", "config", "says"),
    [
        (SMALL, {"block_stages": ["layer4"]}, "layer1, layer2, layer3"),
        (SMALL, {"strided_dr_stages": ["layer4"]}, "no layer4"),
        ("gsop-net1-resnet50", {"block_stages": ["layer5"]}, "block_stages.0"),
        (
            "gsop-net1-resnet26",
            {"depth": 18, "base_width": 8, "attention": "concatenation"},
            "multiple of 64",
        ),
        *(
            (name, {"pooling": pooling}, "`pooling` can only")
            for name in (SMALL, "gsop-net2-resnet50", "isqrt-efficientnet-b0")
            for pooling in ("isqrt", {"kind": "bcnn"})
        ),
        ("resnet18-512d", {"pooling": "gap"}, "components; .*resnet18-64px"),
        ("srsop-resnet18", {"pooling": "bcnn"}, "components"),
    ],
)
def test_an_invalid_option_is_a_config_error(name: str, config: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        on_meta(name, **config)


def test_convolutions_start_with_kaimings_deviation() -> None:
    torch.manual_seed(0)
    network = create_model(SMALL, blocks=3)
    conv = network.get_submodule(
        "layer2." + places(network)[1].split(".")[1]
    ).attention.channel.reduction[0]

    assert conv.weight.std().item() == pytest.approx((2 / conv.out_channels) ** 0.5, rel=0.1)
    assert conv.bias.abs().max() == 0


def test_chosen_of_one_can_be_exported_but_not_trained() -> None:
    network = create_model("gmsop-16-8-resnet18", num_classes=5, chosen=1)
    images = torch.randn(4, 3, 16, 16)

    with pytest.raises(ConfigError, match="chosen: "):
        network(images)
    assert network.eval()(images).shape == (4, 5)


def test_the_gate_has_the_architecture_of_a_component() -> None:
    """Section 2.3; the code has batch norm and other widths."""

    def layers(**config: object) -> list[list[type]]:
        gate = on_meta("gmgap-16-8-resnet18", component_widths=(12, 8), **config).gate
        return [[type(layer) for layer in gate.feature[place]] for place in (0, 1)]

    convolution = nn.Conv2d
    norm = nn.BatchNorm2d
    relu = nn.ReLU
    assert layers() == [[convolution, relu]] * 2
    assert layers(gate_widths=(8, 6), gate_norm=True)[1] == [convolution, norm, relu]


def test_a_network_for_64_pixels_classifies_the_vector_of_any_pooling() -> None:
    torch.manual_seed(0)
    pooling = {"kind": "isqrt", "width": 4}
    network = create_model(
        "wrn36-2", num_classes=3, widen=1, blocks_per_stage=1, pooling=pooling
    ).eval()
    images = torch.randn(2, 3, 16, 16)
    features, _ = network.feature_maps(images)
    expected = network.head.fc(network.pooling(features))

    assert torch.equal(network(images), expected)
    assert network.num_features == 10
    assert "mixture" not in dict(network.named_children())
    assert describe("wrn36-2", pooling="isqrt").representation == 256 * 257 // 2


def test_a_recipe_with_the_released_gate_can_select_that_of_the_text() -> None:
    chosen = on_meta("gmsop-16-8-resnet18", gate_widths="none").config
    assert chosen == on_meta("gmsop-16-8-resnet18").config


def test_netvlad_assigns_positions_by_their_distances_to_the_words_at_first() -> None:
    pooling = create_model("netvlad-64-resnet18", words=3).pooling
    maps = torch.randn(2, 128, 2, 5)
    distances = (maps[:, None] - pooling.centres[None, :, :, None, None]).square().sum(dim=2)
    found = pooling.assignment(maps).softmax(dim=1)

    torch.testing.assert_close(found, (-0.5 * distances).softmax(dim=1), rtol=0, atol=1e-5)


def test_no_more_components_are_chosen_than_there_are() -> None:
    with pytest.raises(ConfigError, match=r"chosen \(5\)"):
        make_config("gmsop-16-8-resnet18", {"components": 4, "chosen": 5})


FOUR = ["layer1_1", "layer2_1", "layer3_1", "layer4_1"]
NARROW = {"aux_widths": (8, 8, 8, 8), "aux_blocks": (1, 1, 1, 1)}


def test_the_branch_at_the_end_of_efficientnet_trains_the_whole_backbone(monkeypatch) -> None:
    """It reads the maps of the first-order pooling, after the 320 to 1280 convolution, and adds this head."""
    few_blocks(monkeypatch)
    network = create_model("dsop-efficientnet-b0", num_classes=3, iterations=2)
    network(torch.randn(2, 3, 64, 64)).branches["conv_head"].sum().backward()

    assert network.conv_head.weight.grad.abs().sum() > 0

    branch = network.branches["conv_head"]
    own = 1280 * 64 + 2 * 64 + 2080 * 3 + 3  # DR, its batch norm, the classifier
    assert sum(parameter.numel() for parameter in branch.parameters()) == own


def test_unused_branches_can_be_kept_but_do_not_compute() -> None:
    config = {
        **NARROW,
        "aux_blocks": (0, 0, 0, 2),
        "keep_unused_branches": True,
        "aux_pooling": "gap",
    }
    network = create_model("dsop-resnet18", num_classes=3, **config)

    assert list(network.branches) == FOUR
    assert [len(branch.blocks) for branch in network.branches.values()] == [1, 1, 1, 2]
    assert list(network(torch.randn(2, 3, 32, 32)).branches) == ["layer4_1"]
    assert list(network.loss_weights()) == ["main", "layer4_1"]


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"aux_blocks": (1, 1)}, "aux_blocks"),
        ({"aux_blocks": ((1, 2, 3), 1, 1, 1)}, "aux_blocks"),
        ({"aux_widths": (64,)}, "aux_widths"),
        ({"aux_widths": ()}, "aux_widths: 0 values"),
        ({"aux_weights": ()}, "aux_weights: 0 values"),
        ({"aux_weights": (1.0,) * 5}, "aux_weights"),
        ({"aux_pooling": "mpncov"}, "aux_pooling: "),
    ],
)
def test_options_that_do_not_match_the_stages_are_rejected(config: dict, key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        create_model("dsop-resnet18", **config)
