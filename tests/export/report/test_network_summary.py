"""The anatomy: which part follows which, and where each branch starts, as the forward pass shows it."""

import pytest

from sopdeploy.checkpoint import Checkpoint
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.models.describe import describe
from sopdeploy.models.registry import entry, make_config
from sopdeploy_export.report.drawing import drawings, rows_of
from sopdeploy_export.report.network_summary import NetworkSummary, network_summary


def anatomy_of(name: str, **config: object) -> NetworkSummary:
    usual = entry(name)
    return network_summary(
        Checkpoint(
            model=name,
            config=make_config(name, config).model_dump(mode="json"),
            weights={},
            labels=tuple(map(str, range(usual.num_classes))),
            preprocess=Preprocess(resize=usual.image_size, crop=usual.image_size),
            training={},
        )
    )


@pytest.mark.parametrize(
    ("name", "starts"),
    [
        (
            "dsop-resnet18",
            {
                "branches.layer1_1": "layer1",
                "branches.layer2_1": "layer2",
                "branches.layer3_1": "layer3",
                "branches.layer4_1": "layer4",
            },
        ),
        ("dsop-efficientnet-b0", {"branches.blocks_4_2": "blocks.4", "branches.blocks_6_0": "blocks.6"}),
        (
            "dsop-timm:regnety_002",
            {
                "branches.s1": "s1",
                "branches.s2": "s2",
                "branches.s3": "s3",
                "branches.s4": "s4",
            },
        ),
        ("psdr-resnet50", {"auxiliary.step1": "pooling", "auxiliary.step2": "pooling"}),
        ("gmsop-16-8-resnet18", {"gate.noise": "gate"}),
        ("gsop-net1-resnet26", {}),
    ],
)
def test_what_leaves_starts_where_the_network_is_tapped(name: str, starts: dict[str, str]) -> None:
    found = anatomy_of(name)
    assert {part.name: part.source for part in found.parts if part.leaves} == starts


@pytest.mark.parametrize(
    "name", ["dsop-resnet8", "dsop-preact-resnet110", "psdr-resnet50", "gsop-net1-resnet26"]
)
def test_the_boxes_hold_every_parameter_and_every_product(name: str) -> None:
    found, counted = anatomy_of(name), describe(name)
    assert (found.trained, found.shipped) == (counted.training, counted.shipped)
    assert sum(part.parameters for part in found.parts) == found.trained.parameters
    assert sum(part.macs for part in found.parts) == found.trained.macs
    assert sum(part.parameters for part in found.parts if not part.leaves) == found.shipped.parameters


def test_the_parts_stand_in_the_order_of_computing() -> None:
    names = [part.name for part in anatomy_of("dsop-resnet8").parts if not part.leaves]
    assert names == ["conv1", "bn1", "layer1", "layer2", "layer3", "pooling", "fc"]


def test_a_network_that_cannot_train_is_drawn_as_it_answers() -> None:
    found = anatomy_of("gmsop-16-8-resnet18", chosen=1)
    assert [part.source for part in found.parts if part.leaves] == ["gate"]


def test_blocks_in_a_run_without_a_branch_share_a_box() -> None:
    found = anatomy_of("dsop-preact-resnet110")
    rows = rows_of(found)
    assert "layer1.0 to 2" in [row.name for row in rows]
    assert len(rows) < 30
    assert sum(len(row.leavers) for row in rows) == 18
    assert sum(row.parameters for row in rows) == found.shipped.parameters


def test_a_network_that_ships_whole_is_drawn_once() -> None:
    assert drawings(anatomy_of("resnet18")).count("<svg") == 1
    assert drawings(anatomy_of("dsop-resnet8")).count("<svg") == 2
