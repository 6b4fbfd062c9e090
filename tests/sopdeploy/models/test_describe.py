"""The integers of the counting convention; the papers' own rounded figures stand beside them."""

import functools
import json
import math

import pytest

from sopdeploy import describe
from sopdeploy.errors import ConfigError
from sopdeploy.models.describe import PUBLISHED_ROWS, Published, PublishedRow


def test_dsop_inference_model_counts_equal_the_plain_network() -> None:
    plain = describe("resnet18", conv5_stride=1)
    assert plain.training == plain.shipped == describe("dsop-resnet18").shipped


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
def test_published_figures_are_reached_to_the_last_digit_or_marked_with_the_reason(row: PublishedRow) -> None:
    described = published(row.model, row.num_classes, json.dumps(dict(row.config)))
    note = "; ".join(filter(None, (row.note, "cut off, not rounded" if row.cut else "")))
    found = [figure for figure in described if (figure.source, figure.note) == (row.source, note)]
    assert found
    for figure in found:
        assert meets(figure, row.cut) == row.reached, figure
        assert row.reached or row.note


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


@pytest.mark.parametrize(("name", "side"), [("resnet18", 0), ("alexnet", 16), ("ge-resnet50", 448)])
def test_an_image_that_a_network_cannot_compute_is_a_config_error(name: str, side: int) -> None:
    with pytest.raises(ConfigError, match=f"image_size: {name} cannot compute images of {side} pixels \\(.*"):
        describe(name, image_size=side)
