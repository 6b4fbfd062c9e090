"""The integers of the counting convention; the papers' own rounded figures stand beside them."""

import functools
import json
import math

import pytest
from torch import nn

from sopdeploy import describe
from sopdeploy.errors import ConfigError
from sopdeploy.models.describe import ROWS, Published, Row
from sopdeploy.models.stats import tally

S1 = {"conv5_stride": 1}
TABLE = {"aux_stride": "table"}


@pytest.mark.parametrize(
    ("name", "config", "parameters", "macs"),
    [
        ("resnet18", S1, 11_689_512, 3_047_198_720),
        ("resnet50", S1, 25_557_032, 6_208_618_496),
        ("dsop-resnet18", {}, 100_494_536, 6_385_970_944),
        ("dsop-resnet18", TABLE, 100_577_224, 5_698_760_448),
        ("dsop-resnet50", TABLE, 181_917_384, 10_537_324_544),
        ("dsop-resnet50", {}, 148_686_920, 12_076_816_640),
    ],
)
def test_training_counts_are_the_expected_integers(name, config, parameters: int, macs: int) -> None:
    counted = describe(name, **config).training
    assert (counted.parameters, counted.macs) == (parameters, macs)


@pytest.mark.parametrize("depth", [18, 34, 50])
def test_dsop_inference_model_counts_equal_the_plain_network(depth: int) -> None:
    plain = describe(f"resnet{depth}", conv5_stride=1)
    assert plain.training == plain.shipped
    assert describe(f"dsop-resnet{depth}").shipped == plain.shipped
    assert describe(f"dsop-resnet{depth}", aux_stride="table").shipped == plain.shipped


def test_branches_of_table_x_without_unused_ones_are_smaller() -> None:
    blocks = (8, 0, 0, 0)
    assert describe("dsop-resnet18", aux_blocks=blocks, **TABLE).training.parameters == 14_362_384


def row_id(row: Row) -> str:
    return f"{row.source}, {row.model} {dict(row.config)} {row.module} {row.params} {row.ops}"


def meets(figure: Published, cut: bool) -> bool:
    """Say whether ours is the printed figure to its last digit."""
    digits = len(str(figure.printed).partition(".")[2].removesuffix("0")) if figure.printed % 1 else 0
    if cut:
        return math.floor(figure.ours * 10**digits) / 10**digits == figure.printed
    return round(figure.ours, digits) == figure.printed


@functools.cache
def published(name: str, classes: int, config: str) -> tuple[Published, ...]:
    return describe(name, num_classes=classes, **json.loads(config)).published


@pytest.mark.parametrize("row", ROWS, ids=row_id)
def test_published_figures_are_reached_to_the_last_digit_or_marked_with_the_reason(row: Row) -> None:
    described = published(row.model, row.num_classes, json.dumps(dict(row.config)))
    note = "; ".join(filter(None, (row.note, "cut off, not rounded" if row.cut else "")))
    found = [figure for figure in described if (figure.source, figure.note) == (row.source, note)]
    assert found
    for figure in found:
        assert meets(figure, row.cut) == row.reached, figure
        assert row.reached or "misprint" in row.note or "are fitted" in row.note


@pytest.mark.parametrize(
    ("name", "switches"),
    [
        ("dsop-resnet18", {}),  # the text's definition: the tables count strided branches
        ("dsop-resnet18", {"aux_stride": "table", "image_size": 192}),
        ("resnet20", {"num_classes": 100}),
        ("resnet18", {}),  # conv5_x with stride 2
    ],
)
def test_other_networks_have_no_published_figures(name: str, switches: dict) -> None:
    assert describe(name, **switches).published == ()


@pytest.mark.parametrize("name", ["dsop-resnet18", "psdr-resnet50", "efficientnet-b0", "wrn-22-10"])
def test_parts_sum_to_the_whole(name: str) -> None:
    found = describe(name)
    assert sum(part.parameters for part in found.parts.values()) == found.training.parameters
    assert sum(part.macs for part in found.parts.values()) == found.training.macs


def test_branches_are_parts_of_their_own() -> None:
    parts = describe("dsop-resnet18").parts
    assert [part for part in parts if part.startswith("branches")] == [
        f"branches.layer{stage}_1" for stage in (1, 2, 3, 4)
    ]
    assert parts["fc"].parameters == 513_000
    assert parts["branches.layer1_1"].macs == 4 * 64 * 64 * 9 * 56**2 + 2080 * 1000


def test_counting_allocates_nothing() -> None:
    assert describe("dsop-resnet18", num_classes=10**9).training.parameters > 10**12


def test_description_contains_name_config_and_size() -> None:
    told = describe("dsop-resnet20", num_classes=7, image_size=16, aux_pooling="gap")
    assert (told.name, told.num_classes, told.image_size) == ("dsop-resnet20", 7, 16)
    assert told.config["aux_pooling"] == "gap"
    assert told.config["depth"] == 20
    assert told.training_only == ("branches",)
    assert told.representation == 64
    assert told.loss_weights["layer3_2"] == 0.3
    assert told.model_dump(mode="json")["training"]["macs"] > told.shipped.macs


@pytest.mark.parametrize(
    ("layer", "channels", "macs"),
    [
        (nn.Conv2d(4, 6, 3, padding=1), 4, 6 * 4 * 9 * 25),
        (nn.Conv2d(4, 6, 3, padding=1, groups=2), 4, 6 * 2 * 9 * 25),
        (nn.Conv2d(4, 6, 1, stride=2), 4, 6 * 4 * 9),
    ],
    ids=["3x3", "grouped", "strided"],
)
def test_multiply_adds_of_a_convolution(layer: nn.Conv2d, channels: int, macs: int) -> None:
    network = nn.Sequential(nn.Conv2d(3, channels, 1), layer).to("meta")
    assert tally(network, 5).total().macs - 3 * channels * 25 == macs


@pytest.mark.parametrize(("name", "side"), [("resnet18", 0), ("alexnet", 16), ("ge-resnet18", 448)])
def test_an_image_that_a_network_cannot_compute_is_a_config_error(name: str, side: int) -> None:
    with pytest.raises(ConfigError, match=f"image_size: {name} cannot compute images of {side} pixels \\(.*"):
        describe(name, image_size=side)
