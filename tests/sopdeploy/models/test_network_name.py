"""The model card names the network that ships with its options, and what is left of a detached one."""

from typing import Any

import pytest
import torch

from sopdeploy.models.describe import describe_exported, name_network
from sopdeploy.models.registry import create_model

NAMED: dict[str, tuple[str, dict[str, Any], str]] = {
    "plain": ("resnet8", {}, "resnet8"),
    "DSoP": (
        "dsop-resnet8",
        {},
        "dsop-resnet8 (iterations=5) without branches, "
        "which is resnet8 (plain ResNet-8 for 32-pixel images)",
    ),
    "GM-SOP": (
        "gmsop-16-8-resnet18",
        {"components": 4, "chosen": 2, "component_widths": (8, 6), "widen": 1},
        "gmsop-16-8-resnet18 (components=4, chosen=2, component_widths=[8, 6], iterations=5) "
        "without gate.noise",
    ),
}


@pytest.mark.parametrize("case", NAMED)
def test_a_network_of_the_catalog_is_named_with_its_options(case: str) -> None:
    name, config, named = NAMED[case]
    network = create_model(name, num_classes=2, **config)

    assert name_network(name, network, network.training_only) == named


def test_the_name_that_a_user_gave_is_not_looked_up() -> None:
    network = create_model("resnet8", num_classes=2)
    assert name_network("my-network", network) == "my-network"


# Network, number of classes: the sentence about what is left of it
HEADLINES = {
    ("resnet8", 1): "ResNet-8 for 1 class, 5 parameters",
    (
        "dsop-resnet8",
        10,
    ): "ResNet-8 for 10 classes, 5 parameters, trained with DSoP, branches removed",
    ("head:resnet8", 2): "ResNet-8 with a second-order head for 2 classes, 5 parameters",
    ("gsop-net1-resnet26", 1000): "GSoP-Net1 on ResNet-26 for 1,000 classes, 5 parameters",
}


@pytest.mark.parametrize(("name", "num_classes"), HEADLINES)
def test_one_sentence_says_what_was_exported(name: str, num_classes: int) -> None:
    with torch.device("meta"):
        network = create_model(name, num_classes=num_classes)
    found = describe_exported(name, network, network.training_only, num_classes, 5)

    assert found == HEADLINES[name, num_classes]


def test_the_sentence_names_a_network_of_the_user() -> None:
    found = describe_exported("resnet8", torch.nn.Linear(2, 2), ("aux",), 2, 6)
    assert found == "Network resnet8 for 2 classes, 6 parameters, aux removed"
