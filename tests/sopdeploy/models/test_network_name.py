"""The model card names the network that ships with its options, and what is left of a detached one."""

from typing import Any

import pytest

from sopdeploy.models.describe import name_network
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
