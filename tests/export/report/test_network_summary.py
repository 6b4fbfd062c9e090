"""The network summary lists modules in order of execution, and where each branch starts."""

import pytest

from sopdeploy.checkpoint import Checkpoint
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.models.describe import describe
from sopdeploy.models.registry import entry, make_config
from sopdeploy_export.report.network_summary import (
    NetworkSummary,
    network_rows,
    summarize_checkpoint,
)


def summary_of(name: str, **config: object) -> NetworkSummary:
    usual = entry(name)
    return summarize_checkpoint(
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
            {f"branches.layer{stage}_1": f"layer{stage}" for stage in range(1, 5)},
        ),
        ("dsop-efficientnet-b0", {"branches.blocks_4_2": "blocks", "branches.conv_head": "bn2"}),
        (
            "dsop-timm:regnety_002",
            {f"branches.s{stage}": f"s{stage}" for stage in range(1, 5)},
        ),
        ("psdr-resnet50", {"auxiliary.step1": "pooling", "auxiliary.step2": "pooling"}),
        ("gmsop-16-8-resnet18", {"gate.noise": "gate"}),
        ("gsop-net1-resnet26", {}),
    ],
)
def test_training_only_modules_start_where_the_network_is_tapped(name: str, starts: dict[str, str]) -> None:
    found = summary_of(name)
    assert {part.name: part.source for part in found.parts if part.training_only} == starts


@pytest.mark.parametrize(
    "name", ["dsop-resnet8", "dsop-preact-resnet110", "psdr-resnet50", "gsop-net1-resnet26"]
)
def test_the_modules_add_up_to_all_parameters_and_multiply_adds(name: str) -> None:
    found, counted = summary_of(name), describe(name)
    assert (found.trained, found.shipped) == (counted.training, counted.shipped)
    assert sum(part.parameters for part in found.parts) == found.trained.parameters
    assert sum(part.macs for part in found.parts) == found.trained.macs
    assert sum(part.parameters for part in found.parts if not part.training_only) == found.shipped.parameters


def test_the_modules_are_in_order_of_execution() -> None:
    names = [part.name for part in summary_of("dsop-resnet8").parts if not part.training_only]
    assert names == ["conv1", "bn1", "layer1", "layer2", "layer3", "pooling", "fc"]


def test_a_network_that_cannot_train_is_traced_in_eval_mode() -> None:
    found = summary_of("gmsop-16-8-resnet18", chosen=1)
    assert [part.source for part in found.parts if part.training_only] == ["gate"]


def test_siblings_without_a_branch_between_them_share_a_box() -> None:
    found = summary_of("dsop-preact-resnet110")
    rows = network_rows(found)
    assert "layer1.0 to 2" in [row.name for row in rows]
    assert len(rows) < 30
    assert sum(len(row.branches) for row in rows) == 18
    assert sum(row.parameters for row in rows) == found.shipped.parameters
