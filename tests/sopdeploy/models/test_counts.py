"""Exact parameters and multiply-adds, and the papers' own rounded figures."""

import functools
import json
import math
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sopdeploy import create_model, describe
from sopdeploy.errors import ConfigError
from sopdeploy.models.describe import PUBLISHED_ROWS, Published, PublishedRow, tally
from sopdeploy.models.gsop import RELEASED

# The released code has no batch norm after the row-wise convolution
NO_NORM = {"channel_norm": False}
S1: dict[str, Any] = {"conv5_stride": 1}
TABLE = {"aux_stride": "table"}
RELEASED_GATE: dict[str, Any] = {"gate_widths": (256, 128), "gate_norm": True}  # but for WRN
POSITION = {"attention": "position"}
PREACT_GSOP = "gsop-net1-preact-resnet164"

# In training; those of networks without options are in `tests/goldens/counts.json`.
COUNTS: list[tuple[str, dict[str, Any], int, int | None]] = [
    ("resnet18", S1, 11_689_512, 3_047_198_720),
    ("resnet50", S1, 25_557_032, 6_208_618_496),
    ("resnet20", {"depth": 110}, 1_727_962, None),
    ("preact-resnet164", {"num_classes": 100}, 1_726_388, 247_669_760),
    ("vgg16-bn", {"pooling": "isqrt"}, 170_479_144, None),  # fast-MPN-COV's 650.4 MB
    ("alexnet", {"pooling": "isqrt"}, 60_965_224 + 4096 * (32896 - 9216), None),
    ("dsop-resnet18", TABLE, 100_577_224, 5_698_760_448),
    # Table X counts unused ones
    ("dsop-resnet18", {"aux_blocks": (8, 0, 0, 0), **TABLE}, 14_362_384, None),
    ("dsop-resnet50", TABLE, 181_917_384, 10_537_324_544),
    ("gsop-net1-resnet50", RELEASED, 28_285_224, 6_364_987_392),
    ("gsop-net2-resnet50", RELEASED, 58_278_568, 6_446_101_504),
    ("gsop-net1-resnet50", NO_NORM, 28_285_224, 6_442_057_728),
    ("gsop-net1-resnet50", POSITION, 26_182_952, None),
    ("gsop-net1-resnet50", {"attention": "average", **NO_NORM}, 28_911_144, None),
    ("gsop-net1-resnet50", {"attention": "concatenation", **NO_NORM}, 32_105_000, None),
    (PREACT_GSOP, NO_NORM, 2_894_516, 555_361_280),
    (PREACT_GSOP, {"strided_dr_stages": ["layer1"], **NO_NORM}, 2_894_516, 536_486_912),
    (PREACT_GSOP, {"block_stages": (), "last_stride": 2}, 1_726_388, 247_669_760),
    # MPN-COV of Table 6
    ("gsop-net2-preact-resnet164", {"block_stages": ()}, 2_559_412, 500_652_288),
    ("srsop-resnet18", S1, 8_957_192, 249_100_800),
    ("gmgap-16-8-resnet18", RELEASED_GATE, 2_333_192, 178_442_240),
    ("gmsop-16-8-resnet18", S1 | RELEASED_GATE, 10_352_776, 400_095_744),
    ("gmsop-16-8-resnet18", RELEASED_GATE, 10_352_776, 186_186_240),
    ("sgmoe-16-8-resnet18", {"fusion_norm": True}, 2_275_080, 141_217_792),
    ("gmsop-16-8-resnet50", S1, 11_922_568, 928_578_048),
    ("gmsop-16-8-wrn36-2", {"gate_norm": True}, 17_809_160, 1_264_122_368),
]


@pytest.mark.parametrize(("name", "config", "parameters", "macs"), COUNTS)
def test_counts_are_exact(
    name: str, config: dict[str, Any], parameters: int, macs: int | None
) -> None:
    counted = describe(name, **config).training

    assert counted.parameters == parameters
    assert macs in {None, counted.macs}


class SequenceFirst(nn.Module):
    """Self-attention on tokens (L, B, C), given by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 16, 16)
        self.attention = nn.MultiheadAttention(32, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = self.patches(images).flatten(2).permute(2, 0, 1)
        return self.attention(query=tokens, key=tokens, value=tokens, need_weights=False)[
            0
        ].mean(0)


@pytest.mark.parametrize(
    ("build", "side"),
    [
        (torchvision.models.densenet121, 224),
        (torchvision.models.vit_b_16, 224),  # the projections of `nn.MultiheadAttention`
        # Rows of windows, of positions, and of pixels
        (functools.partial(timm.create_model, "swin_tiny_patch4_window7_224"), 224),
        (functools.partial(timm.create_model, "swinv2_cr_tiny_224"), 224),
        (functools.partial(timm.create_model, "mobilevit_s"), 256),
        (SequenceFirst, 224),
    ],
    ids=["densenet", "vit", "swin", "swin_v2", "mobilevit", "sequence_first"],
)
def test_macs_are_those_that_torch_counts_for_convolutions_and_linear_layers(
    build: Any, side: int
) -> None:
    with torch.device("meta"):
        network = build().eval()
        image = torch.zeros(1, 3, side, side)
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        network(image)
    aten = torch.ops.aten
    counted = {str(key): value for key, value in flops.get_flop_counts()["Global"].items()}
    of_layers = sum(counted.get(str(key), 0) for key in (aten.convolution, aten.addmm, aten.mm))

    assert tally(network, side).total().macs == of_layers // 2


class ScaledNorm(nn.BatchNorm2d):
    def forward(self, images: torch.Tensor, scale: float) -> torch.Tensor:
        return super().forward(images) * scale


class SelfAttention(nn.MultiheadAttention):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return super().forward(tokens, tokens, tokens, need_weights=False)[0]


class LinearWithBias(nn.Linear):
    def forward(self, features: torch.Tensor) -> Any:
        return super().forward(features), self.bias


class Subclasses(nn.Module):
    """Layers of a user that have other inputs and outputs than those of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = ScaledNorm(3)
        self.attention = SelfAttention(3, 1, batch_first=True)
        self.fc = LinearWithBias(3, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = self.norm(images, scale=2.0).flatten(2).transpose(1, 2)
        return self.fc(self.attention(tokens).mean(1))[0]


class Frozen(nn.Module):
    """Its weights are buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(5, 3))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3)) @ self.weight.T


@pytest.mark.parametrize(
    ("build", "parameters", "macs"),
    [(Subclasses, 6 + 9 * 3 + 9 + 3 * 3 + 3 + 20, 4 * 16 * 3 * 3 + 15), (Frozen, 0, 0)],
)
def test_layers_of_users_are_counted(build: Any, parameters: int, macs: int) -> None:
    counted = tally(build(), 4).total()
    assert (counted.parameters, counted.macs) == (parameters, macs)


@pytest.mark.parametrize(("components", "chosen"), [(4, 2), (128, 32)])
def test_macs_count_k_of_n_components(components: int, chosen: int) -> None:
    counted = describe(
        "gmgap-16-8-resnet18", components=components, chosen=chosen, **RELEASED_GATE
    )
    one = 128 * 512 * 8 * 8

    assert counted.shipped.macs == 178_442_240 + (chosen - 8) * one


def row_id(row: PublishedRow) -> str:
    return f"{row.source}, {row.model} {dict(row.config)} {row.module} {row.params} {row.ops}"


def meets(figure: Published, cut: bool) -> bool:
    """Say whether ours is the printed figure to its last digit."""
    digits = len(str(figure.printed).partition(".")[2].removesuffix("0"))
    if figure.unit == "x":  # multiples are printed with one digit, 1.0 too
        digits = max(digits, 1)
    if cut:
        return math.floor(figure.ours * 10**digits) / 10**digits == figure.printed
    return round(figure.ours, digits) == figure.printed


@functools.cache
def published(name: str, classes: int, config: str) -> tuple[Published, ...]:
    return describe(name, num_classes=classes, **json.loads(config)).published


@pytest.mark.parametrize("row", PUBLISHED_ROWS, ids=row_id)
def test_published_figures_are_reached_or_marked_with_the_reason(row: PublishedRow) -> None:
    described = published(row.model, row.num_classes, json.dumps(dict(row.config)))
    note = "; ".join(filter(None, (row.note, "cut off, not rounded" if row.cut else "")))
    found = [
        figure for figure in described if (figure.source, figure.note) == (row.source, note)
    ]

    assert found
    for figure in found:
        assert meets(figure, row.cut) == row.reached, figure
        assert row.reached or row.note


@pytest.mark.parametrize(
    "name", ["dsop-resnet18", "gsop-net2-resnet26", "efficientnet-b0", "wrn-22-10"]
)
def test_parts_sum_to_the_whole(name: str) -> None:
    found = describe(name)

    assert sum(part.parameters for part in found.parts.values()) == found.training.parameters
    assert sum(part.macs for part in found.parts.values()) == found.training.macs


@pytest.mark.parametrize(
    ("name", "side"), [("resnet18", 0), ("alexnet", 16), ("timm:halonet26t", 7)]
)
def test_an_image_that_a_network_cannot_compute_is_a_config_error(name: str, side: int) -> None:
    with pytest.raises(ConfigError, match=f"image_size: .*{side}"):
        describe(name, image_size=side)


def test_a_mixture_counts_what_it_computes_per_image_in_training() -> None:
    config = {"components": 4, "chosen": 2, "component_widths": (6,), "gate_widths": ()}
    network = create_model("gmsop-16-8-resnet18", num_classes=3, **config)
    with torch.device("meta"):
        without_values = create_model("gmsop-16-8-resnet18", num_classes=3, **config)

    counts = [tally(one, 32).total() for one in (network, without_values, network.eval())]
    assert len({one.macs for one in counts}) == 1
