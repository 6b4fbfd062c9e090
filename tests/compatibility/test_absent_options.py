"""Checkpoints from before an option open as the network that they hold, whatever the default."""

from typing import Any

import pytest
import torch

from sopdeploy.checkpoint import Checkpoint, build_classifier, read_checkpoint, write_checkpoint
from sopdeploy.images.preprocess import Preprocess
from sopdeploy.models.registry import create_model, make_config
from tests.sopdeploy.training.small_recipes import few_blocks

GSOP: dict[str, Any] = {"blocks": 2, "cov_width": 32}
GATED: dict[str, Any] = {"blocks_per_stage": 1, "components": 4, "chosen": 2, "component_widths": (6,)}
BEFORE_GATE_NORM = {"gate_norm": False, "component_bias": False, "component_norm": False}
OLDER = [
    # name, side, options of the network, options that files did not have
    ("gsop-net1-preact-resnet29", 16, GSOP, {"channel_norm": False, "position_norm": False}),
    ("gsop-net1-preact-resnet29", 16, {**GSOP, "attention": "position"}, {"position_norm": False}),
    ("dsop-efficientnet-b0", 32, {"iterations": 2}, {"end_tap": "blocks.6"}),
    ("gmgap-16-8-resnet18", 8, {**GATED, "gate_widths": (8, 6)}, {**BEFORE_GATE_NORM, "gate_norm": True}),
    ("sgmoe-16-8-resnet18", 8, {**GATED, "fusion_norm": True}, BEFORE_GATE_NORM),
]


@pytest.mark.parametrize(("name", "side", "options", "absent"), OLDER)
def test_an_older_checkpoint_gives_the_same_logits(
    tmp_path, monkeypatch, name, side, options, absent
) -> None:
    few_blocks(monkeypatch)
    torch.manual_seed(0)
    network = create_model(name, num_classes=3, **options, **absent).eval()
    config = make_config(name, {**options, **absent}).model_dump(mode="json")
    before = {key: value for key, value in config.items() if key not in absent}
    weights = network.state_dict()
    checkpoint = Checkpoint(
        model=name,
        config=before,
        weights=weights,
        labels=tuple("abc"),
        preprocess=Preprocess(resize=side, crop=side),
        training={},
    )
    write_checkpoint(tmp_path / "old.pt", checkpoint)
    found = read_checkpoint(tmp_path / "old.pt")
    images = torch.randn(2, 3, side, side)
    assert torch.equal(build_classifier(found, tmp_path / "old.pt")(images), network(images))
    assert make_config(name, found.config) == make_config(name, config)
