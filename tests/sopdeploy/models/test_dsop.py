from collections.abc import Callable

import pytest
import torch
from torch import nn

from sopdeploy import create_model
from sopdeploy.errors import ConfigError
from tests.sopdeploy.training.small_recipes import few_blocks

FOUR = ["layer1_1", "layer2_1", "layer3_1", "layer4_1"]
NARROW = {"aux_widths": (8, 8, 8, 8), "aux_blocks": (1, 1, 1, 1)}


def branches_of(name: str, **config: object) -> dict[str, nn.Module]:
    with torch.device("meta"):
        network = create_model(name, **config)
    return dict(network.branches.items())


@pytest.mark.parametrize(
    ("name", "config", "expected"),
    [
        ("dsop-resnet18", {}, FOUR),
        ("dsop-resnet50", {}, ["layer1_2", "layer2_3", "layer3_5", "layer4_2"]),
        ("dsop-resnet20", {}, [f"layer{s}_{p}" for s in (1, 2, 3) for p in (0, 2)]),
        ("dsop-resnet20", {"depth": 32}, ["layer1_4", "layer2_4", "layer3_4"]),
        ("dsop-resnet8", {}, ["layer1_0", "layer2_0", "layer3_0"]),
        ("dsop-preact-resnet110", {}, [f"layer{s}_{p}" for s in (1, 2, 3) for p in range(2, 18, 3)]),
        ("dsop-preact-resnet164", {"blocks": 5}, ["layer1_4", "layer2_4", "layer3_4"]),
        ("dsop-wrn-22-10", {}, [f"layer{s}_{p}" for s in (1, 2, 3) for p in (0, 2)]),
        ("dsop-wrn-28-10", {}, [f"layer{s}_{p}" for s in (1, 2, 3) for p in (1, 3)]),
        ("dsop-resnext29-8x64d", {}, [f"layer{s}_{p}" for s in (1, 2, 3) for p in (0, 2)]),
        ("dsop-efficientnet-b0", {}, ["blocks_4_2", "conv_head"]),
        ("dsop-resnet18", {"aux_blocks": (0, 1, (2, 0), (0, 3))}, ["layer2_1", "layer3_0", "layer4_1"]),
    ],
)
def test_branches_start_where_the_paper_says(name: str, config: dict, expected: list[str]) -> None:
    assert list(branches_of(name, **config)) == expected


@pytest.mark.parametrize(
    ("name", "config", "blocks", "widths"),
    [
        ("dsop-resnet18", {}, [2, 2, 2, 2], [64, 128, 256, 256]),
        ("dsop-resnet50", {}, [3, 4, 6, 3], [64, 256, 256, 256]),
        ("dsop-resnet50", {"aux_stride": "table"}, [3, 4, 7, 3], [256, 256, 256, 256]),
        ("dsop-resnet18", {"aux_widths": (128,) * 4}, [2, 2, 2, 2], [64, 128, 128, 128]),
        ("dsop-resnet20", {}, [1, 2, 1, 2, 1, 2], [16, 16, 32, 32, 64, 64]),
        ("dsop-resnet20", {"depth": 32, "base_width": 64}, [2, 2, 2], [64, 128, 128]),
        ("dsop-preact-resnet110", {}, [3] * 18, [16] * 6 + [32] * 6 + [64] * 6),
        ("dsop-preact-resnet164", {}, [3] * 18, [64] * 6 + [128] * 12),
        ("dsop-wrn-22-10", {}, [1, 2] * 3, [128] * 6),
        ("dsop-wrn-28-10", {}, [2] * 6, [128] * 6),
        ("dsop-resnext29-8x64d", {}, [1, 2] * 3, [128] * 6),
        ("dsop-efficientnet-b0", {}, [3, 0], [64, 64]),
        ("dsop-efficientnet-b0", {"aux_widths": (512,) * 7}, [3, 0], [112, 512]),
    ],
)
def test_branches_are_made_of_what_the_paper_says(name, config, blocks, widths) -> None:
    branches = branches_of(name, **config).values()
    assert [len(branch.blocks) for branch in branches] == blocks
    assert [branch.pooling.width for branch in branches] == widths


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"base_width": 64}, [0.0, 0.5, 0.5]),
        ({}, [0.0, 0.0, 0.0]),
        ({"base_width": 64, "aux_dropout": 0.2}, [0.2, 0.2, 0.2]),
    ],
)
def test_dropout_follows_only_covariances_of_128_channels(config: dict, expected: list[float]) -> None:
    """Section V-D; "4K-d" is half of the 8256 values that the classifier sees."""
    branches = branches_of("dsop-resnet20", depth=32, **config).values()
    assert [branch.dropout.p for branch in branches] == expected


@pytest.mark.parametrize(
    ("name", "config", "expected"),
    [
        ("dsop-resnet18", {}, {"main": 1.0, **dict.fromkeys(FOUR, 1.0)}),
        ("dsop-resnet20", {"depth": 32}, {"main": 1.0, "layer1_4": 0.1, "layer2_4": 0.2, "layer3_4": 0.3}),
        (
            "dsop-resnet20",
            {"depth": 32, "main_weight": 0.5, "aux_weights": (1, 0, 2)},
            {"main": 0.5, "layer1_4": 1.0, "layer2_4": 0.0, "layer3_4": 2.0},
        ),
    ],
)
def test_loss_weights_default_to_the_paper(name, config, expected) -> None:
    with torch.device("meta"):
        assert create_model(name, **config).loss_weights() == expected


def test_stages_without_activation_get_one_before_the_pooling_of_their_branches() -> None:
    for branch in branches_of("dsop-preact-resnet164").values():
        assert [type(module) for module in branch.ending] == [nn.BatchNorm2d, nn.ReLU]
    for branch in branches_of("dsop-resnext29-8x64d").values():
        assert isinstance(branch.ending, nn.Identity)


def test_the_branch_at_the_end_of_efficientnet_trains_the_whole_backbone(monkeypatch) -> None:
    """It reads the maps of the first-order pooling, after the 320 to 1280 convolution, and adds this head."""
    few_blocks(monkeypatch)
    network = create_model("dsop-efficientnet-b0", num_classes=3, iterations=2)
    network(torch.randn(2, 3, 64, 64)).branches["conv_head"].sum().backward()
    assert network.conv_head.weight.grad.abs().sum() > 0
    branch = network.branches["conv_head"]
    own = 1280 * 64 + 2 * 64 + 2080 * 3 + 3  # DR, its batch norm, the classifier
    assert sum(parameter.numel() for parameter in branch.parameters()) == own


@pytest.mark.parametrize(
    ("pooling", "function"),
    [("power", lambda values: values.sqrt()), ("logarithm", lambda values: (values + 1e-3).log())],
)
def test_branches_pool_by_the_matrix_functions_of_section_iii_a(pooling: str, function: Callable) -> None:
    network = create_model("dsop-resnet18", num_classes=3, **NARROW, aux_pooling=pooling)
    branch = network.branches["layer2_1"]
    map_BCHW = torch.randn(2, branch.pooling.channels, 5, 4, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(torch.stack([one.flatten(1).cov(correction=0) for one in map_BCHW]))
    matrix = vectors @ torch.diag_embed(function(values.clamp_min(0))) @ vectors.mT
    rows, columns = torch.triu_indices(*matrix.shape[1:])
    torch.testing.assert_close(
        branch.pooling.double()(map_BCHW), matrix[:, rows, columns], atol=1e-4, rtol=1e-4
    )


def test_unused_branches_can_be_kept_but_do_not_compute() -> None:
    config = {**NARROW, "aux_blocks": (0, 0, 0, 2), "keep_unused_branches": True, "aux_pooling": "gap"}
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
        ({"aux_weights": (1.0,) * 5}, "aux_weights"),
        ({"aux_pooling": "mpncov"}, "aux_pooling.*should be 'isqrt', 'power', 'logarithm' or 'gap'"),
    ],
)
def test_options_that_do_not_match_the_stages_are_rejected(config: dict, key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        create_model("dsop-resnet18", **config)
